"""Videos: images of zeros around them, and convolutions over time, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from harness import FORMS, run, simd
from image_harness import Extent, convolved, from_planes, to_planes

from sparse_tvm.operators import Frames, Layout
from sparse_tvm.schedules.cpu.block_arrays import split_arrays
from sparse_tvm.schedules.cpu.conv_planes import conv_planes
from sparse_tvm.schedules.cpu.frames import pad_frames
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.lane_tiles import symbol
from sparse_tvm.schedules.cpu.planes import Border, Planes, Window

SAME = Window((3, 3), pads=(1, 1, 1, 1))


@pytest.mark.parametrize("target", FORMS, ids=lambda target: target.name)
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(("pads", "size"), [((1, 1), (3, 7)), ((0, 2), (64,)), ((2, 0), (5,))])
def test_pad_frames(target, symbolic, pads, size):
    x = np.random.default_rng(0).standard_normal((6, 4, *size)).astype("float32")
    images = symbol("images") if symbolic else 6
    kernel = pad_frames(images, 3, pads, 4, size, simd(target))
    videos = x.reshape(2, 3, 4, *size)
    expected = np.pad(videos, ((0, 0), pads, *[(0, 0)] * (1 + len(size))))
    shape = (2 * (3 + sum(pads)), 4, *size)
    found = run(kernel, target, 2, [x], shape)
    np.testing.assert_array_equal(found, expected.reshape(shape))


@pytest.mark.parametrize("target", FORMS, ids=lambda target: target.name)
@pytest.mark.parametrize("format", ["dense", "csr"])
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize(
    "frames", [Frames(5, 3), Frames(6, 2, 2), Frames(7, 3, 1, 2), Frames(4, 1, 3)]
)
def test_convolution_over_time(target, format, symbolic, frames):
    videos, channels, n = 2, 3, 5
    image = {"batch": videos * frames.count, "height": 6, "width": 9, "symbolic": symbolic}
    extent = Extent({**image, "seed": 0})
    x = extent.random(channels)
    rng = np.random.default_rng(1)
    w = rng.standard_normal((n, channels * frames.kernel * SAME.taps)).astype("float32")
    w *= rng.random(w.shape) >= 0.5
    layout = Layout("test", format, (2 if format == "dense" else 1, 1)).having(vectors=2)
    source, there = (Planes(*extent.symbols, b) for b in (SAME.reads, Border(SAME.reads.gap)))
    here, wanted = (Planes(*extent.numbers, b) for b in (SAME.reads, Border(SAME.reads.gap)))
    batch = extent.batch // frames.count * frames.out
    images = Images(batch, channels, n, source, there, SAME, extent.names, extent.batch, frames)
    kernel = conv_planes(images, layout, [], [], simd(target))
    arguments = [to_planes(x, here), *split_arrays(w, layout).values(), *extent.sizes]
    shape = (videos * frames.out, n, wanted.size)
    found = from_planes(run(kernel, target, 2, arguments, shape), wanted)
    clips = x.reshape(videos, frames.count, channels, *extent.numbers)
    seen = [
        clips[:, first : first + (frames.kernel - 1) * frames.dilation + 1 : frames.dilation]
        for first in range(0, frames.out * frames.stride, frames.stride)
    ]
    # [videos, out, kernel, channels, ...] to images whose channels are those of all their frames
    patches = np.stack(seen, 1).swapaxes(2, 3).reshape(videos * frames.out, -1, *extent.numbers)
    np.testing.assert_allclose(found, convolved(patches, w, SAME), rtol=0, atol=1e-4)
