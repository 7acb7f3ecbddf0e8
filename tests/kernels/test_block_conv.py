"""Convolutions whose taps are far apart, in blocks, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from harness import FORMS, KERNELS, run, simd, thread_counts
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from image_harness import POISON, convolved, to_planes

from sparse_tvm.operators import Activation, Bias, Layout
from sparse_tvm.schedules.cpu.block_arrays import split_arrays
from sparse_tvm.schedules.cpu.block_conv import block_conv
from sparse_tvm.schedules.cpu.blocks import Blocks, tap_major
from sparse_tvm.schedules.cpu.image_blocks import image_blocks
from sparse_tvm.schedules.cpu.planes import Border, Planes, Rows, Window

extents = st.integers(1, 33)
problems = st.fixed_dictionaries(
    {
        "size": st.tuples(extents, extents),
        "steps": st.tuples(st.integers(0, 2), st.integers(0, 2)),
        "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "dilation": st.tuples(st.integers(1, 13), st.integers(1, 13)),
        "channels": st.integers(1, 5),
        "n": st.integers(1, 20),
        "format": st.sampled_from(["dense", "csr", "bsr"]),
        "rows": st.sampled_from([1, 2, 4, 6]),
        "parts": st.sampled_from([1, 2]),
        "vectors": st.integers(1, 8),
        "packed": st.booleans(),
        "prefetch": st.booleans(),
        "sparsity": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "target": st.sampled_from(FORMS),
        "threads": thread_counts,
        "seed": st.integers(0, 2**16),
    }
)


def blocked(x: np.ndarray, blocks: Blocks) -> np.ndarray:
    """An image ``[batch, channels, height, width]`` in blocks."""
    out = np.zeros((*x.shape[:2], blocks.planes.size), "float32")
    for block in blocks.blocks.values():
        part = x[:, :, block.rows][..., block.columns].reshape(*x.shape[:2], -1)
        out[:, :, block.first : block.first + block.pixels] = part
    return out


def unblocked(stored: np.ndarray, blocks: Blocks) -> np.ndarray:
    """The image again."""
    out = np.full((*stored.shape[:2], blocks.height, blocks.width), np.nan, "float32")
    for block in blocks.blocks.values():
        part = stored[:, :, block.first : block.first + block.pixels]
        shape = (*stored.shape[:2], len(block.rows), len(block.columns))
        rows, columns = block.rows, block.columns
        out[:, :, rows.start : rows.stop, columns.start : columns.stop] = part.reshape(shape)
    return out


@settings(KERNELS)
@given(problem=problems)
def test_against_numpy(problem):
    kernel, dilation = problem["kernel"], problem["dilation"]
    before = [min(step, k - 1) for step, k in zip(problem["steps"], kernel, strict=True)]
    top, left = (s * d for s, d in zip(before, dilation, strict=True))
    bottom, right = ((k - 1 - s) * d for k, s, d in zip(kernel, before, dilation, strict=True))
    window = Window(kernel, (1, 1), dilation, (top, left, bottom, right))
    assert Blocks.suits(problem["size"], window)
    blocks, n, channels = Blocks(*problem["size"], window), problem["n"], problem["channels"]
    assume(len(blocks.blocks) < 60)
    rng = np.random.default_rng(problem["seed"])
    x = rng.standard_normal((2, channels, *problem["size"])).astype("float32")
    w = rng.standard_normal((n, channels * window.taps)).astype("float32")
    w *= rng.random(w.shape) >= problem["sparsity"]
    bias = rng.standard_normal(n).astype("float32")
    form = problem["format"]
    layout = Layout("test", form, (1 if form == "csr" else min(problem["rows"], n), 1)).having(
        parts=problem["parts"] * window.taps,
        vectors=problem["vectors"],
        packed=int(problem["packed"]),
        prefetch=int(problem["prefetch"]),
    )
    function = block_conv(
        2, channels, n, blocks, layout, [Bias(), Activation("relu")], simd(problem["target"])
    )
    arrays = split_arrays(tap_major(w, window.taps), layout).values()
    shape = (2, n, blocks.planes.size)
    stored = run(
        function, problem["target"], problem["threads"], [blocked(x, blocks), *arrays, bias], shape
    )
    y = np.maximum(convolved(x, w, window) + bias[None, :, None, None], 0)
    scale = max(1.0, float(np.abs(y).max()))
    np.testing.assert_allclose(unblocked(stored, blocks), y, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("target", FORMS, ids=[target.name for target in FORMS])
@pytest.mark.parametrize("size", [(20, 20), (13, 37), (9, 24)])
def test_there_and_back(size, target):
    window = Window((3, 3), (1, 1), (8, 12), (8, 12, 8, 12))
    blocks = Blocks(*size, window)
    x = np.random.default_rng(0).standard_normal((2, 3, *size)).astype("float32")
    for image in Planes(*size, Border(2, (1, 3), (0, 5))), Rows(*size):
        stored = to_planes(x, image, POISON) if isinstance(image, Planes) else x.reshape(2, 3, -1)
        there = image_blocks(2, 3, image, blocks, simd(target), back=False)
        found = run(there, target, 2, [stored], (2, 3, blocks.planes.size))
        pixels = blocked(np.ones_like(x), blocks) > 0
        np.testing.assert_array_equal(np.where(pixels, found, 0), blocked(x, blocks))
        if isinstance(image, Rows):
            continue
        back = image_blocks(2, 3, image, blocks, simd(target), back=True)
        again = run(back, target, 2, [found], stored.shape)
        np.testing.assert_array_equal(again, to_planes(x, image, 0.0))


def test_taps_that_see_nothing_are_left_out():
    blocks = Blocks(20, 20, Window((3, 3), (1, 1), (12, 12), (12,) * 4))
    assert [block.pixels for block in blocks.blocks.values()] == [
        64,
        32,
        64,
        32,
        16,
        32,
        64,
        32,
        64,
    ]
    assert [tap for tap, _ in blocks.seen((0, 0))] == [4, 5, 7, 8]
    assert [tap for tap, _ in blocks.seen((1, 1))] == [4]
    assert blocks.share == blocks.window.share_seen((20, 20)) == 0.36


def test_pads_of_half_a_step_do_not_suit():
    assert not Blocks.suits((20, 20), Window((3, 3), (1, 1), (12, 12), (6, 12, 18, 12)))
    assert not Blocks.suits((40, 40), Window((3, 3), (2, 2), (12, 12), (12,) * 4))
    assert not Blocks.suits((20, 20), Window((3, 3), (1, 1), (12, 12)))
