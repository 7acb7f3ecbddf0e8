"""The matmul family against NumPy: any shape, sparsity, block, epilogue, CPU and thread count."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from harness import (
    FORMS,
    PER_FORM,
    PORTABLE,
    ROUNDED,
    RUNNABLE,
    compiled,
    every_form,
    from_tiles,
    run,
    simd,
    thread_counts,
    tiles_for,
    to_tiles,
)
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_tvm.operators import Activation, Bias, Gate, Layout, Residual
from sparse_tvm.schedules.cpu.block_arrays import block_diagonal, split_arrays
from sparse_tvm.schedules.cpu.matmul import matmul

ACTIVATIONS = {
    "relu": lambda y: np.maximum(y, 0),
    "gelu": lambda y: 0.5 * y * (1 + np.vectorize(math.erf)(y * math.sqrt(0.5))),
    "gelu_tanh": lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
    "tanh": np.tanh,
    "sigmoid": lambda y: 1 / (1 + np.exp(-y)),
    "silu": lambda y: y / (1 + np.exp(-y)),
    "hard_sigmoid": lambda y: np.clip(y / 6 + 0.5, 0, 1),
    "hard_swish": lambda y: y * np.clip(y / 6 + 0.5, 0, 1),
}
STEPS = [Bias(), Residual(), Gate(), *map(Activation, ACTIVATIONS)]

extents = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 33]), st.integers(1, 70))
problems = st.fixed_dictionaries(
    {
        "lead": st.integers(1, 3),
        "rows": extents,
        "n": extents,
        "k": extents,
        "sparsity": st.sampled_from([0.0, 0.5, 0.9, 0.98, 1.0]),
        "empty_rows": st.booleans(),
        "block": st.tuples(st.integers(1, 16), st.integers(1, 8)),
        "parts": st.sampled_from([1, 1, 2, 3, 5]),
        "packed": st.sampled_from([0, 1]),
        "ask": st.sampled_from([0, 1, 4]),
        "stored": st.sampled_from(["float32", "float16", "bfloat16"]),
        "epilogue": st.lists(st.sampled_from(STEPS), max_size=4),
        "symbolic": st.booleans(),
        "threads": thread_counts,
        "seed": st.integers(0, 2**16),
    }
)


def check(
    format,
    lead,
    rows,
    n,
    k,
    sparsity,
    empty_rows,
    block,
    parts,
    packed,
    ask,
    stored,
    epilogue,
    symbolic,
    target,
    threads,
    seed,
    groups=1,
    sell=False,
):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, k)) * (rng.random((n, k)) >= sparsity)
    if empty_rows:
        w[rng.random(n) < 0.5] = 0
    w = ROUNDED[stored](w.astype("float32"))
    x = rng.standard_normal((lead, rows, k * groups)).astype("float32")
    extras = [
        rng.standard_normal(n if step == Bias() else (lead, rows, n)).astype("float32")
        for step in epilogue
        if step.operand
    ]

    block_rows, columns = min(block[0], n), min(block[1], k)
    blocks = {"dense": (block_rows, 1), "csr": (1, 1), "bsr": (block_rows, columns)}
    layout = Layout("matmul", format, blocks[format]).having(parts=parts, packed=packed, ask=ask)
    layout = layout if stored == "float32" else layout.having(**{stored: 1})
    layout = layout.having(sell=simd(target).lanes) if sell else layout
    tiles = tiles_for(lead, rows, symbolic)
    known = None if symbolic else rows
    kernel = matmul(tiles, known, n, k * groups, layout, epilogue, simd(target), groups)
    whole = block_diagonal(w, groups)
    arguments = [
        to_tiles(x),
        *split_arrays(
            whole if layout.sparse else w,
            layout,
            simd(target).weights_together(layout),
            simd(target).rows_abreast(layout),
        ).values(),
        *(extra if extra.ndim == 1 else to_tiles(extra) for extra in extras),
        *([rows] if symbolic else []),
    ]
    tiled = run(kernel, target, threads, arguments, (lead, -(-rows // 16), n, 16))

    expected = x.astype("float64") @ whole.T.astype("float64")
    operands = iter(extras)
    for step in epilogue:
        if step == Gate():
            expected = expected * next(operands)
        elif step.operand:
            expected = expected + next(operands)
        else:
            expected = ACTIVATIONS[step.function](expected)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(from_tiles(tiled, rows), expected, rtol=0, atol=2e-5 * scale)


SMALLEST = {
    "lead": 1,
    "rows": 1,
    "n": 1,
    "k": 1,
    "sparsity": 0.0,
    "empty_rows": False,
    "block": (1, 1),
    "parts": 1,
    "packed": 0,
    "ask": 0,
    "stored": "float32",
    "epilogue": [],
    "symbolic": False,
    "threads": 1,
    "seed": 0,
}
ALL_ZERO = {
    **SMALLEST,
    "rows": 19,
    "n": 13,
    "k": 9,
    "sparsity": 1.0,
    "epilogue": [Bias(), Activation("relu")],
}
EVERY_STEP = {**SMALLEST, "rows": 70, "n": 17, "k": 33, "epilogue": STEPS, "threads": 2}


@given(problem=problems)
@example(problem=SMALLEST)
@example(problem=EVERY_STEP)
@example(problem={**EVERY_STEP, "block": (16, 1), "parts": 3})
@example(problem={**EVERY_STEP, "block": (12, 1), "stored": "float16"})
@PER_FORM
@every_form
def test_dense(target, problem):
    check("dense", target=target, **problem)


@given(problem=problems)
@example(problem=ALL_ZERO)
@example(problem={**ALL_ZERO, "parts": 5})
@example(problem={**EVERY_STEP, "sparsity": 0.5, "parts": 3})
@example(problem={**EVERY_STEP, "sparsity": 0.5, "parts": 3, "stored": "bfloat16"})
@PER_FORM
@every_form
def test_csr(target, problem):
    check("csr", target=target, **problem)


@given(problem=problems, rows=st.sampled_from([1, 2, 3, 40]), more=st.integers(0, 50))
@example(problem=ALL_ZERO, rows=1, more=9)
@example(problem={**EVERY_STEP, "sparsity": 0.5}, rows=2, more=0)
@example(problem={**EVERY_STEP, "sparsity": 0.5, "stored": "float16"}, rows=1, more=7)
@PER_FORM
@every_form
def test_csr_and_sliced_rows(target, problem, rows, more):
    problem = {**problem, "rows": rows, "k": simd(target).lanes + more}
    check("csr", target=target, sell=True, **problem)


@given(problem=problems)
@example(problem={**ALL_ZERO, "block": (4, 3)})
@example(problem={**EVERY_STEP, "sparsity": 0.5, "block": (16, 3), "stored": "bfloat16"})
@example(problem={**SMALLEST, "rows": 40, "n": 18, "k": 10, "block": (4, 4), "symbolic": True})
@PER_FORM
@every_form
def test_bsr(target, problem):
    check("bsr", target=target, **problem)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 16, 17, 63, 64, 65, 130])
def test_one_symbolic_kernel_serves_any_number_of_rows(rows):
    problem = {**SMALLEST, "lead": 2, "rows": rows, "n": 12, "k": 9, "sparsity": 0.5}
    check("bsr", target=PORTABLE, **{**problem, "block": (4, 1), "symbolic": True, "threads": 2})


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("block", [(1, 1), (2, 1), (4, 1), (8, 1)])
def test_few_rows_fill_vectors_with_small_blocks(block, rows, parts):
    """On AVX2 four weights at a time, whose rest a block row's end leaves."""
    target = min(FORMS, key=lambda target: abs(simd(target).lanes - 8))
    problem = {**SMALLEST, "rows": rows, "n": 37, "k": 51, "sparsity": 0.7, "epilogue": STEPS[:3]}
    problem |= {"block": block, "parts": parts, "threads": 2, "seed": rows}
    check("csr" if block == (1, 1) else "bsr", target=target, **problem)


@pytest.mark.parametrize(("rows", "symbolic"), [(3, True), (37, False)])
@pytest.mark.parametrize(
    ("format", "block", "parts"), [("dense", 4, 1), ("dense", 16, 3), ("csr", 1, 1), ("bsr", 4, 1)]
)
@every_form
def test_groups_multiply_inputs_of_their_own(target, format, block, parts, symbolic, rows):
    problem = {**EVERY_STEP, "rows": rows, "n": 48, "k": 13, "block": (block, 1), "parts": parts}
    problem |= {"symbolic": symbolic, "epilogue": [Bias(), Residual()]}
    check(format, target=target, groups=3, **{**problem, "sparsity": 0.6})


def test_a_dense_kernel_takes_about_as_long_to_compile_as_a_sparse_one():
    """Rows go back to their tiles in a loop: written out, LLVM takes ten times as long."""
    target, seconds = RUNNABLE[0], []
    for layout in (Layout("matmul", "csr", (1, 1)), Layout("matmul", "dense", (16, 1))):
        kernel = matmul(tiles_for(2, 16, True), None, 64, 64, layout, [], simd(target))
        began = time.process_time()
        compiled(kernel, target)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 4 * seconds[0]
