"""Sparse matrix formats of weights, built from and turned into dense NumPy matrices.

A weight is always ``[N, K]``: output features by input features. A block ``RxC`` covers ``R``
consecutive outputs and ``C`` consecutive inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def reduce_blocks(values: np.ndarray, block: tuple[int, int], operation: np.ufunc) -> np.ndarray:
    """Reduce each block of an ``[N, K]`` array by a ufunc such as ``np.add``.

    Returns
    -------
    np.ndarray
        ``[ceil(N/r), ceil(K/c)]``; blocks at the edges hold fewer values.
    """
    # Few passes over whole rows are far faster than a reduction over short axes.
    for axis, size in enumerate(block):
        if size == 1:
            continue
        lines = np.moveaxis(values, axis, 0)
        merged = lines[::size].copy()
        for offset in range(1, min(size, len(lines))):
            part = lines[offset::size]
            operation(merged[: len(part)], part, out=merged[: len(part)])
        values = np.moveaxis(merged, 0, axis)
    return np.ascontiguousarray(values)


def occupied_blocks(mask: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Tell which blocks of a boolean ``[N, K]`` mask hold any True, as `reduce_blocks` does."""
    return reduce_blocks(mask, block, np.logical_or)


@dataclass(frozen=True)
class CSR:
    """Compressed sparse rows: the non-zeros of each row, with their columns.

    Attributes
    ----------
    data : np.ndarray
        float32 ``[nnz]``, row by row.
    indices : np.ndarray
        int32 ``[nnz]``, the column of each value, ascending within a row.
    indptr : np.ndarray
        int32 ``[N + 1]``, where each row starts in `data`.
    shape : tuple[int, int]
        ``(N, K)``.
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def from_dense(cls, w: np.ndarray) -> CSR:
        """Keep the non-zeros of a float32 ``[N, K]`` matrix."""
        mask = w != 0
        return cls(
            data=w[mask].astype(np.float32, copy=False),
            indices=_columns(mask),
            indptr=_row_starts(mask),
            shape=_matrix_shape(w),
        )

    def to_dense(self) -> np.ndarray:
        """Return the float32 ``[N, K]`` matrix."""
        dense = np.zeros(self.shape, np.float32)
        dense[_row_of_each(self.indptr), self.indices] = self.data
        return dense

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.data.size

    @property
    def nbytes(self) -> int:
        """Bytes of all three arrays."""
        return self.data.nbytes + self.indices.nbytes + self.indptr.nbytes


@dataclass(frozen=True)
class BSR:
    """Block compressed sparse rows: the blocks that hold any non-zero, stored dense.

    Attributes
    ----------
    data : np.ndarray
        float32 ``[nblocks, r, c]``, block row by block row; blocks at the edges are padded with
        zeros where the block size does not divide the shape.
    indices : np.ndarray
        int32 ``[nblocks]``, the block column of each block, ascending within a block row.
    indptr : np.ndarray
        int32 ``[ceil(N/r) + 1]``, where each block row starts in `data`.
    shape : tuple[int, int]
        ``(N, K)``, without the padding.
    block : tuple[int, int]
        ``(r, c)``.
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    shape: tuple[int, int]
    block: tuple[int, int]

    @classmethod
    def from_dense(cls, w: np.ndarray, block: tuple[int, int]) -> BSR:
        """Keep the blocks of a float32 ``[N, K]`` matrix that are not all zeros."""
        shape = _matrix_shape(w)
        occupied = occupied_blocks(w != 0, block)
        block_rows, block_columns = np.nonzero(occupied)
        return cls(
            data=_as_blocks(_padded(w, block), block)[block_rows, :, block_columns, :],
            indices=block_columns.astype(np.int32),
            indptr=_row_starts(occupied),
            shape=shape,
            block=block,
        )

    def to_dense(self) -> np.ndarray:
        """Return the float32 ``[N, K]`` matrix."""
        (n, k), (r, c) = self.shape, self.block
        padded = np.zeros((-(-n // r) * r, -(-k // c) * c), np.float32)
        _as_blocks(padded, self.block)[_row_of_each(self.indptr), :, self.indices, :] = self.data
        return np.ascontiguousarray(padded[:n, :k])

    @property
    def nnz(self) -> int:
        """Number of non-zero values, without the zeros inside of stored blocks."""
        return int(np.count_nonzero(self.data))

    @property
    def nbytes(self) -> int:
        """Bytes of all three arrays."""
        return self.data.nbytes + self.indices.nbytes + self.indptr.nbytes

    @property
    def fill(self) -> float:
        """Non-zeros per stored value, 0 to 1; 1 when nothing is stored."""
        return self.nnz / self.data.size if self.data.size else 1.0


def _matrix_shape(w: np.ndarray) -> tuple[int, int]:
    rows, columns = w.shape
    return rows, columns


def _columns(mask: np.ndarray) -> np.ndarray:
    """Return the int32 column of every True, row by row."""
    columns: np.ndarray = np.flatnonzero(mask) % max(mask.shape[1], 1)
    return columns.astype(np.int32)


def _row_starts(mask: np.ndarray) -> np.ndarray:
    """Return int32 ``[rows + 1]``: the number of True before each row, and in all."""
    starts = np.zeros(len(mask) + 1, np.int32)
    np.cumsum(np.count_nonzero(mask, axis=1), out=starts[1:])
    return starts


def _row_of_each(indptr: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))


def _padded(w: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Return `w` in C order as float32, with zeros up to the next multiple of the block."""
    w = np.ascontiguousarray(w, np.float32)
    rows, columns = (-size % step for size, step in zip(w.shape, block, strict=True))
    return np.pad(w, ((0, rows), (0, columns))) if rows or columns else w


def _as_blocks(w: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """View ``[N, K]`` as ``[N/r, r, K/c, c]``; the block size divides the shape."""
    (n, k), (r, c) = w.shape, block
    return w.reshape(n // r, r, k // c, c)
