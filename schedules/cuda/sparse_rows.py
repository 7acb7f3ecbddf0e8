"""Unstructured weights as rows of pairs, and how a product with them is shared out.

A stored value is one word: the 16-bit float in its lower half, its column in the upper one. Rows
are cut into *chunks* of columns, so that what they multiply fits into shared memory a few chunks at
a time, and a row's part of a chunk is padded with zeros to whole vectors of four pairs.

Rows that are multiplied at a time should be equally long. So, of every 32 neighbours, the longest
come first, and so do the longest of the 32s (the row swizzle of Gale et al., "Sparse GPU kernels
for deep learning", 2020): ``order`` says which row is where. Within 32, outputs still share their
sectors of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from sparse_tvm.schedules.cuda.weights import rounded
from sparse_tvm.sparsity.formats import CSR

VECTOR = 4
"""Pairs that a thread loads at a time."""

AHEAD = 2
"""Vectors of a lane that are on their way from memory while it multiplies one."""

WINDOW = 32
"""Neighbouring rows that are sorted by length."""

LARGEST_INPUTS = 1 << 16
"""Columns that a pair can name."""

_CHUNK = 768
"""Columns of a chunk, at most: of 64 tokens, these fill what every architecture has."""

_SHARED_BYTES = 96 * 1024
_PROCESSORS = 108
_BUNDLES = (8, 4, 2, 1)
_TYPICAL_TOKENS = 128
_WIDE = 2048
"""Outputs that keep a usual device busy with 32 a thread block."""


def chunks_of(inputs: int) -> tuple[int, int]:
    """How many chunks columns are cut into, and the columns of each but the last."""
    count = ceil(inputs / _CHUNK)
    columns = ceil(inputs / count / 8) * 8
    return ceil(inputs / columns), columns


def row_arrays(w: np.ndarray, dtype: str = "float16") -> dict[str, np.ndarray]:
    """A weight ``[N, K]`` as rows of pairs.

    Parameters
    ----------
    w : np.ndarray
        float32, of fewer than 65,537 columns.
    dtype : str
        Of stored values.

    Returns
    -------
    dict[str, np.ndarray]
        ``pairs`` uint32 ``[vectors, 4]``, row by row, followed by vectors of zeros that a loop may
        read ahead of itself; ``order`` int32 ``[slots]``, which row is in each slot, N and more
        for none; ``starts`` int32 ``[slots * chunks + 1]``, the first vector of every chunk of
        every slot.
    """
    chunks, columns = chunks_of(w.shape[1])
    slots = ceil(len(w) / WINDOW) * WINDOW
    order = _order(np.pad(np.count_nonzero(w, axis=1), (0, slots - len(w))))
    csr = CSR.from_dense(np.pad(w, ((0, slots - len(w)), (0, 0)))[order])
    part = np.repeat(np.arange(slots), np.diff(csr.indptr)) * chunks + csr.indices // columns
    counts = np.bincount(part, minlength=slots * chunks)
    starts = np.concatenate([[0], np.cumsum(-(-counts // VECTOR))])
    # Zeros are at a column of their own chunk: others are not in shared memory.
    padding = np.tile(np.arange(chunks, dtype=np.uint32) * columns, slots)
    vectors = np.repeat(padding << 16, np.diff(starts))[:, None].repeat(VECTOR, axis=1)
    before = np.concatenate([[0], np.cumsum(counts)])
    at = starts[part] * VECTOR + np.arange(csr.nnz) - before[part]
    halves = rounded(csr.data, dtype).view(np.uint16)
    vectors.reshape(-1)[at] = csr.indices.astype(np.uint32) << 16 | halves
    return {
        "pairs": np.concatenate([vectors, np.zeros((32 * AHEAD, VECTOR), np.uint32)]),
        "order": order.astype(np.int32),
        "starts": starts.astype(np.int32),
    }


def _order(lengths: np.ndarray) -> np.ndarray:
    """Rows, the longest of every window first, and the longest windows first."""
    by_window = lengths.reshape(-1, WINDOW)
    windows = np.argsort(-by_window.sum(axis=1), kind="stable")
    within = np.argsort(-by_window, axis=1, kind="stable")
    order: np.ndarray = (windows[:, None] * WINDOW + within[windows]).ravel()
    return order


@dataclass(frozen=True)
class RowTile:
    """What one thread block computes, and its lanes.

    The lanes of a warp are shared out among ``row_lanes`` rows, ``value_lanes`` vectors of a row's
    pairs, and tokens.

    Attributes
    ----------
    tokens : int
        Of a block.
    row_lanes, value_lanes : int
        Rows that a warp multiplies at a time, and lanes that share the pairs of a row.
    bundles : int
        How many times ``row_lanes`` rows a warp sums.
    chunks : int
        Chunks of columns that are in shared memory at a time.
    columns : int
        Of a chunk.
    warps : int
        Of a block.
    """

    tokens: int
    row_lanes: int
    value_lanes: int
    bundles: int
    chunks: int
    columns: int
    warps: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def token_lanes(self) -> int:
        """Lanes that share a block's tokens."""
        return 32 // self.row_lanes // self.value_lanes

    @property
    def each(self) -> int:
        """Tokens of a lane."""
        return self.tokens // self.token_lanes

    @property
    def rows(self) -> int:
        """Outputs of a block."""
        return self.warps * self.row_lanes * self.bundles

    @property
    def sum_stride(self) -> int:
        """Floats from token to token where sums wait for the epilogue."""
        return self.rows + 1

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: activations, then sums in their place."""
        activations = self.chunks * self.columns * self.tokens * 2
        return max(activations, self.tokens * self.sum_stride * 4)


def row_tile(outputs: int, inputs: int, tokens: int | None) -> RowTile:
    """The tile of a layer that sees so many tokens at a time, or a usual number where None."""
    count = tokens or _TYPICAL_TOKENS
    size = min(64, max(2, 1 << (count - 1).bit_length()))
    row_lanes, token_lanes = 4 if size == 64 else 2, max(1, size // 8)
    value_lanes = 32 // row_lanes // token_lanes
    # Few tokens wait for memory more than they compute, and more warps wait for more of it.
    warps = 16 if size < 64 and outputs >= _WIDE else 8
    rows = row_lanes * warps
    groups = ceil(count / size)
    bundles = next(
        (b for b in _BUNDLES if ceil(outputs / (rows * b)) * groups >= _PROCESSORS), _BUNDLES[-1]
    )
    chunks, columns = chunks_of(inputs)
    at_once = min(chunks, _SHARED_BYTES // (columns * size * 2))
    return RowTile(size, row_lanes, value_lanes, bundles, at_once, columns, warps)
