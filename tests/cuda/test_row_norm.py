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
    kernel = layer_norm(Extents((6, 72)), Extents((6, 72), "float16"), 1e-5, "float32")
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
    kernel = layer_norm(extents, extents, 1e-5, "float32", Extents(x.shape, source))
    arrays = [x, gamma, beta, residual, np.zeros_like(x)]
    total = x.astype(np.float64) + residual
    centred = total - total.mean(-1, keepdims=True)
    expected = centred / np.sqrt(total.var(-1, keepdims=True) + 1e-5)
    found = run(kernel, arrays, np.empty(x.shape, np.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_remainders():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((6, 264)) * np.logspace(-3, 3, 6)[:, None]).astype(np.float32)
    gamma = np.where(np.arange(264) % 3, 1, 3e-3).astype(np.float32)
    beta = rng.standard_normal(264).astype(np.float32)
    half = Extents(x.shape, "float16")
    kernel = layer_norm(Extents(x.shape), half, 1e-9, "uint8")
    rounded = np.full(x.shape, np.nan, np.float16)
    found = run(kernel, [x, gamma, beta, rounded], np.empty(x.shape, np.uint8))
    wide = x.astype(np.float64)
    deviation = np.sqrt(wide.var(-1, keepdims=True) + 1e-9)
    expected = (wide - wide.mean(-1, keepdims=True)) / deviation * gamma + beta
    left = (found.astype(np.uint16) << 8).view(np.float16).astype(np.float64) / 2048
    near = expected.astype(np.float16).astype(np.float64)
    error = np.abs(near + left - expected)
    # Values halfway between two of float16 may have gone the other way.
    kept = error < np.abs(expected) * 2.0**-13.5 + 3e-7
    assert kept.mean() > 0.99
    assert np.abs(near - expected).max() > 4 * error[kept].max()


def test_a_residual_and_its_remainder():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, 72)).astype(np.float16)
    residual = rng.standard_normal((6, 72)).astype(np.float16)
    remainder = rng.integers(0, 120, residual.shape).astype(np.uint8) | np.uint8(128)
    left = (remainder.astype(np.uint16) << 8).view(np.float16).astype(np.float64) / 2048
    total = x.astype(np.float64) + residual + left
    gamma, beta = np.ones(72, np.float32), np.zeros(72, np.float32)
    half, small = Extents(x.shape, "float16"), Extents(x.shape, "uint8")
    kernel = layer_norm(half, Extents(x.shape), 1e-5, None, half, small)
    found = run(kernel, [x, gamma, beta, residual, remainder], np.empty(x.shape, np.float32))
    centred = total - total.mean(-1, keepdims=True)
    expected = centred / np.sqrt(total.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
