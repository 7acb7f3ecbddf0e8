"""Convolutions in planes against NumPy: any window, weight, epilogue, CPU and thread count."""

from __future__ import annotations

import numpy as np
import pytest
from harness import FORMS, KERNELS, run, simd, thread_counts
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
    to_planes,
    windows,
)

from sparse_tvm.operators import Activation, Bias, Layout, Residual
from sparse_tvm.schedules.cpu.block_arrays import split_arrays
from sparse_tvm.schedules.cpu.conv_planes import conv_planes
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.planes import Border, Planes, Window
from sparse_tvm.targets import TARGETS

POINTWISE = Window()
SAME = Window((3, 3), pads=(1, 1, 1, 1))
problems = st.fixed_dictionaries(
    {
        "image": images,
        "window": st.one_of(st.just(POINTWISE), windows, apart),
        "n": st.integers(1, 20),
        "format": st.sampled_from(["dense", "csr", "bsr"]),
        "rows": st.sampled_from([1, 2, 4, 6, 8, 16]),
        "parts": st.sampled_from([1, 1, 2, 3]),
        "sparsity": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "vectors": st.integers(1, 8),
        "rows_outermost": st.booleans(),
        "prefetch": st.booleans(),
        "packed": st.booleans(),
        "filled": st.booleans(),
        "padded": st.booleans(),
        "epilogue": epilogues,
        "target": st.sampled_from(FORMS),
        "threads": thread_counts,
    }
)


def check(
    image,
    window,
    n,
    format,
    rows,
    parts,
    sparsity,
    vectors,
    rows_outermost,
    prefetch,
    packed,
    filled,
    padded,
    epilogue,
    target,
    threads,
):
    extent = Extent(image)
    assume(all(size > 0 for size in window.out_size(extent.numbers)))
    x = extent.random(image["channels"])
    batch, channels = x.shape[:2]
    rng = np.random.default_rng(image["seed"])
    w = rng.standard_normal((n, channels * window.taps)).astype("float32")
    w *= rng.random(w.shape) >= sparsity
    layout = Layout("test", format, (1 if format == "csr" else min(rows, n), 1)).having(
        parts=parts,
        vectors=vectors,
        rows_outermost=int(rows_outermost),
        prefetch=int(prefetch),
        packed=int(packed),
        filled=int(filled),
    )
    together = simd(target).weights_together(layout) if filled else 1
    reads = window.reads
    gap = max(reads.gap, -window.wider, 1 - window.wider if padded else 0)
    aim = SAME.reads if padded else Border()

    def planes(size):
        """Source and target, and what a residual is stored in."""
        out = window.out_size(size)
        same_pitch = gap + window.wider
        return (
            Planes(*window.phase_size(size), reads.with_gap(gap)),
            Planes(*out, aim.with_gap(same_pitch)),
            Planes(*out, Border(same_pitch, front=(0, 20))),
        )

    source, wanted, like = planes(extent.symbols)
    source_here, there, like_here = planes(extent.numbers)
    kernel = conv_planes(
        Images(extent.batch, channels, n, source, wanted, window, extent.names),
        layout,
        epilogue,
        [like] * epilogue.count(Residual()),
        simd(target),
    )
    y = convolved(x, w, window)
    y, extras = apply_epilogue(y, epilogue, rng)
    arguments = [
        to_planes(phases_of(x, window), source_here),
        *split_arrays(w, layout, together).values(),
        *extent.sizes,
        *([mask(there)] if padded else []),
        *(extra if extra.ndim == 1 else to_planes(extra, like_here) for extra in extras),
    ]
    stored = run(kernel, target, threads, arguments, (batch, n, there.size))
    scale = max(1.0, float(np.abs(y).max()))
    np.testing.assert_allclose(from_planes(stored, there), y, rtol=0, atol=2e-5 * scale)
    if padded:
        whole = to_planes(from_planes(stored, there), there)
        np.testing.assert_array_equal(stored, whole)


IMAGE = {"batch": 1, "channels": 5, "height": 7, "width": 7, "gap": 0, "symbolic": False, "seed": 0}
PROBLEM = {
    "image": IMAGE,
    "window": SAME,
    "n": 9,
    "format": "csr",
    "rows": 1,
    "parts": 1,
    "sparsity": 0.5,
    "vectors": 4,
    "rows_outermost": False,
    "prefetch": False,
    "packed": False,
    "filled": False,
    "padded": True,
    "epilogue": [Bias(), Residual(), Activation("relu")],
    "target": TARGETS["x86-64-v2"],
    "threads": 2,
}


FEW = settings(KERNELS, max_examples=12)  # each compiles for seconds


@given(problems)
@example(PROBLEM)
@example({**PROBLEM, "format": "bsr", "rows": 4, "parts": 3, "rows_outermost": True})
@example({**PROBLEM, "image": {**IMAGE, "symbolic": True, "batch": 2}})
@example({**PROBLEM, "window": Window((3, 3), (2, 2), pads=(1, 1, 1, 1)), "format": "dense"})
@example({**PROBLEM, "format": "dense", "parts": 3})
@example({**PROBLEM, "format": "dense", "parts": 2, "rows_outermost": True})
@example({**PROBLEM, "window": Window(pads=(1, 2, 0, 0))})
@example({**PROBLEM, "window": POINTWISE, "packed": True, "parts": 2, "padded": False})
@example({**PROBLEM, "window": POINTWISE, "packed": True, "format": "dense", "rows": 4})
@example({**PROBLEM, "packed": True, "parts": 4, "target": TARGETS["x86-64-v3"]})
@example({**PROBLEM, "packed": True, "parts": 2, "format": "bsr", "rows": 4})
@example({**PROBLEM, "window": POINTWISE, "packed": True, "filled": True, "parts": 2})
@example({**PROBLEM, "filled": True, "sparsity": 1.0, "target": TARGETS["x86-64-v3"]})
@example({**PROBLEM, "window": Window(stride=(2, 2), pads=(0, 1, 0, 0)), "format": "dense"})
@FEW
def test_convolution(problem):
    check(**problem)


@pytest.mark.parametrize("format", ["dense", "csr"])
@pytest.mark.parametrize("rows_outermost", [False, True])
@pytest.mark.parametrize(
    ("dilation", "pads"), [(4, (4, 4, 4, 4)), (6, (6, 2, 3, 6)), (9, (9,) * 4)]
)
def test_taps_far_apart(format, rows_outermost, dilation, pads):
    image = {**IMAGE, "height": 12, "width": 11, "batch": 2}
    window = Window((3, 3), dilation=(dilation, dilation), pads=pads, apart=True)
    problem = {**PROBLEM, "image": image, "window": window, "rows_outermost": rows_outermost}
    check(**{**problem, "format": format, "rows": 4, "vectors": 3})


@pytest.mark.parametrize("window", [POINTWISE, SAME, Window((3, 3), (2, 2), pads=(1, 1, 1, 1))])
@pytest.mark.parametrize("vectors", [1, 3, 4, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_weights_loaded_together(window, vectors, packed):
    image = {**IMAGE, "channels": 150, "height": 8, "width": 9}
    problem = {**PROBLEM, "image": image, "window": window, "n": 12, "sparsity": 0.9, "parts": 2}
    check(**{**problem, "vectors": vectors, "packed": packed, "target": TARGETS["x86-64-v3"]})


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("vectors", [1, 4, 8])
def test_filled_rows(target, parts, vectors):
    image = {**IMAGE, "channels": 150, "height": 8, "width": 9}
    problem = {**PROBLEM, "image": image, "window": POINTWISE, "n": 12, "sparsity": 0.9}
    blocking = {"parts": parts, "vectors": vectors, "packed": True, "filled": True}
    check(**{**problem, **blocking, "target": target})


@pytest.mark.parametrize("format", ["dense", "csr", "bsr"])
@pytest.mark.parametrize("size", [1, 7, 14, 28, 57])
def test_square_images(format, size):
    image = {**IMAGE, "height": size, "width": size}
    check(**{**PROBLEM, "image": image, "format": format, "rows": 4, "vectors": 8})


@pytest.mark.parametrize(
    ("channels", "size", "asks"), [(64, 56, True), (64, 14, False), (16, 56, False)]
)
def test_sparse_rows_ask_for_far_outputs_unless_they_are_short(channels, size, asks):
    planes = Planes(size, size, Border(1))
    images = Images(1, channels, 128, planes, planes, Window())
    layout = Layout("test", "csr").having(vectors=8)
    assert (
        "llvm.prefetch" in conv_planes(images, layout, [], [], simd(TARGETS["x86-64-v4"])).script()
    ) == asks
