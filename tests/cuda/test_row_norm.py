"""Layer norm by warps, against NumPy on the emulated GPU."""

from __future__ import annotations

import ml_dtypes  # noqa: F401 - NumPy has bfloat16 by it
import numpy as np
import pytest
from gpu_harness import run

from sparse_tvm.families import Extents
from sparse_tvm.schedules.cuda.row_norm import layer_norm

pytestmark = pytest.mark.usefixtures("gpu")


def compare(shape: tuple[int, ...], source: str, target: str, known: bool = True) -> None:
    rng = np.random.default_rng(shape)
    x = (rng.standard_normal(shape) * 3 + 100).astype(source)
    gamma, beta = rng.standard_normal((2, shape[-1])).astype(np.float32)
    rows = x.astype(np.float64)
    centred = rows - rows.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    expected = centred / deviation * gamma + beta
    extents = (*(shape[:-1] if known else [None] * (len(shape) - 1)), shape[-1])
    kernel = layer_norm(Extents(extents, source), Extents(extents, target), 1e-5)
    found = run(kernel, [x, gamma, beta], np.empty(shape, target)).astype(np.float64)
    scale = np.abs(expected).max()
    tolerance = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 3e-5}[target]
    np.testing.assert_allclose(found, expected, atol=tolerance * scale)


@pytest.mark.parametrize("width", [8, 40, 256, 264, 768, 1024, 2048, 4096])
def test_widths(width):
    compare((5, width), "float16", "float16")


@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("known", [True, False])
def test_types(source, target, known):
    compare((3, 7, 384), source, target, known)


def test_beyond_float16_saturates():
    x = np.array([[1, -1] * 8], np.float16)
    gamma, beta = np.full(16, 1e6, np.float32), np.zeros(16, np.float32)
    extents = Extents((1, 16), "float16")
    found = run(layer_norm(extents, extents, 0.0), [x, gamma, beta], np.empty_like(x))
    np.testing.assert_array_equal(found, x * np.float16(65504))


def test_both():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 72)).astype(np.float32)
    gamma, beta = np.ones(72, np.float32), np.zeros(72, np.float32)
    kernel = layer_norm(Extents((6, 72)), Extents((6, 72), "float16"), 1e-5, both=True)
    narrow = np.full((6, 72), np.nan, np.float16)
    wide = run(kernel, [x, gamma, beta, narrow], np.empty((6, 72), np.float32))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(wide, expected, atol=1e-5)


@pytest.mark.parametrize("source", ["float16", "float32"])
@pytest.mark.parametrize("width", [72, 768])
def test_a_residual(source, width):
    rng = np.random.default_rng(width)
    x = rng.standard_normal((6, width)).astype(np.float16)
    residual = rng.standard_normal((6, width)).astype(source)
    gamma, beta = np.ones(width, np.float32), np.zeros(width, np.float32)
    extents = Extents(x.shape, "float16")
    kernel = layer_norm(extents, extents, 1e-5, True, Extents(x.shape, source))
    arrays = [x, gamma, beta, residual, np.zeros_like(x)]
    total = x.astype(np.float64) + residual
    centred = total - total.mean(-1, keepdims=True)
    expected = centred / np.sqrt(total.var(-1, keepdims=True) + 1e-5)
    found = run(kernel, arrays, np.empty(x.shape, np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)
