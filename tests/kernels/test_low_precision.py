"""Low-precision kernels against NumPy: shapes, tails, sparsity, scales, instructions, threads."""

from __future__ import annotations

import numpy as np
import pytest
from harness import FORMS as TARGETS
from harness import KERNELS, from_tiles, run, simd, thread_counts, tiles_for, to_tiles
from hypothesis import example, given, settings
from hypothesis import strategies as st
from low_precision import (
    CODE,
    DOT_TARGETS,
    MULTIPLY_ADD,
    TILE_TARGETS,
    from_lines,
    precisions,
    rounded,
    simd_of,
    to_lines,
)
from test_matmul import ACTIVATIONS

from sparse_tvm.operators import Activation, Bias, Residual
from sparse_tvm.schedules.cpu import word_weights
from sparse_tvm.schedules.cpu.bf16_dot import with_code
from sparse_tvm.schedules.cpu.dot_matmul import dot_matmul
from sparse_tvm.schedules.cpu.low_matmul import LowMatmul
from sparse_tvm.schedules.cpu.low_precision import quantise, quantise_by_steps
from sparse_tvm.schedules.cpu.precision import BF16, INT8
from sparse_tvm.schedules.x86 import tile_weights
from sparse_tvm.schedules.x86.tile_matmul import FORMS, TileLayout, tile_matmul
from sparse_tvm.sparsity.quantise import as_words, bf16_values, round_to_bf16

FEW = settings(KERNELS, max_examples=10)
STEPS = [Bias(), Residual(), Activation("relu"), Activation("gelu")]
extents = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 33, 64]), st.integers(1, 150))
problems = {
    "lead": st.integers(1, 2),
    "rows": st.one_of(st.sampled_from([1, 16, 17, 33, 128]), st.integers(1, 150)),
    "n": extents,
    "k": extents,
    "sparsity": st.sampled_from([0.0, 0.5, 0.9, 0.98, 1.0]),
    "epilogue": st.lists(st.sampled_from(STEPS), max_size=3),
    "out": st.sampled_from([None, None, INT8, BF16]),
    "magnitude": st.sampled_from([1e-6, 1.0, 1e4]),
    "symbolic": st.booleans(),
    "threads": thread_counts,
    "seed": st.integers(0, 2**16),
}


class Case:
    """A layer with random numbers, and what it must compute."""

    def __init__(self, precision, lead, rows, n, k, sparsity, epilogue, out, magnitude, seed):
        rng = np.random.default_rng(seed)
        self.precision, self.epilogue, self.out = precision, tuple(epilogue), out
        self.lead, self.rows, self.n, self.k = lead, rows, n, k
        x = rng.standard_normal((lead, rows, k)) * rng.uniform(0.1, 3, (lead, rows, 1))
        self.x = (x * magnitude).astype("float32")
        w = rng.standard_normal((n, k)) * (rng.random((n, k)) >= sparsity)
        self.w = w.astype("float32")
        self.extras = [
            rng.standard_normal(n if step == Bias() else (lead, rows, n)).astype("float32")
            for step in self.epilogue
            if step.operand
        ]

    def problem(self, symbolic):
        tiles = tiles_for(self.lead, self.rows, symbolic)
        rows = None if symbolic else self.rows
        return LowMatmul(tiles, self.n, self.k, self.precision, self.epilogue, self.out, rows)

    def check(self, kernel, weight, elements, of_rows, target, threads, counts=()):
        zero_point = simd(target).zero_point
        arguments = [
            to_lines(self.x, self.precision, zero_point),
            *weight.values(),
            *of_rows.values(),
            *(extra if extra.ndim == 1 else to_tiles(extra) for extra in self.extras),
            *counts,
        ]
        tiles = -(-self.rows // 16)
        if self.out is None:
            tiled = run(kernel, target, threads, arguments, (self.lead, tiles, self.n, 16))
            result = from_tiles(tiled, self.rows)
        else:
            shape = (self.lead, tiles, self.out.lines(self.n), 16)
            lines = run(kernel, target, threads, arguments, shape, "int32")
            result = from_lines(lines, self.rows, self.n, self.out, zero_point)
        self.compare(result, elements, of_rows)

    def compare(self, result, elements, of_rows):
        if self.precision is INT8:
            w = elements * of_rows["scale"][:, None].astype("float64")
        else:
            w = bf16_values(elements)
        expected = rounded(self.x, self.precision).astype("float64") @ w.T.astype("float64")
        extras, largest = iter(self.extras), np.abs(expected)
        for step in self.epilogue:
            if step.operand:
                expected = expected + next(extras)
            else:
                expected = ACTIVATIONS[step.function](expected)
            largest = np.maximum(largest, np.abs(expected))
        # int8 outputs wait in bf16.
        quantum = {None: 0.0, INT8: 0.51 / 127 + 2.0**-8, BF16: 2.0**-8}[self.out]
        allowed = np.abs(expected).max(axis=-1, keepdims=True) * quantum
        rough = 3e-5 if self.out is None else 3e-4
        allowed = allowed + rough * largest.max(axis=-1, keepdims=True)
        error = np.abs(result - expected)
        assert (error <= allowed).all(), f"off by {(error / allowed).max():.2f} of what is allowed"


def case_of(precision, values):
    names = ("lead", "rows", "n", "k", "sparsity", "epilogue", "out", "magnitude", "seed")
    return Case(precision, *(values[name] for name in names))


SMALLEST = {
    "lead": 1,
    "rows": 1,
    "n": 1,
    "k": 1,
    "sparsity": 0.0,
    "epilogue": [],
    "out": None,
    "magnitude": 1.0,
    "symbolic": False,
    "threads": 1,
    "seed": 0,
}
LARGER = {
    **SMALLEST,
    "lead": 2,
    "rows": 130,
    "n": 150,
    "k": 900,
    "epilogue": [STEPS[0], STEPS[3], STEPS[1]],
    "threads": 2,
    "symbolic": True,
}


def problems_with(**more):
    return st.fixed_dictionaries({**problems, **more})


dots = problems_with(
    rows_of_block=st.sampled_from([1, 2, 4, 6]),
    sparse=st.booleans(),
    native=st.sampled_from(DOT_TARGETS),
)


@given(dots)
@example({**LARGER, "sparsity": 0.9, "rows_of_block": 4, "sparse": True, "native": DOT_TARGETS[-1]})
@FEW
def test_dot(values):
    check_dot(values)


def check_dot(values):
    dot, target = values["native"]
    case = case_of(dot.precision, values)
    rows = min(values["rows_of_block"], case.n)
    rows += rows % dot.depth  # of pairs
    elements, of_rows = rounded_for(dot, target, case.w)
    pack = word_weights.sparse_rows if values["sparse"] else word_weights.dense_rows
    kernel = dot_kernel(dot, target, case.problem(values["symbolic"]), rows, values["sparse"])
    weight = pack(as_words(elements), rows, dot.depth)
    counts = [case.rows] if values["symbolic"] else []
    case.check(kernel, weight, elements, of_rows, target, values["threads"], counts)


@pytest.mark.parametrize("native", DOT_TARGETS, ids=[dot.name for dot, _ in DOT_TARGETS])
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 9])
def test_dot_of_few_rows(rows, symbolic, native):
    """Up to a vector's lanes, one vector of each tile is computed."""
    few = {"rows": rows, "symbolic": symbolic, "native": native, "rows_of_block": 4, "n": 30}
    for sparse, out in ((False, None), (True, INT8)):
        check_dot({**LARGER, **few, "k": 90, "sparse": sparse, "sparsity": 0.8, "out": out})


def dot_kernel(dot, target, problem, rows, sparse):
    unit, multiply_add = simd_of(dot, target), MULTIPLY_ADD[dot.name]
    kernel = dot_matmul(problem, rows, sparse, unit, multiply_add, depth=dot.depth)
    return with_code(kernel, CODE.get(dot.name))


def rounded_for(dot, target, w):
    zero_point = 0 if dot.signed else simd(target).zero_point
    return word_weights.rounded(w, dot.precision, dot.largest_weight, zero_point)


def pack_tiles(elements, layout):
    if layout.form == "expand":
        return tile_weights.expanded_tiles(elements, layout.height)
    pack = {
        "dense": tile_weights.dense_tiles,
        "skip": tile_weights.skipped_tiles,
        "gather": tile_weights.gathered_tiles,
    }[layout.form]
    return pack(as_words(elements), layout.height)


tile_problems = problems_with(
    precision=precisions,
    form=st.sampled_from(FORMS),
    height=st.sampled_from([1, 2]),
    native=st.sampled_from(TILE_TARGETS),
)


def check_tiles(values):
    case = case_of(values["precision"], values)
    unit, target = values["native"]
    layout = TileLayout(values["form"], values["height"])
    elements, of_rows = word_weights.rounded(case.w, case.precision)
    kernel = tile_matmul(case.problem(values["symbolic"]), layout, simd(target), unit())
    case.check(kernel, pack_tiles(elements, layout), elements, of_rows, target, values["threads"])


@given(tile_problems)
@FEW
def test_tiles(values):
    check_tiles(values)


@pytest.mark.parametrize("native", TILE_TARGETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", [INT8, BF16])
def test_many_tiles(native, form, precision):
    more = {"sparsity": 0.5, "form": form, "precision": precision, "native": native, "height": 2}
    check_tiles({**LARGER, **more})


@given(problems_with(target=st.sampled_from(TARGETS), precision=precisions))
@example({**SMALLEST, "magnitude": 0.0, "precision": INT8, "target": DOT_TARGETS[0][1]})
@FEW
def test_quantise(values):
    precision, target = values["precision"], values["target"]
    rng = np.random.default_rng(values["seed"])
    x = rng.standard_normal((values["lead"], values["rows"], values["k"])) * values["magnitude"]
    x = x.astype("float32")
    tiles = tiles_for(values["lead"], values["rows"], values["symbolic"])
    kernel = quantise(tiles, values["k"], precision, simd(target))
    shape = (len(x), -(-values["rows"] // 16), precision.lines(values["k"]), 16)
    lines = run(kernel, target, values["threads"], [to_tiles(x)], shape, "int32")
    zero_point = simd(target).zero_point
    result = from_lines(lines, values["rows"], values["k"], precision, zero_point)
    peaks = np.abs(x).max(axis=-1, keepdims=True)
    quantum = 0.501 / 127 * peaks if precision is INT8 else 2.0**-8 * np.abs(x)
    assert (np.abs(result - x) <= quantum + 1e-30).all()
    words = lines[:, :, -(-values["k"] // precision.unit) : precision.data_lines(values["k"])]
    assert (words == 0).all(), "padding is not zero"


@given(problems_with(target=st.sampled_from(TARGETS)), st.floats(1e-3, 10), st.integers(0, 255))
@FEW
def test_quantise_by_steps(values, scale, zero):
    target, rng = values["target"], np.random.default_rng(values["seed"])
    x = rng.standard_normal((values["lead"], values["rows"], values["k"])) * values["magnitude"]
    x, scale = x.astype("float32"), np.float32(scale)
    tiles = tiles_for(values["lead"], values["rows"], values["symbolic"])
    kernel = quantise_by_steps(tiles, values["k"], simd(target))
    shape = (len(x), -(-values["rows"] // 16), INT8.lines(values["k"]), 16)
    operands = [to_tiles(x), np.float32([scale]), np.float32([zero])]
    lines = run(kernel, target, values["threads"], operands, shape, "int32")
    found = from_lines(lines, values["rows"], values["k"], INT8, simd(target).zero_point)
    found += (128 - zero) * float(scale)
    expected = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * float(scale)
    np.testing.assert_allclose(found, expected, atol=1e-6 * scale * 256)


@pytest.mark.parametrize("farthest", [127, -128])
def test_dot_of_the_largest_values_does_not_saturate(farthest):
    of_bytes = [(dot, target) for dot, target in DOT_TARGETS if dot.precision is INT8]
    able = [(dot, target) for dot, target in of_bytes if dot.largest_weight >= -farthest]
    assert able
    for dot, target in able:
        case = Case(INT8, 1, 16, 3, 64, 0.0, [], None, 1.0, 0)
        case.x, case.w = np.full_like(case.x, -5.0), np.full_like(case.w, farthest)
        case.w[:, 0] = 1 if farthest == -128 else 127
        elements, of_rows = rounded_for(dot, target, case.w)
        assert elements[0, 1] == (-128 if farthest == -128 else min(dot.largest_weight, 127))
        kernel = dot_kernel(dot, target, case.problem(False), dot.depth, False)
        weight = word_weights.dense_rows(as_words(elements), dot.depth, dot.depth)
        case.check(kernel, weight, elements, of_rows, target, 1)


def test_bf16_rounds_to_nearest_even_and_clears_negative_zero():
    x = np.array([1.0, -0.0, -1e-45, 1.00390625, 1.01171875], np.float32)
    assert round_to_bf16(x).tolist() == [0x3F80, 0, 0, 0x3F80, 0x3F82]
