"""A schedule for every operator that has no kernel of its own: parallel outside, SIMD inside.

TVM lowers such operators to serial scalar loops. Here each block of a PrimFunc gets the same
treatment: what only feeds elementwise blocks is inlined, reductions move outside of a vectorised
spatial loop (with four rows of accumulators unrolled around it), and the outermost spatial loops
run in parallel when there is enough to do.
"""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import s_tir, tirx

from sparse_tvm.schedules.common.lane_tiles import Simd

_WORTH_PARALLEL = 1 << 14
"""Iterations below which starting threads costs more than it saves."""

_ROWS = 4
_SPATIAL, _REDUCTION = 0, 2


def schedule_generic(function: tirx.PrimFunc, simd: Simd) -> tirx.PrimFunc:
    """Schedule a PrimFunc of blocks; one without blocks is returned as it is."""
    schedule = s_tir.Schedule(function)
    root = schedule.get_sblock("root")
    blocks = list(schedule.get_child_blocks(root))
    blocks = [block for block in blocks if not _inlined(schedule, block)]
    for block in blocks:
        loops = schedule.get_loops(block)
        kinds = [int(v.iter_type) for v in schedule.get(block).iter_vars]
        if len(kinds) != len(loops) or not loops:
            continue
        spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _SPATIAL]
        reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _REDUCTION]
        if len(spatial) + len(reduction) != len(loops):
            continue
        if reduction:
            _schedule_reduction(schedule, block, spatial, reduction, simd)
        else:
            _schedule_elementwise(schedule, spatial, simd)
    return schedule.mod["main"]


def _inlined(schedule: Any, block: Any) -> bool:
    """Inline a block that only elementwise blocks read."""
    if _is_reduction(schedule.get(block)):
        return False
    consumers = schedule.get_consumers(block)
    if not consumers or any(_is_reduction(schedule.get(c)) for c in consumers):
        return False
    try:
        schedule.compute_inline(block)
    except s_tir.ScheduleError:  # an output, say
        return False
    return True


def _is_reduction(definition: Any) -> bool:
    return any(int(v.iter_type) == _REDUCTION for v in definition.iter_vars)


def _extent(schedule: Any, loop: Any) -> int:
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else 0


def _vector_factor(extent: int, simd: Simd) -> int:
    """The widest SIMD-friendly divisor of a loop's extent; 1 when there is none."""
    return next((f for f in (simd.lanes, simd.lanes // 2, 4) if f > 1 and extent % f == 0), 1)


def _parallelise(schedule: Any, loops: list[Any], work: int) -> None:
    if loops and work >= _WORTH_PARALLEL:
        schedule.parallel(schedule.fuse(*loops) if len(loops) > 1 else loops[0])


def _schedule_elementwise(schedule: Any, loops: list[Any], simd: Simd) -> None:
    extents = [_extent(schedule, loop) for loop in loops]
    work = prod(extents)
    *outer, inner = loops
    if _vector_factor(extents[-1], simd) == 1 and outer:
        inner, outer = schedule.fuse(*loops), []
    factor = _vector_factor(_extent(schedule, inner), simd)
    if factor > 1:
        inner, lanes = schedule.split(inner, [None, factor])
        schedule.vectorize(lanes)
    _parallelise(schedule, [*outer, inner], work)


def _schedule_reduction(
    schedule: Any, block: Any, spatial: list[Any], reduction: list[Any], simd: Simd
) -> None:
    work = prod(_extent(schedule, loop) for loop in (*spatial, *reduction))
    inner = []  # inside of the reduction: rows, then lanes
    outer = list(spatial)
    factor = _vector_factor(_extent(schedule, outer[-1]), simd) if outer else 1
    if factor > 1:
        outer[-1], lanes = schedule.split(outer[-1], [None, factor])
        inner = [lanes]
        if len(outer) > 1 and _extent(schedule, outer[-2]) % _ROWS == 0:
            outer[-2], rows = schedule.split(outer[-2], [None, _ROWS])
            inner = [rows, lanes]
    schedule.reorder(*outer, *reduction, *inner)
    _parallelise_reduction(schedule, block, outer, reduction, inner, work)


def _parallelise_reduction(
    schedule: Any, block: Any, outer: list[Any], reduction: list[Any], inner: list[Any], work: int
) -> None:
    """Start threads over the outer loops, and give the sums an initialisation of their own."""
    _parallelise(schedule, outer, work)
    init = schedule.decompose_reduction(block, reduction[0])
    if not inner:
        return
    for loops in (inner, schedule.get_loops(init)[-len(inner) :]):
        schedule.vectorize(loops[-1])
        for loop in loops[:-1]:
            schedule.unroll(loop)
