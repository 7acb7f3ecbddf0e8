from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tvm.errors import OptionError
from sparse_tvm.sparsity.blocks import parse_block
from sparse_tvm.sparsity.formats import BSR, CSR, occupied_blocks


@st.composite
def sparse_matrices(draw: st.DrawFn) -> np.ndarray:
    """Any shape and density; some rows and columns are empty."""
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    w = rng.standard_normal(shape, dtype=np.float32)
    w *= rng.random(shape) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    w[rng.random(shape[0]) < draw(st.sampled_from([0.0, 0.5]))] = 0
    w[:, rng.random(shape[1]) < draw(st.sampled_from([0.0, 0.5]))] = 0
    return w


blocks = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(sparse_matrices())
@settings(deadline=None)
def test_csr(w: np.ndarray) -> None:
    csr = CSR.from_dense(w)
    np.testing.assert_array_equal(csr.to_dense(), w)
    assert (csr.data.dtype, csr.indices.dtype, csr.indptr.dtype) == (
        np.float32,
        np.int32,
        np.int32,
    )
    assert csr.shape == w.shape
    assert csr.nnz == csr.indptr[-1] == np.count_nonzero(w)
    assert csr.nbytes == 8 * csr.nnz + 4 * (w.shape[0] + 1)
    for row, (start, end) in enumerate(zip(csr.indptr, csr.indptr[1:], strict=False)):
        np.testing.assert_array_equal(csr.indices[start:end], np.flatnonzero(w[row]))
        np.testing.assert_array_equal(csr.data[start:end], w[row][w[row] != 0])


@given(sparse_matrices(), blocks)
@settings(deadline=None)
def test_bsr(w: np.ndarray, block: tuple[int, int]) -> None:
    bsr = BSR.from_dense(w, block)
    r, c = block
    np.testing.assert_array_equal(bsr.to_dense(), w)
    assert (bsr.data.dtype, bsr.indices.dtype, bsr.indptr.dtype) == (
        np.float32,
        np.int32,
        np.int32,
    )
    assert bsr.shape == w.shape
    assert bsr.data.shape == (len(bsr.indices), r, c)
    assert bsr.nnz == np.count_nonzero(w)
    assert all(np.any(stored) for stored in bsr.data)
    assert bsr.fill == (bsr.nnz / bsr.data.size if bsr.data.size else 1.0)
    for row, (start, end) in enumerate(zip(bsr.indptr, bsr.indptr[1:], strict=False)):
        lines = w[row * r : (row + 1) * r]
        present = [j for j in range(-(-w.shape[1] // c)) if lines[:, j * c : (j + 1) * c].any()]
        assert bsr.indices[start:end].tolist() == present


@given(sparse_matrices(), blocks)
@settings(deadline=None)
def test_formats_do_not_depend_on_memory_order(w: np.ndarray, block: tuple[int, int]) -> None:
    fortran = np.asfortranarray(w)
    np.testing.assert_array_equal(CSR.from_dense(fortran).to_dense(), w)
    np.testing.assert_array_equal(
        BSR.from_dense(fortran, block).data, BSR.from_dense(w, block).data
    )


@given(sparse_matrices(), blocks)
@settings(deadline=None)
def test_occupied_blocks(w: np.ndarray, block: tuple[int, int]) -> None:
    r, c = block
    expected = [
        [w[i : i + r, j : j + c].any() for j in range(0, w.shape[1], c)]
        for i in range(0, w.shape[0], r)
    ]
    np.testing.assert_array_equal(occupied_blocks(w != 0, block), expected)


def test_one_by_one_blocks_are_csr() -> None:
    w = np.diag(np.arange(5, dtype=np.float32))
    bsr, csr = BSR.from_dense(w, (1, 1)), CSR.from_dense(w)
    np.testing.assert_array_equal(bsr.data.ravel(), csr.data)
    np.testing.assert_array_equal(bsr.indices, csr.indices)
    np.testing.assert_array_equal(bsr.indptr, csr.indptr)


def test_matrix_without_rows_or_columns() -> None:
    for shape in ((0, 3), (3, 0)):
        w = np.zeros(shape, np.float32)
        assert CSR.from_dense(w).to_dense().shape == shape
        assert BSR.from_dense(w, (2, 2)).to_dense().shape == shape


def test_parse_block() -> None:
    assert parse_block("4x1") == (4, 1)
    assert parse_block(" 16X32 ") == (16, 32)


@pytest.mark.parametrize("text", ["", "4", "4x", "x4", "0x1", "4x0", "-4x1", "4x1x1", "4*1"])
def test_parse_block_refuses(text: str) -> None:
    with pytest.raises(OptionError, match=r"not of the form RxC.*for example 4x1"):
        parse_block(text)
