"""Weights of low precision as their kernels read them: blocks of words, and where they belong.

Every form is made from the weight's words ``[N, lines]`` (``sparse_tvm.sparsity.quantise``), so
one packing serves all number formats. A block is some rows by some lines; block rows are shared
out over jobs by their stored blocks, and sorted by their count within a job, for the CPU to
foresee where the loop over blocks ends.
"""

from __future__ import annotations

import numpy as np

from sparse_tvm.schedules.cpu.block_arrays import balanced_partition, index_dtype
from sparse_tvm.schedules.cpu.precision import INT8, ZERO_POINT, Precision
from sparse_tvm.sparsity.formats import occupied_blocks
from sparse_tvm.sparsity.quantise import LARGEST, quantise_rows, round_to_bf16


def rounded(
    w: np.ndarray, precision: Precision, largest: int = LARGEST, zero_point: int = ZERO_POINT
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Round a float32 weight ``[N, K]``: its elements, and the arguments of its rows.

    `largest` is the largest int8 weight that the kernel's instruction multiplies, and `zero_point`
    what it leaves in the activations.
    """
    if precision is not INT8:
        return round_to_bf16(w), {}
    values, scale = quantise_rows(w, min(largest, LARGEST))
    correction = -zero_point * values.astype(np.int32).sum(axis=1, dtype=np.int32)
    return values, {"correction": correction, "scale": scale}


def dense_rows(words: np.ndarray, rows: int, depth: int = 1) -> dict[str, np.ndarray]:
    """Every word, ``[ceil(N / rows), ceil(lines / depth), rows * depth]``."""
    padded = np.pad(words, ((0, -len(words) % rows), (0, -words.shape[1] % depth)))
    steps = padded.shape[1] // depth
    blocks = padded.reshape(-1, rows, steps, depth).swapaxes(1, 2)
    return {"data": np.ascontiguousarray(blocks).reshape(-1, steps, rows * depth)}


def sparse_rows(words: np.ndarray, rows: int, depth: int = 1) -> dict[str, np.ndarray]:
    """Blocks of ``rows`` by ``depth`` lines: ``data`` ``[blocks, rows * depth]``, and where they
    are."""
    occupied = occupied_blocks(words != 0, (rows, depth))
    order, places = in_order(occupied)
    blocks = dense_rows(words, rows, depth)["data"]
    block_rows, steps = block_positions(occupied, order)
    return {
        "data": at_least_one(blocks[block_rows, steps]),
        "indices": line_indices(steps[:, None], blocks.shape[1]),
        **places,
    }


def single_words(words: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """Words that are not zero, row by row, in groups of ``rows`` rows that are stored together.

    ``data`` is ``[words, 1, 1]``, and ``indptr`` has the first of each row; the rest is of groups.
    """
    padded = np.pad(words, ((0, -len(words) % rows), (0, 0)))
    groups = (padded != 0).reshape(-1, rows * words.shape[1])
    order, places = in_order(groups)
    stored = (order[:, None] * rows + np.arange(rows)).ravel()
    found = padded[stored]
    counts = np.count_nonzero(found, axis=1)
    return {
        "data": at_least_one(found[found != 0].reshape(-1, 1, 1)),
        "indices": line_indices(np.nonzero(found)[1], words.shape[1]),
        **places,
        "indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
    }


def in_order(occupied: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Block rows as they are stored, given which blocks they have, and the kernel's arrays."""
    return in_order_of_counts(np.count_nonzero(occupied, axis=1))


def in_order_of_counts(counts: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Block rows as they are stored, given how many blocks each has, and the kernel's arrays."""
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    partition = balanced_partition(starts)
    job_of = np.searchsorted(partition, np.arange(len(counts)), side="right")
    order = np.lexsort((counts, job_of))
    indptr = np.concatenate([[0], np.cumsum(counts[order])]).astype(np.int32)
    return order, {"indptr": indptr, "rows": order.astype(np.int32), "partition": partition}


def block_positions(occupied: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Block row and column of each stored block."""
    places, columns = np.nonzero(occupied[order])
    return order[places], columns


def at_least_one(blocks: np.ndarray) -> np.ndarray:
    """The blocks, or one of zeros: kernels want an element."""
    return blocks if len(blocks) else np.zeros((1, *blocks.shape[1:]), blocks.dtype)


def line_indices(lines: np.ndarray, count: int) -> np.ndarray:
    """Lines of an activation of ``count`` lines, in as few bytes as tell them apart."""
    return at_least_one(lines.astype(index_dtype(count)))
