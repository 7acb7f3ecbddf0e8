"""Predicted cycles of a matmul kernel, to choose a weight's format before anything is built.

The prediction is for 128 tokens on one core. Per stored block the core issues its FMAs, two a
cycle, or its loads if those take longer: two a cycle for weights, and for X at the mean of the
first and the second cache's rates by the share of X that the first one holds, which is what
storing W in parts of columns is for. A sparse block pays a little more for its index. What does
not fit into registers is loaded again and again. Besides there is a fixed cost per block row and
part, higher when sums wait in Y between parts, and weights stream from memory once.

The constants were fitted to kernels measured on Zen 5, with AVX-512 and with AVX2 code, and lean
towards Zen 3's slower second cache for AVX2. ``scripts/check_cost_model.py`` prints prediction
against measurement.
"""

from __future__ import annotations

import numpy as np

from sparse_tvm.schedules.cpu.matmul import WeightLayout
from sparse_tvm.schedules.cpu.simd import LANES, Simd, group_limit
from sparse_tvm.targets import Target

_TILES = 8
"""Tiles to share out among groups; where three fit into a group, the groups have 2.7."""

_ISSUE = 0.5
"""Cycles of an FMA, or of a load that hits the first cache."""

_L2_LINE_CYCLES = {512: 1.45, 256: 1.8, 128: 1.8}
"""Cycles of a cache line from the second cache, by vector width: wider cores have wider caches."""

_L1_SHARE = 0.85
"""Share of the first cache that keeps X, beside weights and sums."""

_DENSE_LOOP = 1.04
_SPARSE_CYCLES = 0.4

_STREAMED_BYTES = 8.0
"""Bytes of weights per cycle: in a whole model they come from the last cache, or memory."""

_ROW_CYCLES = 12.0
_SUM_CYCLES = 3.25
"""Cycles per register to load its sum from Y and store it there again, in a part of columns."""

_SPILLED_SUMS = 2.0
_SPILLED_WEIGHTS = 1.15


def matmul_cycles(
    shape: tuple[int, int], layout: WeightLayout, blocks: int, target: Target
) -> float:
    """Cycles per tile of tokens for a weight of ``shape`` with this many stored blocks."""
    simd = Simd(target.lanes, target.registers)
    rows, columns = layout.block
    groups = -(-_TILES // group_limit(rows, simd))
    tiles = _TILES / groups
    vectors = tiles * simd.per_tile
    fmas = rows * vectors * _ISSUE * _spilling(rows, simd)
    if layout.sparse:
        x_bytes = _x_bytes(shape[1], tiles) / layout.parts
        lines = tiles * _line_cycles(x_bytes, target)
        block = columns * max(fmas, rows * _ISSUE + lines) + _SPARSE_CYCLES
    else:
        block = max(fmas, (rows + vectors) * _ISSUE) * _DENSE_LOOP
    segments = layout.parts * -(-shape[0] // rows)
    sums = rows * vectors * (_SUM_CYCLES if layout.parts > 1 else 1)
    compute = blocks * block + segments * (_ROW_CYCLES + sums)
    index_bytes = np.dtype(layout.index_dtype(shape[1])).itemsize if layout.sparse else 0
    stored_bytes = blocks * (4 * rows * columns + index_bytes)
    streamed = compute + stored_bytes / _STREAMED_BYTES
    return max(streamed, stored_bytes / target.bytes_per_cycle_memory) / tiles


def _spilling(rows: int, simd: Simd) -> float:
    """How much slower FMAs are, for want of registers, with full groups."""
    sums = rows * group_limit(rows, simd) * simd.per_tile
    if sums > simd.accumulators:
        return _SPILLED_SUMS
    return _SPILLED_WEIGHTS if sums + rows + 1 > simd.registers else 1.0


def _x_bytes(k_in: int, tiles: float) -> float:
    return k_in * tiles * LANES * 4


def _line_cycles(x_bytes: float, target: Target) -> float:
    """Mean cycles to load a cache line of an X of this size, of which rows are read at random."""
    near = LANES / target.lanes * _ISSUE
    hits = min(1.0, _L1_SHARE * target.l1_bytes / x_bytes)
    return near + (1 - hits) * (_L2_LINE_CYCLES[target.vector_bits] - near)


def part_counts(k_in: int, rows: int, target: Target) -> list[int]:
    """Numbers of parts worth a look: one, and those with X about as large as the first cache."""
    tiles = group_limit(rows, Simd(target.lanes, target.registers))
    caches = _x_bytes(k_in, tiles) / target.l1_bytes
    return sorted({1, *(max(1, round(caches * share)) for share in (0.75, 1.0, 1.5))})


def dense_rows(n_out: int, simd: Simd) -> int:
    """Rows of the register block of a dense kernel: the most FMAs per load that fit."""

    def fmas_per_load(rows: int) -> float:
        vectors = group_limit(rows, simd) * simd.per_tile
        if rows * vectors > simd.accumulators:
            return 0.0
        return rows * vectors / (rows + vectors)

    return min(n_out, max(range(1, 17), key=fmas_per_load))
