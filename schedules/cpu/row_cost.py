"""Predicted seconds of the product of a weight and few rows of activations.

Where eight rows or fewer read a weight, its bytes decide, however few instructions there are; the
instructions count where they take longer, for small blocks. They are taken to come from the cache
that could hold them: a model that runs again and again finds its weights there, and it is there
that a dense weight is hard to beat. Needs no TVM.
"""

from __future__ import annotations

from math import gcd, inf

import numpy as np

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cpu.block_arrays import index_dtype, value_dtype
from sparse_tvm.schedules.cpu.simd import LANES, ROW_COUNTS
from sparse_tvm.sparsity.statistics import TYPICAL_COPIES
from sparse_tvm.targets import Target

_LEAST_LANES = 4
"""Of vectors that one instruction loads or fills."""

_MEASURED_LANES = 8
"""Where narrower vectors were timed: AVX2."""

_FILLED = 3.0
"""Zeros that fill a row of single weights up to whole fours, as many as its neighbours have."""

_SPREAD = 0.5
"""Multiply-adds' worth of shuffles for each weight that is spread with all rows over a vector of
more than eight lanes."""

_PICKED = 2.1
"""Cycles of a step of sliced rows, for each row of activations."""

_CACHED_BYTES, _CACHED = 24.0, 2
"""Bytes a cycle that come from a cache step after step, and how many times one core's share of the
last one is enough for that: the others seldom use theirs."""

_NEAR = 2
"""How many times the first cache X may fill before lines are waited for."""

_FAR = 0.2
"""Share of a weight in memory from which on it is asked for ahead."""

_OVERLAPPED = 0.4
"""Share of a far line's time that one takes of which few are asked for at a time."""


def outputs_in_lanes(layout: Layout, rows: int, lanes: int) -> bool:
    """Whether a block's outputs fill the vector lanes, rather than ``rows`` of activations."""
    outputs = layout.block[0]
    if four_together(layout, rows, lanes):
        return False
    return not layout.sparse or (outputs in (4, 8, 16) and rows <= outputs // 2)


def four_together(layout: Layout, rows: int, lanes: int) -> bool:
    """Whether four weights at a time, of small blocks, are spread over the lanes with all rows.

    Where shuffles spread any element of four. Pairs of weights by eight rows were no faster so on
    AVX2; on AVX-512 (Zen 4) blocks took 1.05 to 1.7 times as long.
    """
    if lanes < _MEASURED_LANES or not layout.sparse:
        return False
    if lanes > _MEASURED_LANES:
        return layout.block == (1, 1)
    return layout.block in ((1, 1), (4, 1)) or (layout.block == (2, 1) and rows < lanes)


def asks_ahead(
    shape: tuple[int, int], layout: Layout, blocks: int, target: Target, copies: float
) -> bool:
    """Whether few rows of activations are to ask for a weight although the CPU foresees it.

    Sparse weights that come from memory took 0.4 to 0.95 of the time so, those of a cache up to 1.5
    times as long; dense ones as long (AMD EPYC, Zen 4).
    """
    stored = _stored_bytes(shape[1], layout, blocks)
    return layout.sparse and target.foresees and target.caches.shares(copies * stored)[-1] > _FAR


def few_rows_seconds(
    shape: tuple[int, int],
    layout: Layout,
    blocks: int,
    target: Target,
    tokens: int,
    copies: float = TYPICAL_COPIES,
) -> float:
    """Seconds on one core, for no more tokens than the largest of ``ROW_COUNTS``.

    ``copies`` is as :class:`~sparse_tvm.sparsity.statistics.WeightStatistics` has it.
    """
    count = next(c for c in ROW_COUNTS if c >= tokens)
    compute = _compute_cycles(shape, layout, blocks, target, count)
    stored = _stored_bytes(shape[1], layout, blocks)
    x_bytes = 4 * count * shape[1] / layout.get("parts", 1) if layout.sparse else 0.0
    if layout.sparse and layout.block == (1, 1):
        x_bytes = inf  # what is read next is known too late, however near it is
    cycles = _read_once(compute, stored, layout.sparse, target, copies, x_bytes)
    return target.seconds(cycles + sum(shape) * count * _load(1, target))


def sliced_rows_seconds(
    shape: tuple[int, int],
    layout: Layout,
    steps: int,
    target: Target,
    tokens: int,
    copies: float = TYPICAL_COPIES,
) -> float:
    """The same for the sliced rows that a layout has, which take so many steps."""
    count = next(c for c in ROW_COUNTS if c >= tokens)
    compute = _sliced_cycles(shape[0], layout, steps, target, count)
    stored = _sliced_bytes(shape[1], layout, steps)
    cycles = _read_once(compute, stored, True, target, copies, 4.0 * count * shape[1])
    return target.seconds(cycles + sum(shape) * count * _load(1, target))


def _load(lanes: int, target: Target) -> float:
    """Cycles to load a vector of so many lanes."""
    return target.costs.load * _share(lanes, target)


def _share(lanes: int, target: Target) -> float:
    """Of a whole vector's time, what a narrower one takes."""
    return target.costs.narrow if 2 * lanes <= target.lanes else 1.0


def _read_once(
    compute: float, stored: int, sparse: bool, target: Target, copies: float, x_bytes: float
) -> float:
    """Cycles of so much arithmetic, and for one of so many weights to arrive."""
    costs = target.costs
    near, cached, far = (stored * share for share in target.caches.shares(copies * stored))
    second = near / costs.second
    streamed = cached / costs.last + far * target.memory_cycles(x_bytes)
    waited_for = 0.5 if sparse else 0.0  # the rest comes while it computes
    return second + max(streamed, compute + waited_for * streamed)


def sequences_together(lanes: int) -> tuple[int, ...]:
    """How many sequences' states are multiplied together: fewer count as so many."""
    return 1, 4, max(8, lanes)


def sequence_seconds(
    shape: tuple[int, int], layout: Layout, blocks: int, target: Target, sequences: int
) -> float:
    """Seconds on one core for a step of so many sequences.

    The arrival of the weight and the arithmetic overlap little: a step is too short.
    """
    costs = target.costs
    streamed = _step_cycles(_stored_bytes(shape[1], layout, blocks), target)
    cycles = 0.0
    for count in _counts(target.lanes, sequences):
        cycles += streamed + _compute_cycles(shape, layout, blocks, target, count)
        together = four_together(layout, count, target.lanes)
        if layout.block == (1, 1) and count == 1 and not together:
            cycles -= blocks * costs.load  # scalars: nothing waits for an index
    return target.seconds(cycles)


def sliced_sequence_seconds(
    shape: tuple[int, int], layout: Layout, steps: int, target: Target, sequences: int
) -> float:
    """The same for a weight in sliced rows: half of what arrives comes while it computes."""
    streamed = _step_cycles(_sliced_bytes(shape[1], layout, steps), target)
    return target.seconds(
        sum(
            _sliced_cycles(shape[0], layout, steps, target, count) + streamed / 2
            for count in _counts(target.lanes, sequences)
        )
    )


def _step_cycles(stored: int, target: Target) -> float:
    """Cycles for a weight to arrive that the step before had, too: from a cache that holds it."""
    cached = stored <= _CACHED * target.caches.l3
    return stored / (_CACHED_BYTES if cached else 2 * target.costs.last)


def _sliced_cycles(n: int, layout: Layout, steps: int, target: Target, count: int) -> float:
    return steps * _PICKED * count + -(-n // layout.get("sell", 1)) * target.costs.row


def _sliced_bytes(k: int, layout: Layout, steps: int) -> int:
    place = 1
    of_lanes = layout.get("sell", 1) * (value_dtype(layout).itemsize + place)
    return steps * (of_lanes + np.dtype(index_dtype(k)).itemsize)


def _counts(lanes: int, sequences: int) -> list[int]:
    """As how many each group of sequences counts."""
    counts = sequences_together(lanes)
    groups, rest = divmod(sequences, counts[-1])
    return [counts[-1]] * groups + [next(c for c in counts if c >= rest)] * (rest > 0)


def _compute_cycles(
    shape: tuple[int, int], layout: Layout, blocks: int, target: Target, count: int
) -> float:
    """Cycles of the arithmetic, all operands being near."""
    costs = target.costs
    (n, k), (rows, columns), parts = shape, layout.block, layout.get("parts", 1)
    together = four_together(layout, count, target.lanes)
    if together:
        share = rows / 4  # of a load of weights that a block takes
        lanes = min(target.lanes, 4 * count)
        multiplied = share * (4 * count / lanes) * costs.fma * _share(lanes, target)
        if lanes > _MEASURED_LANES:
            multiplied += _SPREAD * costs.fma
        loaded = share * _load(4, target) + _load(count, target)
    elif outputs_in_lanes(layout, count, target.lanes):
        lanes = gcd(rows, target.lanes)
        vectors = rows // lanes
        multiplied = vectors * count * costs.fma * _share(lanes, target)
        loaded = vectors * _load(lanes, target) + count * _load(1, target)
        if lanes < _LEAST_LANES and target.lanes == _MEASURED_LANES:
            multiplied, loaded = 2 * multiplied, 2 * loaded  # pairs are put together first
    else:
        lanes = min(target.lanes, count)
        vectors = count // lanes
        multiplied = vectors * rows * costs.fma * _share(lanes, target)
        loaded = vectors * _load(lanes, target) + rows * _load(1, target)
    block = columns * target.beside(loaded, multiplied)
    row, segments = costs.row, parts * -(-n // rows)
    if together and rows == 1:
        blocks += round(_FILLED * segments)
        block += _line_cycles(k / parts, target)
    elif together and rows < 4:
        row *= 2  # what is left of a row by fours has a loop of its own
    if layout.sparse:
        index = _load(1, target)
        block += index / (2 if together and rows == 1 else 1)  # one load of four indices
        block += costs.index if rows > 1 else 0
    return blocks * block + segments * (row + count * rows * _load(1, target))


def _line_cycles(columns: float, target: Target) -> float:
    """Mean cycles to wait for a column's line of X, of so many that are read at random."""
    hits = min(1.0, _NEAR * target.caches.l1 / (columns * LANES * 4))
    return (1 - hits) * _OVERLAPPED * target.costs.l2_line


def _stored_bytes(k: int, layout: Layout, blocks: int) -> int:
    rows, columns = layout.block
    index_bytes = np.dtype(index_dtype(k)).itemsize if layout.sparse else 0
    return blocks * (value_dtype(layout).itemsize * rows * columns + index_bytes)
