"""The product of sliced rows and few rows of activations, without the permutation of any CPU."""

from __future__ import annotations

import numpy as np
import pytest
from harness import RUNNABLE, from_tiles, run, tiles_for, to_tiles

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cpu.block_arrays import split_arrays
from sparse_tvm.schedules.cpu.matmul import matmul
from sparse_tvm.schedules.cpu.simd import Simd


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("rows", [1, 2])
def test_its_twin_computes_slices_of_any_width(rows, lanes):
    """Where this CPU has no vectors as wide, that is what the arrays of those are tested with."""
    n, k = 45, 70
    rng = np.random.default_rng(lanes + rows)
    w = (rng.standard_normal((n, k)) * (rng.random((n, k)) < 0.2)).astype("float32")
    x = rng.standard_normal((1, rows, k)).astype("float32")
    layout = Layout("matmul", "csr").having(sell=lanes)
    twin = Simd(lanes, registers=16, by_element=True)
    assert twin.permutation is None
    kernel = matmul(tiles_for(1, rows, False), rows, n, k, layout, [], twin)
    arguments = [to_tiles(x), *split_arrays(w, layout).values()]
    found = run(kernel, RUNNABLE[0], 2, arguments, (1, 1, n, 16))
    np.testing.assert_allclose(from_tiles(found, rows), x @ w.T, rtol=0, atol=1e-5)
