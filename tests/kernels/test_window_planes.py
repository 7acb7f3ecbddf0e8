"""Depthwise convolutions, dense and sparse, and pooling in planes against NumPy: any window, CPU,
thread count."""

from __future__ import annotations

import numpy as np
import pytest
from harness import FORMS, KERNELS, run, simd, thread_counts
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from image_harness import (
    Extent,
    apply_epilogue,
    epilogues,
    from_planes,
    images,
    mask,
    taps_of,
    to_planes,
    windows,
)

from sparse_tvm.operators import Activation, Bias, Residual
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.planes import Border, Planes, Window
from sparse_tvm.schedules.cpu.sparse_windows import sparse_window_planes
from sparse_tvm.schedules.cpu.window_planes import window_planes
from sparse_tvm.schedules.cpu.windows import DEPTHWISE, MAX, MEAN, reads_in_place, stored_taps
from sparse_tvm.targets import TARGETS

SAME = Window((3, 3), pads=(1, 1, 1, 1))
square = st.sampled_from(
    [Window((k, k), (s, s), pads=(k // 2,) * 4) for k in (3, 5, 7) for s in (1, 2)]
)
problems = st.fixed_dictionaries(
    {
        "image": images,
        "window": st.one_of(square, windows),
        "operation": st.sampled_from([DEPTHWISE, MAX, MEAN]),
        "density": st.sampled_from([None, 0.0, 0.1, 0.3, 1.0]),
        "multiplier": st.integers(1, 2),
        "padded": st.booleans(),
        "epilogue": epilogues,
        "target": st.sampled_from(FORMS),
        "threads": thread_counts,
    }
)


def check(image, window, operation, density, multiplier, padded, epilogue, target, threads):
    """``density`` is the share of taps that are stored, None for a kernel that stores all."""
    extent = Extent(image)
    sparse = density is not None and operation is DEPTHWISE
    if not operation.weighted:
        multiplier = 1
    assume(all(size > 0 for size in window.out_size(extent.numbers)))
    x = np.abs(extent.random(image["channels"]))  # so that padding with zeros is what max wants
    batch, channels = x.shape[:2]
    if operation is MAX:  # of no pixels is whatever the padding holds
        assume(np.all(sum(taps_of(np.ones_like(x), window)) > 0))
    n = channels * multiplier
    rng = np.random.default_rng(image["seed"])

    reads, aim = reads_in_place(window), SAME.reads if padded else Border()
    gap = max(reads.gap, 1 + image["gap"])
    if not window.strided:
        gap = max(gap, 1 - window.wider)

    def planes(size):
        out = window.out_size(size)
        out_gap = 1 if window.strided else gap + window.wider
        return (
            Planes(*size, reads.with_gap(gap)),
            Planes(*out, aim.with_gap(out_gap)),
            Planes(*out, Border(out_gap, front=(0, 20))),
        )

    source, wanted, like = planes(extent.symbols)
    source_here, there, like_here = planes(extent.numbers)
    of = Images(extent.batch, channels, n, source, wanted, window, extent.names)
    after = (epilogue, [like] * epilogue.count(Residual()), simd(target))
    kernel = sparse_window_planes(of, *after) if sparse else window_planes(of, operation, *after)
    taps = np.stack(list(taps_of(x, window)), axis=2).astype("float64")
    if operation is DEPTHWISE:
        w = rng.standard_normal((n, window.taps)).astype("float32")
        w *= rng.random(w.shape) < (density if sparse else 1.0)
        weight = list(stored_taps(w, window).values()) if sparse else [w]
        y = np.einsum("bckyx,ck->bcyx", np.repeat(taps, multiplier, axis=1), w)
    else:
        y = taps.max(axis=2) if operation is MAX else taps.mean(axis=2)
    y, extras = apply_epilogue(y, epilogue, rng)
    arguments = [
        to_planes(x, source_here),
        *(weight if operation is DEPTHWISE else []),
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


IMAGE = {"batch": 1, "channels": 3, "height": 9, "width": 7, "gap": 0, "symbolic": False, "seed": 0}
PROBLEM = {
    "image": IMAGE,
    "window": SAME,
    "operation": DEPTHWISE,
    "density": None,
    "multiplier": 1,
    "padded": False,
    "epilogue": [Bias(), Residual(), Activation("relu")],
    "target": TARGETS["x86-64-v2"],
    "threads": 2,
}
DOWN = Window((3, 3), (2, 2), pads=(1, 1, 1, 1))


FEW = settings(KERNELS, max_examples=12)  # each compiles for seconds


@given(problems)
@example(PROBLEM)
@example({**PROBLEM, "padded": True, "image": {**IMAGE, "symbolic": True, "batch": 2}})
@example({**PROBLEM, "window": DOWN, "padded": True, "operation": MAX})
@FEW
def test_window(problem):
    check(**problem)


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("window", [SAME, DOWN])
@pytest.mark.parametrize("size", [1, 7, 14, 28, 57])
def test_square_images(window, size, density):
    image = {**IMAGE, "height": size, "width": size}
    check(**{**PROBLEM, "image": image, "window": window, "density": density, "padded": True})


@pytest.mark.parametrize("target", FORMS, ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("window", "size", "symbolic"),
    [
        (SAME, 13, False),
        (DOWN, 30, False),
        (DOWN, 30, True),
        (Window((5, 5), (2, 2), pads=(2, 2, 2, 2)), 137, False),
        (Window((3, 3), (2, 1), pads=(1, 1, 1, 1)), 9, False),
        (Window((3, 2), (1, 3), dilation=(2, 2)), 17, False),
    ],
)
def test_few_taps(window, size, symbolic, target):
    image = {**IMAGE, "channels": 5, "height": size, "width": size, "symbolic": symbolic}
    few = {"image": image, "window": window, "density": 0.3, "padded": True, "target": target}
    check(**{**PROBLEM, **few})
