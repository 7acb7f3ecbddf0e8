"""Predicted seconds of a layer on a whole device, to choose a weight's layout.

What takes longest decides: tensor cores, shared memory, the second cache, or device memory; they
overlap. Thread blocks fill the device in waves, of which the last is rarely full. Launching a
kernel, and filling its pipeline, takes a while that no layout avoids. Rows of pairs are fitted to
what an H200 took for 95 % of zeros, 128 to 4,096 tokens: within a fifth.
"""

from __future__ import annotations

from math import ceil

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cuda.fragments import STEP
from sparse_tvm.schedules.cuda.sparse_rows import VECTOR, RowTile, row_tile
from sparse_tvm.schedules.cuda.tiles import Tile, tile_for
from sparse_tvm.schedules.cuda.weights import pieces_per_step
from sparse_tvm.targets.cuda import Gpu

_LAUNCH = 2.5e-6
_STEP_LATENCY = 0.7e-6
"""Seconds until the first step of a thread block is there."""

_SHARED_BYTES = 128
"""Bytes per cycle of a multiprocessor's shared memory."""

_EFFICIENCY = 0.85
"""Share of a tensor core's time that a loop without bubbles would reach."""

_CORE_EFFICIENCY = 0.7
"""The same of CUDA cores, where rows that are multiplied at a time are not equally long."""

_OTHERS_EFFICIENCY = 0.4
"""Share of the CUDA cores' rate that TVM's schedules of products reach."""

_ROW_LATENCY = 2.5e-6
"""Seconds until a thread block has transposed its first activations."""

_ALONE = 0.7
"""Share of a multiprocessor's rate that one of these thread blocks reaches, where two reach all."""

_PAIR_INSTRUCTIONS = 7
"""Instructions for a pair, beside two for each of a lane's tokens."""

_BANK_CONFLICTS = 2
"""How many times longer reading tokens of several columns takes than of one."""


def tensor_seconds(
    matrix: tuple[int, int], layout: Layout, blocks: int | None, tokens: int, gpu: Gpu
) -> float:
    """Seconds of a kernel on tensor cores; ``blocks`` are those that BSR stores."""
    n, k = matrix
    tile = tile_for(layout, n, tokens)
    structured = layout.format == "2:4"
    groups, columns = ceil(n / tile.rows), ceil(tokens / tile.tokens)
    steps = groups * ceil(k / STEP)
    if blocks is not None:  # a block row ends with a step that is rarely full
        pieces = pieces_per_step(layout)
        per_block = max(1, layout.block[1] // STEP)
        steps = ceil(blocks * per_block / pieces + (groups / 2 if pieces > 1 else 0))
    all_steps = steps * columns
    rate = gpu.processors * gpu.ghz * 1e9
    multiply = tile.rows * tile.tokens * STEP / gpu.tensor / _EFFICIENCY
    multiply /= 2 if structured else 1
    busy = all_steps * max(multiply, _shared_cycles(tile, structured)) / rate
    l2 = all_steps * tile.stage_bytes(structured) / gpu.l2
    weight = steps * (tile.stage_bytes(structured) - tile.tokens * STEP * 2)
    memory = (weight + 2 * tokens * (n + k)) / gpu.memory
    return _LAUNCH + _STEP_LATENCY + max(busy, l2) * _tail(groups * columns, tile, gpu) + memory


def core_seconds(matrix: tuple[int, int], tokens: int, gpu: Gpu) -> float:
    """Seconds of a kernel in float32."""
    n, k = matrix
    work = ceil(n / 64) * ceil(tokens / 64) * 64 * 64 * k
    busy = 2 * work / (gpu.fma * gpu.processors * gpu.ghz * 1e9)
    memory = 4 * (n * k + tokens * (n + k)) / gpu.memory
    return _LAUNCH + _STEP_LATENCY + busy + memory


def row_seconds(matrix: tuple[int, int], nonzeros: int, tokens: int, gpu: Gpu) -> float:
    """Seconds of a kernel with rows of so many pairs, on CUDA cores.

    Blocks fetch activations, then multiply: of one block the two do not overlap.
    """
    n, k = matrix
    tile = row_tile(n, k, tokens)
    groups, columns = ceil(n / tile.rows), ceil(tokens / tile.tokens)
    # Every part of a row ends with a vector that is half full on average.
    pairs = nonzeros + n * ceil(k / tile.columns) * (VECTOR - 1) / 2
    rate = gpu.processors * gpu.ghz * 1e9
    multiply = columns * pairs * max(_issue_cycles(tile), _gather_cycles(tile)) / rate
    l2 = groups * columns * (k * tile.tokens * 2 + 4 * pairs / groups) / gpu.l2
    memory = (4 * pairs + 2 * tokens * (n + k)) / gpu.memory
    turns = ceil(groups * columns / gpu.processors)
    shared = gpu.shared_bytes >= 2 * (tile.shared_bytes + 1024)
    alone = turns % 2 if shared else turns  # others come in pairs
    tail = (turns + alone * (1 / _ALONE - 1)) * gpu.processors / (groups * columns)
    return _LAUNCH + _ROW_LATENCY + (multiply / _CORE_EFFICIENCY + l2) * tail + memory


def other_seconds(values: float, multiplications: float, gpu: Gpu) -> float:
    """Seconds of a kernel of TVM's schedules, on float16 in the second cache."""
    rate = gpu.fma * gpu.processors * gpu.ghz * 1e9 * _OTHERS_EFFICIENCY
    return _LAUNCH + max(2 * values / gpu.l2, multiplications / rate)


def _issue_cycles(tile: RowTile) -> float:
    """Cycles of a multiprocessor's four schedulers for the instructions of one pair."""
    return (_PAIR_INSTRUCTIONS + 2 * tile.each) * tile.token_lanes / 32 / 4


def _gather_cycles(tile: RowTile) -> float:
    """Cycles that its shared memory takes to read the tokens of one pair."""
    alone = tile.tokens * 2 >= _SHARED_BYTES
    return tile.tokens * 2 / _SHARED_BYTES * (1 if alone else _BANK_CONFLICTS)


def _shared_cycles(tile: Tile, structured: bool) -> float:
    """Cycles that the warps of a block read shared memory for, a step."""
    fragment = 512 + 64 if structured else 1024
    warp = tile.fragments * fragment + tile.columns * 512
    return tile.row_warps * tile.token_warps * warp / _SHARED_BYTES


def _tail(blocks: int, tile: Tile, gpu: Gpu) -> float:
    """How many times longer than full waves all thread blocks take."""
    resident = max(1, min(2048 // tile.threads, gpu.shared_bytes // tile.shared_bytes(False)))
    at_once = gpu.processors * min(resident, 2)
    return ceil(blocks / at_once) * at_once / blocks
