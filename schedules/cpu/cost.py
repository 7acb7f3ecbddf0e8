"""Predicted cycles of a matmul kernel, to choose a weight's format before anything is built.

The prediction is for one core. Per stored block the core issues its multiply-adds, or its loads if
those take longer: of weights, and of X's lines, more slowly by the share of X that the first cache
does not hold, which is what storing W in parts of columns is for. A sparse block pays a little more
for its index. What does not fit into registers is loaded again and again. Besides there is a fixed
cost per block row and part, higher when sums wait in Y between parts. Weights stream past once per
group of tiles, the first time from memory where the model's others fill the caches, more slowly if
X is read at random from the second cache meanwhile. What each of these takes is for the target to
say.

``scripts/check_cost_model.py`` prints prediction against measurement.
"""

from __future__ import annotations

import numpy as np

from sparse_tvm.families import TYPICAL_TOKENS
from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cpu.block_arrays import index_dtype, value_dtype
from sparse_tvm.schedules.cpu.simd import (
    LANES,
    Simd,
    group_limit,
    group_of,
    rows_per_pass,
    tiles_of,
)
from sparse_tvm.sparsity.statistics import TYPICAL_COPIES, WeightStatistics
from sparse_tvm.targets import Target

_L1_SHARE = 0.85
"""Share of the first cache that keeps X, beside weights and sums."""

_DENSE_LOOP = 1.04
_MOST_ROWS = 12
"""Of a dense kernel's block: with 16, a tenth slower on one tile."""

_PACKING_LANES, _PACKED_USES = 8, 2

_SPILLED_WEIGHTS = 1.15

_WIDENED = 0.2
"""Cycles of a half to become float32 in the first cache (AVX-512, Zen 4)."""

_PACKED_LINE = 0.67
"""Share of a far line's time that one of a part takes which was copied just before: few pages."""

_COPY_LOADS = 2
"""A vector that is copied takes as long as so many loads."""

_SINGLE_SUM = 2.0
"""Cycles per vector, at least, for a sum between parts of a row of single weights (Zen 4)."""

_PASSES = 3
"""From how many passes over a dense block on its columns are split."""

_PANEL_SHARE = 0.65
"""Share of the first cache that keeps a part of a dense block, and of X."""


def matmul_cycles(
    shape: tuple[int, int],
    layout: Layout,
    blocks: int,
    target: Target,
    tokens: int = TYPICAL_TOKENS[0],
    copies: float = TYPICAL_COPIES,
) -> float:
    """Cycles per tile of tokens for a weight of ``shape`` with this many stored blocks."""
    simd, costs = Simd.of(target), target.costs
    rows, columns = rows_per_pass(layout, simd), layout.block[1]
    blocks *= layout.block[0] // rows
    parts = layout.get("parts", 1)
    limit = group_of(layout, simd)
    tiles = _tiles_per_group(limit, tokens)
    vectors = tiles * simd.per_tile
    fmas = rows * vectors * _fma_cycles(rows, limit, target, tokens)
    weights = -(-rows // costs.scalars_per_load) / simd.weights_together(layout)
    weights *= costs.load * costs.narrow
    if layout.sparse:
        packed = bool(layout.get("packed", 0))
        lines = tiles * line_cycles(_x_bytes(shape[1], tiles) / parts, target, packed)
        block = columns * target.beside(weights + lines, fmas) + costs.index
    else:
        block = target.beside(weights + vectors * costs.load, fmas) * _DENSE_LOOP
    segments = parts * -(-shape[0] // rows)
    short = layout.sparse and rows == 1 and not simd.by_element
    between = max(costs.sum, _SINGLE_SUM) if short else costs.sum
    sums = rows * vectors * (between if parts > 1 else 1)
    compute = blocks * block + segments * (costs.row + sums)
    if value_dtype(layout) != np.float32 and not simd.by_element:
        compute += blocks * rows * columns * _WIDENED / simd.weights_together(layout)
    if layout.get("packed", 0):
        compute += shape[1] * vectors * _COPY_LOADS * costs.load
    index_bytes = np.dtype(index_dtype(shape[1])).itemsize if layout.sparse else 0
    stored_bytes = blocks * (value_dtype(layout).itemsize * rows * columns + index_bytes)
    passes: float = tiles_of(tokens) / tiles
    x_bytes = _x_bytes(shape[1], tiles) / parts if layout.sparse else 0.0
    arrival = arrival_cycles(stored_bytes, passes, copies, target, x_bytes)
    return (passes * compute + arrival) / (passes * tiles)


def arrival_cycles(
    nbytes: float, passes: float, copies: float, target: Target, x_bytes: float = 0.0
) -> float:
    """Cycles that a computing core waits for a weight of this size that passes by so often.

    The first time it comes from where the model's other weights, ``copies`` of its size with it,
    have left it; see :class:`~sparse_tvm.sparsity.statistics.WeightStatistics`. Meanwhile so many
    bytes of X are read at random.
    """
    far = target.caches.shares(copies * nbytes)[-1]
    slow = far * target.memory_cycles(x_bytes)
    return nbytes * ((passes - far) / target.costs.streamed + slow)


def matmul_seconds(
    shape: tuple[int, int],
    layout: Layout,
    blocks: int,
    target: Target,
    tokens: int = TYPICAL_TOKENS[0],
    copies: float = TYPICAL_COPIES,
) -> float:
    """Seconds for all ``tokens`` on one core."""
    cycles = matmul_cycles(shape, layout, blocks, target, tokens, copies)
    return target.seconds(tiles_of(tokens) * cycles)


def _tiles_per_group(limit: int, tokens: int) -> float:
    """Mean tiles that share a pass over W: of eight, three groups of at most three have 2.7."""
    tiles = tiles_of(tokens)
    return float(tiles / -(-tiles // limit))


def _fma_cycles(rows: int, limit: int, target: Target, tokens: int) -> float:
    """Cycles per multiply-add, more where registers are missing with full groups."""
    simd, costs = Simd.of(target), target.costs
    sums = rows * min(limit, tiles_of(tokens)) * simd.per_tile
    if sums > simd.accumulators:
        return costs.spilled
    operands = -(-rows // costs.scalars_per_load)
    if simd.few_registers:  # X's vectors stay in registers, weights pass through one
        operands = min(operands, sums // rows)
    return costs.fma * (_SPILLED_WEIGHTS if sums + operands + 1 > simd.registers else 1.0)


def _x_bytes(k_in: int, tiles: float) -> float:
    return k_in * tiles * LANES * 4


def line_cycles(x_bytes: float, target: Target, packed: bool = False) -> float:
    """Mean cycles to load a cache line of an X of this size, of which rows are read at random."""
    near = LANES / target.lanes * target.costs.load
    hits = min(1.0, _L1_SHARE * target.caches.l1 / x_bytes)
    return near + (1 - hits) * target.costs.l2_line * (_PACKED_LINE if packed else 1.0)


def part_counts(
    k_in: int, layout: Layout, target: Target, tokens: int = TYPICAL_TOKENS[0]
) -> list[int]:
    """Numbers of parts worth a look: one, and those with X up to four times the first cache."""
    tiles = min(group_of(layout, Simd.of(target)), tiles_of(tokens))
    caches = _x_bytes(k_in, tiles) / target.caches.l1
    return sorted({1, *(max(1, round(caches * share)) for share in (0.25, 0.5, 0.75, 1.0, 1.5))})


def packs(weight: WeightStatistics, layout: Layout, target: Target) -> bool:
    """Whether each part's columns of X are copied before the weight's rows pass over them.

    What a sparse row reads here and there is then in the first cache, brought by a stream that the
    CPU foresees, and no two tiles' vectors want the same lines of it. On AVX2 that was 1.05 to 2
    times as fast wherever a column is used twice or more; on other CPUs it was not measured.
    """
    uses = weight.stored_blocks(layout.block) / weight.shape[1]
    return layout.sparse and Simd.of(target).lanes == _PACKING_LANES and uses >= _PACKED_USES


def dense_parts(k_in: int, rows: int, target: Target) -> int:
    """Parts of columns of a dense weight whose blocks are computed in several passes.

    Each pass reads all of X's vectors, and its share of every line of the block: from the second
    cache that would take longer than the multiply-adds.
    """
    simd = Simd.of(target)
    layout = Layout("", "dense", (rows, 1))
    if simd.by_element or rows < _PASSES * rows_per_pass(layout, simd):
        return 1
    column_bytes = 4 * (rows + LANES * group_of(layout, simd))
    return max(1, round(k_in * column_bytes / (_PANEL_SHARE * target.caches.l1)))


def dense_rows(n_out: int, simd: Simd, tokens: int = TYPICAL_TOKENS[0]) -> int:
    """Rows of the register block of a dense kernel: the most FMAs per load that fit."""

    def fmas_per_load(rows: int) -> float:
        vectors: int = min(group_limit(rows, simd), tiles_of(tokens)) * simd.per_tile
        if rows * vectors > simd.accumulators:
            return 0.0
        return rows * vectors / (rows + vectors)

    return min(n_out, max(range(1, _MOST_ROWS + 1), key=fmas_per_load))
