"""Images in planes to lane tiles and back against NumPy: any extents, gaps and borders."""

from __future__ import annotations

import numpy as np
from harness import FORMS, KERNELS, from_tiles, run, simd, thread_counts, to_tiles
from hypothesis import given
from hypothesis import strategies as st
from image_harness import Extent, images, to_planes

from sparse_tvm.schedules.cpu.image_tiles import image_to_tiles, tiles_to_image
from sparse_tvm.schedules.cpu.planes import Border, Planes

channel_counts = st.sampled_from([1, 3, 8, 12, 33, 64])
borders = st.builds(
    Border,
    front=st.sampled_from([(0, 0), (1, 0), (3, 16)]),
    tail=st.sampled_from([(0, 0), (3, 16)]),
    padded=st.just(True),
)


def tokens_of(image: np.ndarray) -> np.ndarray:
    """``[batch, channels, height, width]`` as ``[batch, pixels, channels]``."""
    batch, channels, *_ = image.shape
    return image.reshape(batch, channels, -1).swapaxes(1, 2)


@given(images, channel_counts, borders, st.sampled_from(FORMS), thread_counts)
@KERNELS
def test_image_to_tiles(image, channels, border, target, threads):
    extent, border = Extent(image), border.with_gap(image["gap"])
    x = extent.random(channels)
    source, here = (Planes(*size, border) for size in (extent.symbols, extent.numbers))
    kernel = image_to_tiles(extent.batch, channels, source, extent.names, simd(target))
    expected = np.nan_to_num(to_tiles(tokens_of(x)))
    y = run(kernel, target, threads, [to_planes(x, here), *extent.sizes], expected.shape)
    np.testing.assert_array_equal(y, expected)


@given(images, channel_counts, borders, st.sampled_from(FORMS), thread_counts)
@KERNELS
def test_tiles_to_image(image, channels, border, target, threads):
    extent, border = Extent(image), border.with_gap(image["gap"])
    x = extent.random(channels)
    wanted, there = (Planes(*size, border) for size in (extent.symbols, extent.numbers))
    kernel = tiles_to_image(extent.batch, channels, wanted, extent.names, simd(target))
    tiles = to_tiles(tokens_of(x))
    np.testing.assert_array_equal(from_tiles(tiles, tokens_of(x).shape[1]), tokens_of(x))
    out_shape = (*x.shape[:2], there.size)
    y = run(kernel, target, threads, [tiles, *extent.sizes], out_shape)
    np.testing.assert_array_equal(y, to_planes(x, there, border=0))
