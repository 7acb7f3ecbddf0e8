"""Dense layers on tensor cores: every layout, any shape, against NumPy on the emulated GPU."""

from __future__ import annotations

from math import erf

import ml_dtypes  # noqa: F401 - NumPy has bfloat16 by it
import numpy as np
import pytest
from gpu_harness import run

from sparse_tvm.families import Extents
from sparse_tvm.operators import Activation, Bias, Epilogue, Layout, Residual
from sparse_tvm.schedules.cuda.tensor_matmul import Problem, tensor_matmul
from sparse_tvm.schedules.cuda.tiles import tile_for
from sparse_tvm.schedules.cuda.weights import weight_arrays

pytestmark = pytest.mark.usefixtures("gpu")

LAYOUTS = {
    "dense": Layout("", "dense"),
    "2:4": Layout("", "2:4", (1, 4)),
    "16x16": Layout("", "bsr", (16, 16)),
    "32x32": Layout("", "bsr", (32, 32)),
    "64x64": Layout("", "bsr", (64, 64)),
}
SHAPES = [(5, 40, 72), (33, 200, 136), (130, 136, 264)]


def weight(layout: Layout, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    w = rng.standard_normal((n, k)).astype(np.float32)
    if layout.format == "2:4":
        groups = w.reshape(n, -1, 4)
        kept = rng.permuted(np.tile([True, True, False, False], (n, k // 4, 1)), axis=-1)
        kept &= rng.random(kept.shape) < 0.9
        return (groups * kept).reshape(n, k)
    if layout.format == "bsr":
        rows, columns = layout.block
        mask = rng.random((-(-n // rows), -(-k // columns))) < 0.5
        return w * np.kron(mask, np.ones(layout.block))[:n, :k].astype(np.float32)
    return w


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(erf)(x * 0.5**0.5))


def compare(
    layout: Layout,
    m: int,
    n: int,
    k: int,
    epilogue: Epilogue,
    known: bool,
    out: str,
    dtype: str = "float16",
):
    rng = np.random.default_rng([m, n, k])
    w = weight(layout, n, k, rng)
    x = rng.standard_normal((m, k)).astype(dtype)
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(dtype)
    operands = []
    expected = x.astype(np.float64) @ w.astype(dtype).astype(np.float64).T
    for step in epilogue:
        if isinstance(step, Bias):
            operands.append(bias)
            expected = expected + bias
        elif isinstance(step, Residual):
            operands.append(residual)
            expected = expected + residual.astype(np.float64)
        else:
            expected = gelu(expected)
    tile = tile_for(layout, n, m if known else None)
    rows = m if known else None
    extras = tuple(
        Extents((n,) if array.ndim == 1 else (1, rows, n), str(array.dtype)) for array in operands
    )
    problem = Problem(
        n, k, Extents((rows, k), dtype), extras, Extents((rows, n), out), layout, tile, epilogue
    )
    operands = [array if array.ndim == 1 else array[None] for array in operands]
    arrays = [x, *weight_arrays(w, layout, dtype).values(), *operands]
    found = run(tensor_matmul(problem), arrays, np.empty((m, n), out))
    tolerance = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}[out]
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found.astype(np.float64), expected, atol=tolerance * scale)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products(name, m, n, k):
    compare(LAYOUTS[name], m, n, k, (), True, "float32")


@pytest.mark.parametrize("name", LAYOUTS)
def test_epilogues_of_any_number_of_tokens(name):
    epilogue = (Bias(), Activation("gelu"), Residual())
    compare(LAYOUTS[name], 77, 104, 96, epilogue, False, "float16")


@pytest.mark.parametrize("name", LAYOUTS)
def test_bfloat16(name):
    compare(LAYOUTS[name], 33, 72, 136, (), True, "float32", "bfloat16")
    compare(LAYOUTS[name], 9, 40, 72, (Bias(), Residual()), False, "bfloat16", "bfloat16")


def test_a_weight_of_zeros():
    layout = LAYOUTS["32x32"]
    x = np.ones((3, 64), np.float16)
    arrays = [x, *weight_arrays(np.zeros((40, 64), np.float32), layout).values()]
    x_extents, y_extents = Extents((3, 64), "float16"), Extents((3, 40))
    tile = tile_for(layout, 40, 3)
    problem = Problem(40, 64, x_extents, (), y_extents, layout, tile, ())
    found = run(tensor_matmul(problem), arrays, np.empty((3, 40), np.float32))
    np.testing.assert_array_equal(found, np.zeros((3, 40)))


def test_sums_beyond_float16_saturate():
    layout = LAYOUTS["dense"]
    x, w = np.full((2, 32), 200, np.float16), np.full((16, 32), 200, np.float32)
    x_extents, y_extents = Extents((2, 32), "float16"), Extents((2, 16), "float16")
    tile = tile_for(layout, 16, 2)
    problem = Problem(16, 32, x_extents, (), y_extents, layout, tile, ())
    found = run(
        tensor_matmul(problem),
        [x, *weight_arrays(w, layout).values()],
        np.empty((2, 16), np.float16),
    )
    np.testing.assert_array_equal(found, np.full((2, 16), 65504, np.float16))
