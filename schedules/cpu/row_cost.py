"""Predicted seconds of the product of a weight and few rows of activations.

Where eight rows or fewer read a weight, its bytes decide, however few instructions there are; the
instructions count where they take longer, for small blocks. They are taken to come from the cache
that could hold them: a model that runs again and again finds its weights there, and it is there
that a dense weight is hard to beat. Needs no TVM.
"""

from __future__ import annotations

from math import gcd

import numpy as np

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cpu.block_arrays import index_dtype
from sparse_tvm.schedules.cpu.simd import ROW_COUNTS
from sparse_tvm.targets import Target


def outputs_in_lanes(layout: Layout, rows: int) -> bool:
    """Whether a block's outputs fill the vector lanes, rather than ``rows`` of activations."""
    outputs = layout.block[0]
    return not layout.sparse or (outputs in (4, 8, 16) and rows <= outputs // 2)


def few_rows_seconds(
    shape: tuple[int, int], layout: Layout, blocks: int, target: Target, tokens: int
) -> float:
    """Seconds on one core, for no more tokens than the largest of ``ROW_COUNTS``."""
    costs = target.costs
    (n, k), (rows, columns), parts = shape, layout.block, layout.get("parts", 1)
    count = next(c for c in ROW_COUNTS if c >= tokens)
    if outputs_in_lanes(layout, count):
        vectors = rows // gcd(rows, target.lanes)
        multiplied, loaded = vectors * count, vectors + count
    else:
        vectors = -(-count // target.lanes)
        multiplied, loaded = vectors * rows, vectors + rows
    block = columns * max(multiplied * costs.fma, loaded * costs.load)
    if layout.sparse:
        block += costs.load + costs.index * (2 if count > 1 else 1)
    segments = parts * -(-n // rows)
    compute = blocks * block + segments * (costs.row + count * rows * costs.load)
    copies = (n + k) * count * costs.load
    index_bytes = np.dtype(index_dtype(k)).itemsize if layout.sparse else 0
    stored_bytes = blocks * (4 * rows * columns + index_bytes)
    near = stored_bytes <= target.caches.l2
    streamed = stored_bytes / (costs.second if near else costs.last)
    return target.seconds(max(compute, streamed) + copies)
