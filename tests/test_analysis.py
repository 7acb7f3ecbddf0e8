from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tvm.sparsity.analysis import analyse, density_map
from sparse_tvm.sparsity.formats import BSR

RNG = np.random.default_rng(0)


def blocky(shape: tuple[int, int], block: tuple[int, int], sparsity: float) -> np.ndarray:
    grid = RNG.random((-(-shape[0] // block[0]), -(-shape[1] // block[1]))) >= sparsity
    mask = np.kron(grid, np.ones(block))[: shape[0], : shape[1]]
    return (RNG.standard_normal(shape) * mask).astype(np.float32)


def n_of_m(shape: tuple[int, int], n: int, m: int) -> np.ndarray:
    scores = RNG.random((shape[0], shape[1] // m, m))
    mask = (scores.argsort(axis=2).argsort(axis=2) < n).reshape(shape)
    return (RNG.standard_normal(shape) * mask).astype(np.float32)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize(
    "block", [(2, 1), (4, 1), (16, 1), (32, 1), (1, 4), (1, 32), (4, 4), (16, 16), (8, 2)]
)
def test_blocks(block: tuple[int, int], sparsity: float) -> None:
    found = analyse(blocky((384, 512), block, sparsity))
    assert found.block == block
    assert found.label == f"{block[0]}x{block[1]} blocks (fill 1.00)"
    assert found.n_m is None


@pytest.mark.parametrize("shape", [(384, 512), (2, 768), (1, 1000), (1000, 3), (33, 47)])
@pytest.mark.parametrize("sparsity", [0.06, 0.3, 0.5, 0.75, 0.9, 0.95])
def test_unstructured(shape: tuple[int, int], sparsity: float) -> None:
    found = analyse(blocky(shape, (1, 1), sparsity))
    assert (found.label, found.block, found.n_m) == ("unstructured", None, None)


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (4, 8)])
def test_n_m(pattern: tuple[int, int]) -> None:
    n, m = pattern
    found = analyse(n_of_m((64, 256), n, m))
    assert (found.n_m, found.label, found.sparsity) == (pattern, f"{n}:{m}", 1 - n / m)
    # A few more zeros, as pruned twice, leave the pattern.
    assert analyse(n_of_m((64, 256), n, m) * (RNG.random((64, 256)) < 0.9)).n_m == pattern


def test_one_violation_is_not_n_m() -> None:
    w = n_of_m((64, 256), 2, 4)
    w[7, 4:8] = 1
    assert analyse(w).label == "unstructured"


def test_n_m_runs_along_inputs_only() -> None:
    assert analyse(np.ascontiguousarray(n_of_m((256, 256), 2, 4).T)).label == "unstructured"


def test_nearly_filled_blocks() -> None:
    w = blocky((256, 256), (4, 1), 0.9)
    w[RNG.random(w.shape) < 0.03] = 0
    assert analyse(w).label == "4x1 blocks (fill 0.97)"
    w[RNG.random(w.shape) < 0.2] = 0
    assert analyse(w).label == "unstructured"


def test_dense_and_all_zero() -> None:
    w = RNG.standard_normal((64, 64), dtype=np.float32)
    assert analyse(w).label == "dense"
    w[:, :2] = 0
    assert analyse(w).label == "dense"
    zero = analyse(np.zeros_like(w))
    assert (zero.label, zero.sparsity, zero.nnz) == ("all zero", 1.0, 0)


@pytest.mark.parametrize("shape", [(30, 50), (3, 7), (1, 1), (100, 33)])
@pytest.mark.parametrize("block", [(4, 1), (1, 8), (4, 4)])
def test_edge_blocks_count_their_own_values(shape: tuple[int, int], block: tuple[int, int]) -> None:
    w = blocky(shape, block, 0.5)
    fits = block[0] <= shape[0] and block[1] <= shape[1]
    assert (block in analyse(w).blocks) == fits
    if fits:
        assert analyse(w).blocks[block] == 1.0


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 1))
@settings(deadline=None)
def test_fill_agrees_with_bsr_where_blocks_divide(i: int, j: int, sparsity: float) -> None:
    w = blocky((32 * i, 32 * j), (1, 1), sparsity)
    found = analyse(w)
    assert analyse(np.asfortranarray(w)) == found
    assert found.nnz == np.count_nonzero(w)
    for block, fill in found.blocks.items():
        assert fill == BSR.from_dense(w, block).fill


def test_empty_matrix() -> None:
    assert analyse(np.zeros((0, 4), np.float32)).label == "dense"


def test_density_map_counts_cells_of_unequal_size() -> None:
    mask = np.zeros((5, 3), bool)
    mask[:2] = True  # of rows [0, 2), [2, 5) and columns [0, 1), [1, 3)
    mask[4, 2] = True
    found = density_map(mask, cells=2)
    np.testing.assert_array_equal(found, [[255, 255], [0, round(255 / 6)]])
    assert density_map(mask).shape == mask.shape
    large = blocky((1000, 500), (4, 1), 0.9) != 0
    assert density_map(large).shape == (24, 24)
    assert density_map(large).mean() / 255 == pytest.approx(large.mean(), abs=0.01)
