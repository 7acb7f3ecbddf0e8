"""Weights as the arrays that kernels read: blocks, where they belong, and who computes them."""

from __future__ import annotations

from math import lcm

import numpy as np

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cpu.simd import LANES
from sparse_tvm.sparsity.formats import BSR
from sparse_tvm.sparsity.quantise import round_to_bf16
from sparse_tvm.sparsity.sliced import SlicedRows

JOBS_PER_GROUP = 16
"""Row partitions per group of tiles: enough to balance up to sixteen threads on one group."""

STEPS_TOGETHER = 4
"""Steps of a slice whose places lie in one word per lane."""

_MOST_FILLED = 1.4
"""How many times as many blocks rows may have for being equally long."""


def index_dtype(k_in: int) -> str:
    """Type of column indices: the smaller, the less streams from memory."""
    return "uint16" if k_in <= 1 << 16 else "int32"


def value_dtype(layout: Layout) -> np.dtype:
    """Type of the stored values: a layout's parameters ``float16`` and ``bfloat16`` say so.

    NumPy has no bfloat16: uint16, the bits of it.
    """
    if layout.get("float16", 0):
        return np.dtype(np.float16)
    return np.dtype(np.uint16 if layout.get("bfloat16", 0) else np.float32)


def stored_values(values: np.ndarray, layout: Layout) -> np.ndarray:
    """Values in the type that a layout has."""
    rounds = layout.get("bfloat16", 0)
    found = round_to_bf16(values) if rounds else values.astype(value_dtype(layout))
    return np.ascontiguousarray(found)


def block_diagonal(matrix: np.ndarray, groups: int) -> np.ndarray:
    """The weight ``[N, K]`` of a layer in groups as ``[N, K * groups]``, over all of its inputs."""
    if groups == 1:
        return matrix
    rows, columns = matrix.shape
    full = np.zeros((rows, groups * columns), matrix.dtype)
    for group in range(groups):
        part = slice(group * rows // groups, (group + 1) * rows // groups)
        full[part, group * columns : (group + 1) * columns] = matrix[part]
    return full


def stored_arrays(w: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """A weight ``[N, K]`` in blocks.

    Dense: ``data`` ``[ceil(N / r), K, r]``. Sparse: ``data`` ``[blocks, c, r]``, ``indices``
    (first column of each block), ``indptr`` (first block of each block row) and ``partition``
    (first block row of each job).
    """
    rows, columns = layout.block
    n, k = w.shape
    if not layout.sparse:
        padded = np.pad(w, ((0, -n % rows), (0, 0))) if n % rows else w
        blocks = padded.reshape(-1, rows, k).transpose(0, 2, 1)
        return {"data": np.ascontiguousarray(blocks, np.float32)}
    bsr = BSR.from_dense(w, layout.block)
    first_column = bsr.indices * columns
    data = bsr.data.transpose(0, 2, 1)
    overhang = first_column + columns - k
    if (overhang > 0).any():
        # The last block column ends at the weight's edge instead of beyond it.
        data, first_column = data.copy(), np.minimum(first_column, k - columns)
        for i in np.flatnonzero(overhang > 0):
            data[i] = np.roll(data[i], overhang[i], axis=0)
    if not data.shape[0]:  # an all-zero weight: kernels want at least one element
        data, first_column = np.zeros((1, columns, rows), np.float32), np.zeros(1, np.int32)
    return {
        "data": np.ascontiguousarray(data, np.float32),
        "indices": first_column.astype(np.int32),
        "indptr": bsr.indptr.astype(np.int32),
        "partition": balanced_partition(bsr.indptr),
    }


def stacked_rows(rows: int, layout: Layout, abreast: int = 1) -> int:
    """Rows of each matrix of a stack as it is stored: zeros fill up its last block, or slice."""
    multiple = layout.get("sell", 0) if layout.format == "sell" else layout.block[0] * abreast
    return -(-rows // multiple) * multiple


def stacked_multiple(layout: Layout) -> int:
    """Of how many block rows, of whole vectors of units, a stack's jobs have a multiple."""
    rows = layout.block[0]
    return lcm(rows, LANES) // rows


def split_arrays(
    w: np.ndarray, layout: Layout, together: int = 1, abreast: int = 1, stack: int | None = None
) -> dict[str, np.ndarray]:
    """The arguments of ``schedules.cpu.matmul`` for the weight ``[N, K]``.

    Those of `stored_arrays`; a sparse weight's blocks part by part, in each part job by job, and
    in each job the block rows by their number of blocks, with ``rows`` to tell which they are.
    Of a sparse weight each block row of a part has a multiple of ``together`` blocks: the last one
    again, with zeros, where there are fewer. A job has a multiple of ``abreast`` block rows, and
    every so many in that order have equally many blocks, where that takes few more zeros.
    Of a ``stack`` of so many matrices, one below the other, each of `stacked_rows`, a job has the
    same rows of every one, whole vectors of them.
    Besides, or with the format ``sell`` alone, those of `sliced_arrays`, if the layout wants them.
    """
    if stack is not None:
        each = w.reshape(stack, -1, w.shape[1])
        missing = stacked_rows(each.shape[1], layout, abreast) - each.shape[1]
        w = np.pad(each, ((0, 0), (0, missing), (0, 0))).reshape(-1, w.shape[1])
    if layout.format == "sell":
        return sliced_arrays(w, layout, stack)
    arrays = stored_arrays(w, layout)
    parts = layout.get("parts", 1)
    if not layout.sparse:
        return {"data": stored_values(arrays["data"], layout)}
    indptr, k = arrays["indptr"], w.shape[1]
    block_rows = len(indptr) - 1
    partition = _stack_partition(indptr, stack)
    partition[:-1] -= partition[:-1] % (abreast if stack is None else stacked_multiple(layout))
    row_of = np.repeat(np.arange(block_rows), np.diff(indptr))
    part_of = arrays["indices"][: len(row_of)].astype(np.int64) * parts // k
    counts = np.zeros((parts, block_rows), np.int64)
    np.add.at(counts, (part_of, row_of), 1)
    stored = counts + -counts % together
    matrix, row_of_matrix = np.divmod(np.arange(block_rows), block_rows // (stack or 1))
    job_of = np.searchsorted(partition, row_of_matrix, side="right") + JOBS_PER_GROUP * matrix
    rows = np.stack([np.lexsort((of_part, job_of)) for of_part in stored])
    place = np.empty_like(rows)
    np.put_along_axis(place, rows, np.arange(block_rows)[None], axis=1)
    order = np.lexsort((place[part_of, row_of], part_of))
    real, filled = (np.take_along_axis(each, rows, axis=1) for each in (counts, stored))
    real, filled = real.ravel(), _made_equal(filled, abreast).ravel()
    within = np.arange(filled.sum()) - np.repeat(np.cumsum(filled) - filled, filled)
    last = np.repeat(real - 1, filled)
    taken = order[np.repeat(np.cumsum(real) - real, filled) + np.minimum(within, last)]
    data = arrays["data"][taken] * (within <= last)[:, None, None]
    if not len(taken):  # the one block of a weight without any
        data, taken = arrays["data"], np.zeros(1, np.int64)
    indices = arrays["indices"][taken].astype(index_dtype(k))
    if value_dtype(layout) != np.float32:
        # Read in vectors, of which the last may end behind the last block.
        more = -(-LANES // data[0].size)
        data, indices = np.pad(data, ((0, more), (0, 0), (0, 0))), np.pad(indices, (0, more))
    return {
        "data": stored_values(data, layout),
        "indices": indices,
        "indptr": np.concatenate([[0], np.cumsum(filled)]).astype(np.int32),
        "rows": rows.astype(np.int32).ravel(),
        "partition": partition,
        **(sliced_arrays(w, layout, stack) if layout.get("sell", 0) else {}),
    }


def sliced_arrays(w: np.ndarray, layout: Layout, stack: int | None = None) -> dict[str, np.ndarray]:
    """A weight ``[N, K]`` in slices, as :class:`stored_weight.SlicedWeight` has its arrays."""
    lanes = layout.get("sell", 0)
    rows = SlicedRows.from_dense(w, lanes, STEPS_TOGETHER)
    data, places, windows = rows.data, rows.places, rows.windows
    if not len(data):  # an all-zero weight: kernels want at least one element
        data = np.zeros((STEPS_TOGETHER, lanes), np.float32)
        places, windows = data.astype(np.uint8), np.zeros(STEPS_TOGETHER, np.int32)
    words = places.reshape(-1, STEPS_TOGETHER, lanes).swapaxes(1, 2)
    return {
        "sliced_data": stored_values(data.reshape(-1, STEPS_TOGETHER, lanes), layout),
        "sliced_places": np.ascontiguousarray(words).view("<i4")[..., 0],
        "sliced_windows": windows.reshape(-1, STEPS_TOGETHER).astype(index_dtype(w.shape[1])),
        "slices": rows.indptr // STEPS_TOGETHER,
        "sliced_partition": _stack_partition(rows.indptr, stack),
    }


def _stack_partition(indptr: np.ndarray, stack: int | None) -> np.ndarray:
    """`balanced_partition`, of a stack's rows of equal numbers together."""
    counts = np.diff(indptr).reshape(stack or 1, -1).sum(axis=0)
    return balanced_partition(np.concatenate([[0], np.cumsum(counts)]))


def _made_equal(counts: np.ndarray, abreast: int) -> np.ndarray:
    """Counts ``[parts, block rows]``, every so many made as large as the largest of them.

    They stay as they are where one is 0, or all together would be much larger.
    """
    block_rows = counts.shape[1]
    whole = np.pad(counts, ((0, 0), (0, -block_rows % abreast)))
    each = whole.reshape(len(counts), -1, abreast)
    equal = np.broadcast_to(each.max(axis=2, keepdims=True), each.shape)
    cheap = equal.sum(axis=2, keepdims=True) <= _MOST_FILLED * each.sum(axis=2, keepdims=True)
    filled = np.where(cheap & each.all(axis=2, keepdims=True), equal, each)
    return filled.reshape(whole.shape)[:, :block_rows]


def balanced_partition(indptr: np.ndarray, jobs: int = JOBS_PER_GROUP) -> np.ndarray:
    """First block row of each job, so that all jobs have about equally much to do.

    Returns
    -------
    np.ndarray
        int32 ``[jobs + 1]``; a block row counts as its stored blocks and two more.
    """
    work = indptr.astype(np.int64) + 2 * np.arange(len(indptr))
    bounds = np.searchsorted(work, np.linspace(0, work[-1], jobs + 1))
    bounds[0], bounds[-1] = 0, len(indptr) - 1
    return np.maximum.accumulate(bounds).astype(np.int32)
