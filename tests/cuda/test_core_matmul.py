"""Dense layers in float32, any shape, against NumPy on the emulated GPU."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_harness import run

from sparse_tvm.families import Extents
from sparse_tvm.operators import Activation, Bias, Residual
from sparse_tvm.schedules.cuda.core_matmul import core_matmul

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize(("m", "n", "k", "known"), [(1, 3, 5, True), (70, 130, 33, False)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_products(m, n, k, known, dtype):
    rng = np.random.default_rng([m, n, k])
    x = rng.standard_normal((m, k)).astype(dtype)
    w = rng.standard_normal((n, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    epilogue = (Bias(), Activation("relu"), Residual())
    rows = m if known else None
    operands = [Extents((rows, k), dtype), Extents((n,)), Extents((rows, n))]
    kernel = core_matmul(n, k, operands, Extents((1, rows, n)), epilogue)
    found = run(kernel, [x, w, bias, residual], np.empty((1, m, n), np.float32))[0]
    expected = np.maximum(x.astype(np.float64) @ w.T + bias, 0) + residual
    np.testing.assert_allclose(found, expected, atol=1e-4)
