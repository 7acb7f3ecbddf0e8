"""Predicted cycles of a matmul kernel, to choose a weight's format before anything is built.

The prediction is for one full group of tiles on one core. Per stored block the core issues its
FMAs (two a cycle), or loads its operands (two a cycle) if that takes longer. A sparse block pays
for reading its index and for going to an unforeseen row of X besides, more so where X does not
fit into the first or the second cache; a dense one only for loop control. Around that there is a
fixed cost per block row, and weights stream from memory once.

The constants were fitted to kernels measured on Zen 5 (AVX-512) and checked on Zen 3 (AVX2):
``scripts/check_cost_model.py`` prints prediction against measurement.
"""

from __future__ import annotations

from sparse_tvm.schedules.common.lane_tiles import LANES, Simd
from sparse_tvm.schedules.common.matmul import WeightLayout, group_limit
from sparse_tvm.targets import Target

_PER_CYCLE = 2
_DENSE_LOOP = 1.15
_SPARSE_CYCLES = (1.5, 3.2, 5.5)
"""Cycles beyond arithmetic per stored block, for X in the first cache, the second, or neither."""

_ROW_CYCLES = 12.0


def matmul_cycles(
    shape: tuple[int, int], layout: WeightLayout, blocks: int, target: Target
) -> float:
    """Cycles per tile of tokens for a weight of ``shape`` with this many stored blocks."""
    simd = Simd(target.lanes, target.registers)
    rows, columns = layout.block
    tiles = group_limit(rows, simd)
    vectors = tiles * simd.per_tile
    fmas = rows * columns * vectors
    loads = rows * columns + columns * vectors
    block = max(fmas, loads) / _PER_CYCLE
    if layout.sparse:
        x_bytes = shape[1] * tiles * LANES * 4
        block += _SPARSE_CYCLES[(x_bytes > target.l1_bytes) + (x_bytes > target.l2_bytes // 2)]
    else:
        block *= _DENSE_LOOP
    block_rows = -(-shape[0] // rows)
    compute = blocks * block + block_rows * (_ROW_CYCLES + rows * vectors)
    stored_bytes = blocks * (4 * rows * columns + (4 if layout.sparse else 0))
    return max(compute, stored_bytes / target.bytes_per_cycle_memory) / tiles


def dense_rows(n_out: int, simd: Simd) -> int:
    """Rows of the register block of a dense kernel: the most FMAs per load that fit."""

    def fmas_per_load(rows: int) -> float:
        vectors = group_limit(rows, simd) * simd.per_tile
        if rows * vectors > simd.accumulators:
            return 0.0
        return rows * vectors / (rows + vectors)

    return min(n_out, max(range(1, 17), key=fmas_per_load))
