"""Convolutions with output channels in lanes against NumPy: any window, size and epilogue."""

from __future__ import annotations

import numpy as np
import pytest
from harness import KERNELS, RUNNABLE, run, simd, thread_counts
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from image_harness import (
    apply_epilogue,
    convolved,
    epilogues,
    from_planes,
    mask,
    to_planes,
    windows,
)

from sparse_tvm.operators import Activation, Bias, Layout, Residual
from sparse_tvm.schedules.cpu.block_arrays import block_diagonal, split_arrays
from sparse_tvm.schedules.cpu.conv_lanes import conv_lanes
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.lane_tiles import symbol
from sparse_tvm.schedules.cpu.pixel_runs import MOST_PIXELS, PixelRuns
from sparse_tvm.schedules.cpu.planes import Border, Planes, Window
from sparse_tvm.schedules.cpu.simd import LANES

WIDE = [target for target in RUNNABLE if simd(target).lanes == LANES]
needs_wide_vectors = pytest.mark.skipif(not WIDE, reason="a CPU without vectors of 16 lanes")

POINTWISE = Window()
SAME = Window((3, 3), pads=(1, 1, 1, 1))
problems = st.fixed_dictionaries(
    {
        "size": st.tuples(st.integers(1, 20), st.integers(1, 30)),
        "channels": st.integers(1, 9),
        "window": st.one_of(st.just(POINTWISE), windows),
        "n": st.integers(1, 70),
        "vectors": st.sampled_from(sorted(MOST_PIXELS)),
        "gap": st.integers(0, 3),
        "padded": st.booleans(),
        "groups": st.sampled_from([1, 1, 2, 3]),
        "epilogue": epilogues,
        "threads": thread_counts,
    }
)
PROBLEM = {
    "size": (7, 7),
    "channels": 5,
    "window": POINTWISE,
    "n": 40,
    "vectors": 2,
    "gap": 1,
    "padded": True,
    "groups": 1,
    "epilogue": [Bias(), Residual(), Activation("relu")],
    "threads": 2,
}
FEW = settings(KERNELS, max_examples=12)  # each compiles for seconds


def check(size, channels, window, n, vectors, gap, padded, groups, epilogue, threads):
    out, batch = window.out_size(size), 2
    if groups > 1:  # blocks are of one group
        n, channels = groups * vectors * LANES, groups * channels
    assume(min(out) > 0)
    reads = window.pixel_reads
    source = Planes(*size, reads.with_gap(reads.gap + gap % 2))
    gap = max(gap, int(padded))
    there = Planes(*out, (SAME.reads if padded else Border()).with_gap(gap))
    like = Planes(*out, Border(gap, front=(0, 20)))
    assume(PixelRuns(*out, there.pitch, MOST_PIXELS[vectors]).suits)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, channels, *size)).astype("float32")
    w = rng.standard_normal((n, channels // groups * window.taps)).astype("float32")
    layout = Layout("test", "dense", (LANES * vectors, 1))
    target = WIDE[0]
    kernel = conv_lanes(
        Images(symbol("batch"), channels, n, source, there, window),
        layout,
        epilogue,
        [like] * epilogue.count(Residual()),
        simd(target),
        groups,
    )
    y, extras = apply_epilogue(convolved(x, block_diagonal(w, groups), window), epilogue, rng)
    arguments = [
        to_planes(x, source),
        *split_arrays(w, layout).values(),
        *([mask(there)] if padded else []),
        *(extra if extra.ndim == 1 else to_planes(extra, like) for extra in extras),
    ]
    stored = run(kernel, target, threads, arguments, (batch, n, there.size))
    scale = max(1.0, float(np.abs(y).max()))
    np.testing.assert_allclose(from_planes(stored, there), y, rtol=0, atol=2e-5 * scale)
    if padded:
        np.testing.assert_array_equal(stored, to_planes(from_planes(stored, there), there))


@needs_wide_vectors
@given(problems)
@example(PROBLEM)
@example({**PROBLEM, "gap": 2, "vectors": 3, "n": 50})
@example({**PROBLEM, "size": (14, 14), "window": SAME})
@example({**PROBLEM, "size": (14, 14), "window": SAME, "groups": 3, "vectors": 1})
@example({**PROBLEM, "size": (28, 28), "window": Window((3, 3), (2, 2), pads=(1, 1, 1, 1))})
@example({**PROBLEM, "size": (5, 28), "gap": 3, "padded": False})
@example({**PROBLEM, "size": (3, 35), "gap": 14})
@FEW
def test_convolution(problem):
    check(**problem)


@pytest.mark.parametrize("most", MOST_PIXELS.values())
@pytest.mark.parametrize("gap", range(4))
def test_runs_have_every_pixel(most, gap):
    for width in range(1, 64):
        runs = PixelRuns(9, width, width + gap, most)
        if not runs.suits:
            continue
        seen = set()
        for run_ in range(runs.count):
            last = runs.rest and run_ == runs.count - 1
            pixels = runs.pixels(runs.rest if last else runs.together)
            offsets = [row * runs.pitch + column for row, column in pixels]
            assert len(offsets) <= most
            assert max(offsets) < LANES
            assert runs.start(run_) + LANES <= Planes(9, width, Border(gap)).room
            seen |= {runs.start(run_) + offset for offset in offsets}
        assert seen == {row * (width + gap) + i for row in range(9) for i in range(width)}
