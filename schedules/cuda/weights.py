"""Layers' weights as the arrays that kernels on tensor cores read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cuda.fragments import ROWS, STEP, compress, fragments, places_of
from sparse_tvm.sparsity.formats import BSR
from sparse_tvm.sparsity.quantise import round_to_bf16

LARGEST_HALF = 65504.0
"""Float16's largest number."""


def pieces_per_step(layout: Layout) -> int:
    """How many blocks' columns make one step."""
    return max(1, STEP // layout.block[1]) if layout.format == "bsr" else 1


def rounded(w: np.ndarray, dtype: str) -> np.ndarray:
    """A weight as float16, or as the bits of bfloat16 in uint16."""
    if dtype == "bfloat16":
        return round_to_bf16(w)
    half: np.ndarray = np.clip(w, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)
    return half


def weight_arrays(w: np.ndarray, layout: Layout, dtype: str = "float16") -> dict[str, np.ndarray]:
    """A weight ``[N, K]`` in fragments of float16 or bfloat16, for each step of 32 columns.

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
    whole = np.pad(w, ((0, -w.shape[0] % rows), (0, -w.shape[1] % columns)))
    if layout.format == "bsr":
        return _bsr_arrays(whole, layout, dtype)
    by_step = whole.reshape(len(whole) // ROWS, ROWS, -1, STEP).swapaxes(1, 2)
    if layout.format == "2:4":
        values, places = compress(by_step)
        return {
            "data": np.ascontiguousarray(fragments(rounded(values, dtype))[:, :, 0, 0]),
            "places": np.ascontiguousarray(places_of(places)[:, :, 0, 0]),
        }
    return {"data": np.ascontiguousarray(fragments(rounded(by_step, dtype))[:, :, 0])}


def _bsr_arrays(w: np.ndarray, layout: Layout, dtype: str) -> dict[str, np.ndarray]:
    bsr = BSR.from_dense(w, layout.block)
    rows, columns = layout.block
    pieces = pieces_per_step(layout)
    data, first, counts = [], [], []
    for group in range(len(bsr.indptr) - 1):
        start, end = bsr.indptr[group : group + 2]
        blocks = rounded(bsr.data[start:end], dtype)
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


def stacked(layers: Sequence[Sequence[np.ndarray]], layout: Layout) -> list[np.ndarray] | None:
    """The arrays of several layers, one below the other, as those of one layer.

    None where one has no blocks: what stands for them would shift those behind it.
    """
    if layout.format != "bsr":
        return [np.concatenate(arrays) for arrays in zip(*layers, strict=True)]
    data, columns, pointers = zip(*layers, strict=True)
    counts = [int(pointer[-1]) for pointer in pointers]
    if min(counts) == 0:
        return None
    starts = np.cumsum([0, *counts[:-1]])
    ends = [pointer[1:] + start for pointer, start in zip(pointers, starts, strict=True)]
    return [
        np.concatenate(data),
        np.concatenate(columns),
        np.concatenate([[0], *ends]).astype(np.int32),
    ]
