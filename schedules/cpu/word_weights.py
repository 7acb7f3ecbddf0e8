"""Weights of low precision as their kernels read them: blocks of words, and where they belong.

Every form is made from the weight's words ``[N, lines]`` (``sparse_tvm.sparsity.quantise``), so
one packing serves all number formats. A block is some rows by some lines; block rows are shared
out over jobs by their stored blocks, and sorted by their count within a job, for the CPU to
foresee where the loop over blocks ends.
"""

from __future__ import annotations

import numpy as np

from sparse_tvm.schedules.cpu.block_arrays import balanced_partition, index_dtype
from sparse_tvm.schedules.cpu.precision import INT8, LINES, ZERO_POINT, Precision
from sparse_tvm.schedules.x86.units import TILE_ROWS
from sparse_tvm.sparsity.formats import occupied_blocks
from sparse_tvm.sparsity.quantise import LARGEST, quantise_rows, round_to_bf16

_OVERREAD = 64
"""Bytes behind packed elements that an expansion may read."""


def rounded(
    w: np.ndarray, precision: Precision, largest: int = LARGEST, zero_point: int = ZERO_POINT
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Round a float32 weight ``[N, K]``: its elements, and the arguments of its rows.

    `largest` is the largest int8 weight, and `zero_point` what the kernel's instruction leaves in
    the activations.
    """
    if precision is not INT8:
        return round_to_bf16(w), {}
    values, scale = quantise_rows(w, largest)
    correction = -zero_point * values.astype(np.int32).sum(axis=1, dtype=np.int32)
    return values, {"correction": correction, "scale": scale}


def dense_rows(words: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """Every word, ``[ceil(N / rows), lines, rows]``."""
    padded = np.pad(words, ((0, -len(words) % rows), (0, 0)))
    blocks = padded.reshape(-1, rows, words.shape[1]).swapaxes(1, 2)
    return {"data": np.ascontiguousarray(blocks)}


def sparse_rows(words: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """Blocks of ``rows`` by one line: ``data`` ``[blocks, rows]``, and where they are."""
    occupied = occupied_blocks(words != 0, (rows, 1))
    order, places = _in_order(occupied)
    blocks = dense_rows(words, rows)["data"]
    block_rows, lines = _block_positions(occupied, order)
    return {
        "data": _at_least_one(blocks[block_rows, lines]),
        "indices": _indices(lines[:, None], words.shape[1]),
        **places,
    }


def dense_tiles(words: np.ndarray, height: int) -> dict[str, np.ndarray]:
    """Every tile, ``[block rows, K tiles, height, 16, 16]``; a block row is ``height`` tiles."""
    return {"data": _tiles(words, height)}


def skipped_tiles(words: np.ndarray, height: int) -> dict[str, np.ndarray]:
    """The blocks of ``height`` tiles that hold a non-zero: ``[blocks, height, 16, 16]``."""
    tiles = _tiles(words, height)
    occupied = (tiles != 0).any(axis=(2, 3, 4))
    order, places = _in_order(occupied)
    block_rows, columns = _block_positions(occupied, order)
    return {
        "data": _at_least_one(tiles[block_rows, columns]),
        "indices": _indices(columns[:, None] * LINES, words.shape[1]),
        **places,
    }


def gathered_tiles(words: np.ndarray, height: int) -> dict[str, np.ndarray]:
    """The lines that a block row needs, sixteen to a tile: ``[chunks, height, 16, 16]``.

    ``indices`` ``[chunks, 16]`` tells which; a block row's last chunk is filled up with the first
    line and weights of zero.
    """
    n, count = words.shape
    rows = height * TILE_ROWS
    padded = np.pad(words, ((0, -n % rows), (0, 0)))
    occupied = occupied_blocks(padded != 0, (rows, 1))
    chunks = -(-np.count_nonzero(occupied, axis=1) // LINES)
    order, places = _in_order_of_counts(chunks)
    data = np.zeros((max(int(chunks.sum()), 1), height, TILE_ROWS, LINES), np.int32)
    indices = np.zeros((len(data), LINES), np.int64)
    by_rows = padded.reshape(-1, height, TILE_ROWS, count)
    for start, block_row in zip(places["indptr"], order, strict=False):
        lines = np.flatnonzero(occupied[block_row])
        for first in range(0, len(lines), LINES):
            some, chunk = lines[first : first + LINES], start + first // LINES
            data[chunk, ..., : len(some)] = by_rows[block_row][..., some]
            indices[chunk, : len(some)] = some
    return {"data": data, "indices": _indices(indices, count), **places}


def expanded_tiles(values: np.ndarray, height: int) -> dict[str, np.ndarray]:
    """The non-zeros of an unstructured weight's elements, and a bit mask of where they go.

    ``packed`` int8, tile by tile and row by row, ``masks`` int64 (int8) or int32 (bf16)
    ``[block rows, K tiles, height, 16]``, one per row of a tile, and ``offsets`` int32, the first
    byte of each block row in ``packed``.
    """
    unit = 4 // values.dtype.itemsize
    n, k = values.shape
    rows, columns = height * TILE_ROWS, LINES * unit
    padded = np.pad(values, ((0, -n % rows), (0, -k % columns)))
    tiled = padded.reshape(-1, height, TILE_ROWS, padded.shape[1] // columns, columns)
    tiled = tiled.transpose(0, 3, 1, 2, 4)
    kept = tiled != 0
    bits = np.packbits(kept, axis=-1, bitorder="little")
    masks = np.ascontiguousarray(bits).view(f"<i{columns // 8}")[..., 0]
    counts = np.count_nonzero(kept, axis=(1, 2, 3, 4)) * values.dtype.itemsize
    packed = np.ascontiguousarray(tiled[kept]).view(np.int8)
    return {
        "packed": np.concatenate([packed, np.zeros(_OVERREAD, np.int8)]),
        "masks": np.ascontiguousarray(masks),
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
    }


def _tiles(words: np.ndarray, height: int) -> np.ndarray:
    """``[N, lines]`` as ``[block rows, K tiles, height, 16, 16]``, zeros at the edges."""
    n, lines = words.shape
    padded = np.pad(words, ((0, -n % (height * TILE_ROWS)), (0, -lines % LINES)))
    split = padded.reshape(-1, height, TILE_ROWS, padded.shape[1] // LINES, LINES)
    return np.ascontiguousarray(split.transpose(0, 3, 1, 2, 4))


def _in_order(occupied: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return _in_order_of_counts(np.count_nonzero(occupied, axis=1))


def _in_order_of_counts(counts: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Block rows as they are stored, given how many blocks each has, and the kernel's arrays."""
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    partition = balanced_partition(starts)
    job_of = np.searchsorted(partition, np.arange(len(counts)), side="right")
    order = np.lexsort((counts, job_of))
    indptr = np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int32)
    return order, {"indptr": indptr, "rows": order.astype(np.int32), "partition": partition}


def _block_positions(occupied: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Block row and column of each stored block."""
    places, columns = np.nonzero(occupied[order])
    return order[places], columns


def _at_least_one(blocks: np.ndarray) -> np.ndarray:
    """The blocks, or one of zeros: kernels want an element."""
    return blocks if len(blocks) else np.zeros((1, *blocks.shape[1:]), blocks.dtype)


def _indices(lines: np.ndarray, count: int) -> np.ndarray:
    return _at_least_one(lines.astype(index_dtype(count)))
