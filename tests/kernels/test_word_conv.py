"""Quantised convolutions against NumPy: any window, weight, zero point, dot product, threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from harness import run, thread_counts
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from image_harness import (
    Extent,
    apart,
    apply_epilogue,
    convolved,
    epilogues,
    from_planes,
    images,
    mask,
    phases_of,
    taps_of,
    to_planes,
    windows,
)
from low_precision import TILE_TARGETS
from test_conv_planes import FEW, IMAGE, POINTWISE, SAME
from word_images import (
    DENSE_DOTS,
    SPARSE_DOTS,
    from_word_planes,
    multiply_add,
    to_word_planes,
)

from sparse_tvm.operators import Bias, Layout, Residual
from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.words import arrays_of
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.planes import Border, Planes, Window
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.word_conv import DEPTHWISE, word_conv
from sparse_tvm.schedules.cpu.word_output import FloatOutput, WordOutput, plain_bytes
from sparse_tvm.schedules.cpu.word_planes import (
    exact_parts,
    padded_to,
    weight_words,
    word_planes,
)
from sparse_tvm.schedules.x86 import tile_weights
from sparse_tvm.schedules.x86.instructions import PlainTiles, saturated_bytes
from sparse_tvm.schedules.x86.tile_conv import tile_conv

STORED_TAPS = "stored taps"
"""Depthwise, and sparse."""

problems = st.fixed_dictionaries(
    {
        "image": images.map(lambda image: {**image, "channels": 3 * image["channels"]}),
        "window": st.one_of(st.just(POINTWISE), windows, apart),
        "n": st.integers(1, 20),
        "format": st.sampled_from(["dense", "csr", "bsr", DEPTHWISE, STORED_TAPS]),
        "rows": st.sampled_from([4, 8]),
        "sparsity": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "vectors": st.integers(1, 6),
        "rows_outermost": st.booleans(),
        "padded": st.booleans(),
        "zeros": st.tuples(st.integers(0, 255), st.integers(0, 255)),
        "epilogue": st.one_of(st.none(), epilogues),
        "dot": st.integers(0, 99),
        "threads": thread_counts,
    }
)


def check(
    image,
    window,
    n,
    format,
    rows,
    sparsity,
    vectors,
    rows_outermost,
    padded,
    zeros,
    epilogue,
    dot,
    threads,
):
    """Bytes come out where there is no epilogue, else float32."""
    dots = DENSE_DOTS if format in ("dense", DEPTHWISE) else SPARSE_DOTS
    (dot, target), (x_zero, y_zero) = dots[dot % len(dots)] if isinstance(dot, int) else dot, zeros
    tiles = not isinstance(dot, Dot)
    extent = Extent(image)
    assume(all(size > 0 for size in window.out_size(extent.numbers)))
    rng = np.random.default_rng(image["seed"])
    channels = image["channels"]
    depthwise = format in (DEPTHWISE, STORED_TAPS)
    format = "csr" if format == STORED_TAPS else format
    n = channels if depthwise else n
    x = rng.integers(0, 256, (image["batch"], channels, *extent.numbers), np.uint8)
    w = rng.integers(-128, 128, (n, (1 if depthwise else channels) * window.taps)).astype(np.int8)
    w[rng.random(w.shape) < sparsity] = 0
    block = (1, 4) if format == "csr" else (4, 4) if depthwise else (rows, 4)
    layout = Layout("test", "dense" if format == DEPTHWISE else format, block).having(
        vectors=vectors, rows_outermost=int(rows_outermost)
    )

    def planes(size):
        """Source and target, and what a residual is stored in."""
        reads, out = window.reads, window.out_size(size)
        gap = max(reads.gap, -window.wider, 1 - window.wider if padded else 0)
        same_pitch, aim = gap + window.wider, SAME.reads if padded else Border()
        return (
            Planes(*window.phase_size(size), reads.with_gap(gap)),
            Planes(*out, aim.with_gap(same_pitch)),
            Planes(*out, Border(same_pitch, front=(0, 20))),
        )

    source, wanted, like = planes(extent.symbols)
    source_here, there, like_here = planes(extent.numbers)
    unit = Simd(16, 32) if tiles else Simd(dot.lanes, dot.registers)

    plain = dot is PlainTiles or (not tiles and dot.name.startswith("plain"))
    pack = plain_bytes if plain else saturated_bytes

    def declare_output():
        if epilogue is None:
            return WordOutput(extent.batch, word_planes(n), wanted, unit, pack)
        residuals = [like] * epilogue.count(Residual())
        return FloatOutput(extent.batch, n, wanted, epilogue, residuals, unit)

    images_ = Images(
        extent.batch,
        word_planes(channels),
        word_planes(n) * 4,
        source,
        wanted,
        window,
        extent.names,
    )
    if tiles:
        kernel = tile_conv(images_, layout, declare_output, unit, dot())
        weight = tile_weights.image_tiles(weight_words(w, window.taps), window.taps, rows // 16)
    else:
        form = replace(layout, format=format)
        kernel = word_conv(
            images_, form, declare_output, unit, multiply_add(dot), halves=dot.halves
        )
        weight = arrays_of(w, layout, window.taps, dot, depthwise=depthwise)
    centred = x.astype("int32") - x_zero
    if depthwise:
        taps = np.stack(list(taps_of(centred, window)), axis=2)
        sums = np.einsum("bctyx,ct->bcyx", taps.astype("float64"), w)
    else:
        sums = convolved(centred, w, window)
    factor = (rng.random(n) * 2 / max(1.0, np.abs(sums).max() / 127)).astype("float32")
    y = sums * factor[None, :, None, None].astype("float64")
    offset = -x_zero * factor.astype("float64") * w.sum(axis=1, dtype="float64")
    phases = phases_of(centred.astype("float32"), window) + x_zero
    arrays = {
        "x": to_word_planes(_by_plane(phases.astype(np.uint8), channels), source_here, x_zero),
        **weight,
    }
    masks = [mask(there)] if padded else []
    of_rows = [padded_to(values.astype("float32"), 4) for values in (factor, offset)]
    if epilogue is not None:
        y, extras = apply_epilogue(y, epilogue, rng)
        extras = [e if e.ndim == 1 else to_planes(e, like_here) for e in extras]
        arguments = [*arrays.values(), *extent.sizes, *of_rows, *masks, *extras]
        shape = (image["batch"], n, there.size)
        stored = run(kernel, target, threads, arguments, shape)
        scale = max(1.0, float(np.abs(y).max()))
        np.testing.assert_allclose(from_planes(stored, there), y, rtol=0, atol=1e-3 * scale)
        if padded:
            whole = to_planes(from_planes(stored, there), there)
            np.testing.assert_array_equal(stored, whole)
        return
    of_rows[1] = padded_to((offset + y_zero).astype("float32"), 4)
    limits = np.array([3, 250, y_zero], np.float32)
    arguments = [*arrays.values(), *extent.sizes, *of_rows, *masks, limits]
    shape = (image["batch"], word_planes(n), there.size)
    stored = run(kernel, target, threads, arguments, shape, "int32")
    got = from_word_planes(stored, there, n)
    exact = np.clip(y + y_zero, 3, 250)
    assert np.abs(got - exact).max() <= 0.5 + 2e-3
    if padded:
        kept = mask(there)[: there.height * there.pitch].reshape(there.height, -1)
        assert (stored.view(np.uint8)[..., : 4 * there.first] == y_zero).all()
        behind = stored[..., there.first + kept.size : there.size]
        assert (behind.view(np.uint8) == y_zero).all()
        rows_ = stored[..., there.first : there.first + kept.size].reshape(*shape[:2], *kept.shape)
        gaps = np.ascontiguousarray(rows_[..., there.width :])
        assert (gaps.view(np.uint8) == y_zero).all()


def _by_plane(phases: np.ndarray, channels: int) -> np.ndarray:
    """Bytes ``[batch, channels * phases]`` with the four channels of a word together, by phase."""
    batch, _, height, width = phases.shape
    split = phases.reshape(batch, channels, -1, height, width)
    padded = np.pad(split, ((0, 0), (0, -channels % 4), (0, 0), (0, 0), (0, 0)))
    quads = padded.reshape(batch, -1, 4, split.shape[2], height, width).swapaxes(2, 3)
    return np.ascontiguousarray(quads).reshape(batch, -1, height, width)


PROBLEM = {
    "image": {**IMAGE, "channels": 10},
    "window": SAME,
    "n": 9,
    "format": "dense",
    "rows": 8,
    "sparsity": 0.5,
    "vectors": 3,
    "rows_outermost": False,
    "padded": True,
    "zeros": (7, 130),
    "epilogue": None,
    "dot": 0,
    "threads": 2,
}


@given(problems)
@example(PROBLEM)
@example({**PROBLEM, "format": DEPTHWISE, "window": Window((3, 3), (2, 2), pads=(1, 1, 1, 1))})
@example({**PROBLEM, "image": {**IMAGE, "channels": 6, "symbolic": True, "batch": 2}})
@example({**PROBLEM, "format": "csr", "epilogue": [Bias(), Residual()]})
@example({**PROBLEM, "window": Window(pads=(1, 2, 0, 0))})
@example({**PROBLEM, "window": Window(stride=(2, 2), pads=(0, 1, 0, 0)), "format": "dense"})
@settings(FEW)
def test_quantised_convolution(problem):
    check(**problem)


@given(
    problems,
    st.sampled_from(TILE_TARGETS),
    st.sampled_from([16, 32]),
    st.sampled_from([9, 48, 64, 70, 130]),
    st.sampled_from([7, 20, 40]),
)
@settings(FEW)
def test_on_tiles(problem, unit, rows, channels, n):
    image = {**problem["image"], "channels": channels}
    changed = {"image": image, "format": "dense", "dot": unit, "rows": rows, "n": n, "vectors": 2}
    check(**{**problem, **changed})


@pytest.mark.parametrize("unit", TILE_TARGETS, ids=[unit.__name__ for unit, _ in TILE_TARGETS])
@pytest.mark.parametrize(("channels", "n", "rows"), [(9, 40, 32), (70, 20, 32), (64, 7, 16)])
def test_every_unit(unit, channels, n, rows):
    image = {**IMAGE, "channels": channels}
    changed = {"image": image, "dot": unit, "rows": rows, "n": n, "vectors": 2}
    check(**{**PROBLEM, **changed})


@pytest.mark.parametrize("dot", DENSE_DOTS, ids=[dot.name for dot, _ in DENSE_DOTS])
@pytest.mark.parametrize("format", ["dense", DEPTHWISE])
def test_every_dense_dot_product(dot, format):
    check(**{**PROBLEM, "dot": dot, "format": format, "rows": 4})


@pytest.mark.parametrize("dot", SPARSE_DOTS, ids=[dot.name for dot, _ in SPARSE_DOTS])
@pytest.mark.parametrize("format", ["csr", "bsr", STORED_TAPS])
def test_every_sparse_dot_product(dot, format):
    check(**{**PROBLEM, "dot": dot, "format": format, "rows": 4})


def test_parts_of_words_are_exact():
    """Of all pairs of weights: no part's sum with bytes of 255 exceeds 16 bits."""
    every = np.arange(-128, 128, dtype=np.int8)
    pairs = np.stack(np.meshgrid(every, every), axis=-1).reshape(256, 256, 2)
    words = np.concatenate([pairs, pairs[::-1]], axis=-1).view(np.int32)[..., 0]
    parts = np.stack(exact_parts(words))[..., None].view(np.int8).astype(np.int64)
    assert (parts.sum(axis=0) == words[..., None].view(np.int8)).all()
    sums = 255 * parts.reshape(2, 256, 256, 2, 2).sum(axis=-1)
    assert sums.max() <= 32767
    assert sums.min() >= -32768
