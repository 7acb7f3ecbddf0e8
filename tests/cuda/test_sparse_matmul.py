"""Layers with unstructured weights, any shape, against NumPy on the emulated GPU."""

from __future__ import annotations

from math import erf

import ml_dtypes  # noqa: F401 - NumPy has bfloat16 by it
import numpy as np
import pytest
from gpu_harness import run

from sparse_tvm.families import Extents
from sparse_tvm.operators import Activation, Bias, Residual
from sparse_tvm.schedules.cuda.sparse_matmul import SparseProblem, sparse_matmul
from sparse_tvm.schedules.cuda.sparse_rows import chunks_of, row_arrays, row_tile


def pruned(n: int, k: int, density: float, rng: np.random.Generator) -> np.ndarray:
    """A weight whose rows are not equally long; one is empty, one is full."""
    w = rng.standard_normal((n, k)).astype(np.float16)
    w *= rng.random((n, k)) < density * rng.uniform(0.2, 1.8, (n, 1))
    w[0], w[-1] = 0, 1
    return w


def unpacked(arrays: dict[str, np.ndarray], n: int, k: int) -> np.ndarray:
    """The weight that rows of pairs stand for, read as their description says."""
    chunks, columns = chunks_of(k)
    w = np.zeros((n, k), np.float16)
    for slot, row in enumerate(arrays["order"]):
        for chunk in range(chunks):
            start, end = arrays["starts"][slot * chunks + chunk :][:2]
            for pair in arrays["pairs"][start:end].ravel():
                column = int(pair >> 16)
                assert column // columns == chunk
                if pair & 0xFFFF:
                    w[row, column] = np.uint16(pair & 0xFFFF).view(np.float16)
    return w


@pytest.mark.parametrize(("n", "k"), [(1, 8), (40, 776), (70, 2000)])
def test_rows_of_pairs(n, k):
    w = pruned(n, k, 0.1, np.random.default_rng([n, k]))
    arrays = row_arrays(w)
    np.testing.assert_array_equal(unpacked(arrays, n, k), w)
    lengths = np.count_nonzero(w[arrays["order"][arrays["order"] < n][:16]], axis=1)
    assert (np.diff(lengths) <= 0).all()


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(erf)(x * 0.5**0.5))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("m", [1, 3, 8, 13, 30, 64, 150])
@pytest.mark.parametrize(("n", "k"), [(40, 72), (70, 1640)])
def test_products(m, n, k):
    rng = np.random.default_rng([m, n, k])
    w = pruned(n, k, 0.1, rng)
    x = rng.standard_normal((m, k)).astype(np.float16)
    x_extents, y_extents = Extents((m, k), "float16"), Extents((m, n))
    problem = SparseProblem(n, k, x_extents, (), y_extents, row_tile(n, k, m), ())
    arrays = [x, *row_arrays(w).values()]
    found = run(sparse_matmul(problem), arrays, np.empty((m, n), np.float32))
    expected = x.astype(np.float64) @ w.T.astype(np.float64)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("m", [1, 5, 20, 70])
def test_bfloat16(m):
    n, k = 40, 136
    rng = np.random.default_rng(m)
    w = pruned(n, k, 0.2, rng).astype(np.float32) * 1e6
    x = rng.standard_normal((m, k)).astype("bfloat16")
    x_extents, y_extents = Extents((m, k), "bfloat16"), Extents((m, n))
    problem = SparseProblem(n, k, x_extents, (), y_extents, row_tile(n, k, m), ())
    arrays = [x, *row_arrays(w, "bfloat16").values()]
    found = run(sparse_matmul(problem), arrays, np.empty((m, n), np.float32))
    expected = x.astype(np.float64) @ w.astype("bfloat16").astype(np.float64).T
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.usefixtures("gpu")
def test_epilogues_and_several_bundles():
    m, n, k = 77, 300, 96
    rng = np.random.default_rng(0)
    w = pruned(n, k, 0.3, rng)
    x = rng.standard_normal((m, k)).astype(np.float16)
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((1, m, n)).astype(np.float16)
    extras = (Extents((n,)), Extents((1, None, n), "float16"))
    tile = row_tile(50 * n, k, None)
    assert tile.bundles > 1
    problem = SparseProblem(
        n,
        k,
        Extents((None, k), "float16"),
        extras,
        Extents((None, n), "float16"),
        tile,
        (Bias(), Activation("gelu"), Residual()),
    )
    arrays = [x, *row_arrays(w).values(), bias, residual]
    found = run(sparse_matmul(problem), arrays, np.empty((m, n), np.float16))
    expected = gelu(x.astype(np.float64) @ w.T.astype(np.float64) + bias) + residual[0]
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.usefixtures("gpu")
def test_a_weight_of_zeros():
    x = np.ones((3, 64), np.float16)
    arrays = [x, *row_arrays(np.zeros((40, 64), np.float16)).values()]
    problem = SparseProblem(
        40, 64, Extents((3, 64), "float16"), (), Extents((3, 40)), row_tile(40, 64, 3), ()
    )
    found = run(sparse_matmul(problem), arrays, np.empty((3, 40), np.float32))
    np.testing.assert_array_equal(found, np.zeros((3, 40)))
