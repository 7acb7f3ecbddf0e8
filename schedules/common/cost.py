"""Predicted cycles of a matmul kernel, to choose a weight's format before anything is built.

Per stored block and strip of tokens the core issues its FMAs (two a cycle) and pulls X's vectors
out of cache; measured kernels take about the sum of the two, since both compete for the load
ports. Around that there is a fixed cost per block row, and weights stream from memory once.
"""

from __future__ import annotations

from sparse_tvm.schedules.common.lane_tiles import LaneTiles, Simd
from sparse_tvm.schedules.common.matmul import WeightLayout, register_vectors
from sparse_tvm.targets import Target

_FMAS_PER_CYCLE = 2
_INDEX_CYCLES = 0.5
_ROW_CYCLES = 8.0


def matmul_cycles(
    tiles: LaneTiles,
    shape: tuple[int, int],
    layout: WeightLayout,
    blocks: int,
    target: Target,
) -> float:
    """Cycles on one core for a weight ``shape`` with this many stored blocks."""
    simd = Simd(target.lanes, target.registers)
    rows, columns = layout.block
    vectors = register_vectors(tiles, rows, simd)
    strips = tiles.count * tiles.lanes // (vectors * simd.lanes)
    vector_bytes = target.vector_bits // 8
    strip_bytes = shape[1] * vectors * vector_bytes
    reads = columns * vectors * vector_bytes
    bandwidth = target.bytes_per_cycle_l2 * (2 if strip_bytes <= target.l1_bytes else 1)
    block = rows * columns * vectors / _FMAS_PER_CYCLE + reads / bandwidth
    if layout.sparse:
        block += _INDEX_CYCLES
    block_rows = -(-shape[0] // rows)
    row = _ROW_CYCLES + 2 * rows * vectors
    compute = strips * (blocks * block + block_rows * row)
    stored_bytes = blocks * (4 * rows * columns + (4 if layout.sparse else 0))
    return max(compute, stored_bytes / target.bytes_per_cycle_memory)


def dense_rows(tiles: LaneTiles, n_out: int, simd: Simd) -> int:
    """Rows of the register block of a dense kernel: the most FMAs per load that fit."""

    def fmas_per_load(rows: int) -> float:
        vectors = register_vectors(tiles, rows, simd)
        if rows * vectors > simd.accumulators:
            return 0.0
        return rows * vectors / (rows + vectors)

    return min(n_out, max(range(1, 17), key=fmas_per_load))
