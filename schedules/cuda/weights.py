"""Layers' weights as the arrays that kernels on tensor cores read."""

from __future__ import annotations

import numpy as np

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cuda.fragments import ROWS, STEP, compress, fragments, places_of
from sparse_tvm.sparsity.formats import BSR

LARGEST_HALF = 65504.0
"""Float16's largest number."""


def pieces_per_step(layout: Layout) -> int:
    """How many blocks' columns make one step."""
    return max(1, STEP // layout.block[1]) if layout.format == "bsr" else 1


def weight_arrays(w: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """A weight ``[N, K]`` in fragments, for each step of 32 columns.

    Dense: ``data`` ``[ceil(N / 16), steps, 2, 32, 4]``. 2:4: ``data`` ``[.., steps, 32, 4]``, and
    ``places`` ``[ceil(N / 16), steps, 16]``. BSR: only the steps with stored blocks, block row by
    block row: ``data`` ``[steps, block rows / 16, 2, 32, 4]``, ``columns``, the first of each piece
    of a step, and ``indptr``, the first step of each block row.

    Raises
    ------
    ValueError
        When the layout is 2:4, and the weight is not.
    """
    rows, columns = layout.block if layout.format == "bsr" else (ROWS, STEP)
    columns = max(columns, STEP)
    half = np.zeros((-(-w.shape[0] // rows) * rows, -(-w.shape[1] // columns) * columns), "<f2")
    half[: w.shape[0], : w.shape[1]] = np.clip(w, -LARGEST_HALF, LARGEST_HALF)
    if layout.format == "bsr":
        return _bsr_arrays(half, layout)
    by_step = half.reshape(len(half) // ROWS, ROWS, -1, STEP).swapaxes(1, 2)
    if layout.format == "2:4":
        values, places = compress(by_step)
        return {
            "data": np.ascontiguousarray(fragments(values)[:, :, 0, 0]),
            "places": np.ascontiguousarray(places_of(places)[:, :, 0, 0]),
        }
    return {"data": np.ascontiguousarray(fragments(by_step)[:, :, 0])}


def _bsr_arrays(half: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    bsr = BSR.from_dense(half.astype(np.float32), layout.block)
    rows, columns = layout.block
    pieces = pieces_per_step(layout)
    data, first, counts = [], [], []
    for group in range(len(bsr.indptr) - 1):
        start, end = bsr.indptr[group : group + 2]
        blocks = bsr.data[start:end].astype(np.float16)
        at = bsr.indices[start:end].astype(np.int32) * columns
        if columns > STEP:  # several steps a block
            parts = columns // STEP
            blocks = blocks.reshape(-1, rows, parts, STEP).swapaxes(1, 2).reshape(-1, rows, STEP)
            at = (at[:, None] + STEP * np.arange(parts, dtype=np.int32)).ravel()
        short = -len(blocks) % pieces
        blocks = np.pad(blocks, ((0, short), (0, 0), (0, 0)))
        at = np.pad(at, (0, short))
        steps = len(blocks) // pieces
        by_piece = blocks.reshape(steps, pieces, rows, STEP // pieces)
        data.append(fragments(by_piece.swapaxes(1, 2).reshape(steps, rows, STEP)))
        first.append(at.reshape(steps, pieces))
        counts.append(steps)
    every, places = np.concatenate(data), np.concatenate(first)
    if not len(every):  # an all-zero weight: kernels want at least one element
        every = np.zeros((1, *every.shape[1:]), np.uint32)
        places = np.zeros((1, pieces), np.int32)
    return {
        "data": np.ascontiguousarray(every),
        "columns": np.ascontiguousarray(places, np.int32),
        "indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
    }
