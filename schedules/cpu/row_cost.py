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
from sparse_tvm.schedules.cpu.simd import LANES, ROW_COUNTS, most_sliced_rows
from sparse_tvm.sparsity.statistics import TYPICAL_COPIES
from sparse_tvm.targets import Target
from sparse_tvm.targets.target import beside

_LEAST_LANES = 4
"""Of vectors that one instruction loads or fills."""

_MEASURED_LANES = 8
"""Where narrower vectors were timed: AVX2."""

_APART = 2.3
"""How well arithmetic and the arrival of weights from beyond the second cache keep out of each
other's way (see :func:`~sparse_tvm.targets.target.beside`)."""

_INDEX = 0.5
"""Of a narrow load's time, what the load of an index takes: integers have ports of their own."""

_FILLED, _FILLED_ROW = 3.0, 0.4
"""Zeros that fill a row of single weights up to whole fours, as many as its neighbours have, and
what share of a block row's time it takes with more than eight lanes."""

_KEPT, _FORESEEN = 0.3, 0.15
"""Share of the first cache that keeps X beside a stream of weights, and of a far line's time, what
one takes that the CPU foresees."""

_SPREAD = 0.6
"""Multiply-adds' worth of shuffles for each weight that is spread with all rows over a vector of
more than eight lanes."""

_STEP, _PICKED = {8: 0.0, 16: 1.4}, {8: 2.0, 16: 1.4}
"""Cycles of a step of sliced rows, and for each row of activations, by lanes (Zen 3, Zen 4)."""

_CACHED_BYTES, _CACHED = 24.0, 2
"""Bytes a cycle that come from a cache step after step, and how many times one core's share of the
last one is enough for that: the others seldom use theirs."""

_NEAR = 2
"""How many times the first cache X may fill before lines are waited for."""

_FILLING, _SEVERAL, _FAR = 0.6, 4, 1.25
"""How far weights fill the last cache that several rows ask for them ahead, how many these are, and
how far they fill it that one does."""

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


def asks_from(
    shape: tuple[int, int], layout: Layout, blocks: int, target: Target, copies: float
) -> int:
    """From how many rows of activations on a weight is asked for although the CPU foresees it.

    0 is never. Sparse weights that come from memory took 0.4 to 0.95 of the time so, those of a
    cache up to 1.3 times as long with one row and 1.2 with four; dense ones as long. Others want
    the last cache too: four rows that asked for 10 to 20 MB took 0.3 to 1.1 of the time. Single
    weights lose nothing by asking, and soon come half as fast without (AMD EPYC, Zen 4).
    """
    if not (layout.sparse and target.foresees):
        return 0
    nbytes = copies * _stored_bytes(shape[1], layout, blocks)
    filled = target.caches.filled(nbytes)
    if filled > _FAR:
        return 1
    if layout.block == (1, 1) and nbytes > target.caches.l2:
        lanes = layout.get("sell", 0)
        alone = most_sliced_rows(lanes) + 1 if lanes else 1
        return min(alone, _SEVERAL) if filled > _FILLING else alone
    return _SEVERAL if filled > _FILLING else 0


def asks(layout: Layout, rows: int) -> bool:
    """Whether so many rows of activations are to ask for a weight, by its layout."""
    return 0 < layout.get("ask", 0) <= rows


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
    if layout.sparse and layout.block == (1, 1) and not asks(layout, count):
        x_bytes = inf  # what is read next is known too late, however near it is
    cycles = _read_once(compute, stored, target, copies, x_bytes)
    return target.seconds(cycles + _moves(shape, count, target))


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
    cycles = _read_once(compute, stored, target, copies, 4.0 * count * shape[1])
    return target.seconds(cycles + _moves(shape, count, target))


def _moves(shape: tuple[int, int], count: int, target: Target) -> float:
    """Cycles to copy X and the outputs of so many rows: each feature is a line of a tile."""
    costs = target.costs
    return sum(shape) * (costs.load + costs.l2_line + (count - 1) * _load(1, target) / 2)


def _load(lanes: int, target: Target) -> float:
    """Cycles to load a vector of so many lanes."""
    return target.costs.load * _share(lanes, target)


def _share(lanes: int, target: Target) -> float:
    """Of a whole vector's time, what a narrower one takes."""
    return target.costs.narrow if 2 * lanes <= target.lanes else 1.0


def _read_once(compute: float, stored: int, target: Target, copies: float, x_bytes: float) -> float:
    """Cycles of so much arithmetic, and for one of so many weights to arrive."""
    costs = target.costs
    near, cached, far = (stored * share for share in target.caches.shares(copies * stored))
    nearby = target.beside(near / costs.second, compute)
    streamed = cached / costs.last + far * target.memory_cycles(x_bytes)
    return beside(nearby, streamed, _APART)


def sequences_together(lanes: int) -> tuple[int, ...]:
    """How many sequences' states are multiplied together: fewer count as so many."""
    return tuple(sorted({*ROW_COUNTS, max(ROW_COUNTS[-1], lanes)}))


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
    lanes = layout.get("sell", 0)
    return steps * (_STEP[lanes] + _PICKED[lanes] * count) + -(-n // lanes) * target.costs.row


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
    block = columns * target.beside(*_column_cycles(layout, target, count))
    row, segments = costs.row, parts * -(-n // rows)
    if layout.sparse:
        block += _INDEX * _load(1, target) + (costs.index if rows > 1 else 0)
    if four_together(layout, count, target.lanes):
        if rows == 1:
            blocks += round(_FILLED * segments)
            block += _line_cycles(k / parts, target)
            row *= _FILLED_ROW if target.lanes > _MEASURED_LANES else 1
        elif rows < 4:
            row *= 2  # what is left of a row by fours has a loop of its own
    elif layout.sparse:
        step = count * n * k / max(1, rows * blocks)  # in X, from one block's values to the next's
        block += _next_line_cycles(4 * count * k / parts, target) * min(1.0, step / LANES)
    return blocks * block + segments * row


def _column_cycles(layout: Layout, target: Target, count: int) -> tuple[float, float]:
    """Cycles of the loads, and of the multiply-adds, for a column of a block."""
    costs, rows = target.costs, layout.block[0]
    if four_together(layout, count, target.lanes):
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
    elif count == 1:  # outputs in lanes as well, to LLVM
        multiplied = costs.fma * _share(rows, target)
        loaded = _load(rows, target) + _load(1, target)
    else:
        lanes = min(target.lanes, count)
        vectors = count // lanes
        multiplied = vectors * rows * costs.fma * _share(lanes, target)
        loaded = vectors * _load(lanes, target) + rows * _load(1, target)
    if rows > 1 and asks(layout, count):
        loaded += _load(1, target) * (1 if rows < LANES else 2)  # whose lines it shares with others
    return loaded, multiplied


def _next_line_cycles(x_bytes: float, target: Target) -> float:
    """Mean cycles to wait for the next line of so many bytes of X, which are read in order."""
    hits = min(1.0, _KEPT * target.caches.l1 / x_bytes)
    return (1 - hits) * _FORESEEN * target.costs.l2_line


def _line_cycles(columns: float, target: Target) -> float:
    """Mean cycles to wait for a column's line of X, of so many that are read at random."""
    hits = min(1.0, _NEAR * target.caches.l1 / (columns * LANES * 4))
    return (1 - hits) * _OVERLAPPED * target.costs.l2_line


def _stored_bytes(k: int, layout: Layout, blocks: int) -> int:
    rows, columns = layout.block
    index_bytes = np.dtype(index_dtype(k)).itemsize if layout.sparse else 0
    return blocks * (value_dtype(layout).itemsize * rows * columns + index_bytes)
