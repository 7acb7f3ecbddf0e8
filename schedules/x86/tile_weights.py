"""Weights of low precision as matrix units read them: tiles of sixteen rows by sixteen words.

Made from the weight's words, and shared out over jobs, as :mod:`sparse_tvm.schedules.cpu
.word_weights` explains.
"""

from __future__ import annotations

import numpy as np

from sparse_tvm.schedules.cpu.precision import LINES
from sparse_tvm.schedules.cpu.word_weights import (
    at_least_one,
    block_positions,
    in_order,
    in_order_of_counts,
    line_indices,
)
from sparse_tvm.schedules.x86.units import TILE_ROWS
from sparse_tvm.sparsity.formats import occupied_blocks

_OVERREAD = 64
"""Bytes behind packed elements that an expansion may read."""


def dense_tiles(words: np.ndarray, height: int) -> dict[str, np.ndarray]:
    """Every tile, ``[block rows, K tiles, height, 16, 16]``; a block row is ``height`` tiles."""
    return {"data": _tiles(words, height)}


def skipped_tiles(words: np.ndarray, height: int) -> dict[str, np.ndarray]:
    """The blocks of ``height`` tiles that hold a non-zero: ``[blocks, height, 16, 16]``."""
    tiles = _tiles(words, height)
    occupied = (tiles != 0).any(axis=(2, 3, 4))
    order, places = in_order(occupied)
    block_rows, columns = block_positions(occupied, order)
    return {
        "data": at_least_one(tiles[block_rows, columns]),
        "indices": line_indices(columns[:, None] * LINES, words.shape[1]),
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
    order, places = in_order_of_counts(chunks)
    data = np.zeros((max(int(chunks.sum()), 1), height, TILE_ROWS, LINES), np.int32)
    indices = np.zeros((len(data), LINES), np.int64)
    by_rows = padded.reshape(-1, height, TILE_ROWS, count)
    for start, block_row in zip(places["indptr"], order, strict=False):
        lines = np.flatnonzero(occupied[block_row])
        for first in range(0, len(lines), LINES):
            some, chunk = lines[first : first + LINES], start + first // LINES
            data[chunk, ..., : len(some)] = by_rows[block_row][..., some]
            indices[chunk, : len(some)] = some
    return {"data": data, "indices": line_indices(indices, count), **places}


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


def chunks_of(planes: int) -> tuple[int, int]:
    """Into how many chunks so many planes of words are cut, and how many are in each."""
    lines = min(LINES, planes)
    return -(-planes // lines), lines


def image_tiles(words: np.ndarray, taps: int, height: int) -> dict[str, np.ndarray]:
    """A convolution's words ``[N, planes * taps]``, tap by tap, in chunks of planes.

    ``data`` is ``[block rows, taps, chunks, height, 16, planes of a chunk]``.
    """
    planes = words.shape[1] // taps
    chunks, lines = chunks_of(planes)
    rows = height * TILE_ROWS
    by_plane = np.pad(words, ((0, -len(words) % rows), (0, 0))).reshape(-1, planes, taps)
    parts = []
    for chunk in range(chunks):
        start = min(chunk * lines, planes - lines)
        part = by_plane[:, start : start + lines].copy()
        part[:, : chunk * lines - start] = 0  # planes of the chunk before
        parts.append(part)
    tiles = np.stack(parts).reshape(chunks, -1, height, TILE_ROWS, lines, taps)
    return {"data": np.ascontiguousarray(tiles.transpose(1, 5, 0, 2, 3, 4))}
