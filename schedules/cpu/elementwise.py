"""A schedule for elementwise operators and copies: rows along memory, or tiles across it.

A row is of trailing loops along which all that is read and written is consecutive. Loops of one
iteration count for nothing: a gather of windows whose last axis has one element moves rows of the
axis before it. A row too long for one piece is cut between the loops that it was made of, where
nothing wraps around.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm import tirx
from tvm.ir import TensorLoad
from tvm_ffi import structural_map

from sparse_tvm.schedules.cpu.conditions import comparisons, replace, uses
from sparse_tvm.schedules.cpu.loops import stride
from sparse_tvm.schedules.cpu.nests import (
    WORTH_PARALLEL,
    Nest,
    divisor,
    extent_of,
    fused,
    parallelise,
    same,
)
from sparse_tvm.schedules.cpu.simd import Simd

_ROW = 1 << 12
"""Elements of a row that is long enough: longer ones are cut where there are no other loops."""

_SHORT_ROW = 1 << 8
"""Elements below which a row is worth making longer, even too long."""

_TILE = 16


def schedule_elementwise(schedule: Any, nest: Nest, simd: Simd) -> None:
    """Rows in parallel, of as many trailing loops as are one loop along all memory."""
    nest = nest.without_single(schedule)
    work, loops = nest.work(schedule), list(nest.spatial)
    crossing = _crossing(nest)
    if crossing is not None:
        body = schedule.get(nest.block).body
        if any(uses(condition, nest.variables[-1]) for condition in comparisons(body)):
            _schedule_joined(schedule, loops, crossing, work, simd)
        else:
            _schedule_transpose(schedule, loops, crossing, work)
        return
    count = _row_loops(schedule, nest)
    outer, row = loops[:-count], loops[-count:]
    if not outer and count > 1:
        below = prod(extent_of(schedule, loop) for loop in row[1:])
        size = divisor(extent_of(schedule, row[0]), _ROW // below)
        if size * below >= _SHORT_ROW:
            pieces, piece = schedule.split(row[0], [None, size])
            outer, row = [pieces], [piece, *row[1:]]
    row = fused(schedule, row)
    if not outer:
        extent = extent_of(schedule, row)
        piece = divisor(extent, _ROW, simd.lanes)
        if work >= WORTH_PARALLEL and (piece > 1 or not extent):
            row, _ = schedule.split(row, [None, piece if extent else _ROW])
            outer = [row]
    parallelise(schedule, outer, work)


def _row_loops(schedule: Any, nest: Nest) -> int:
    """Trailing loops along which everything is consecutive, or the same."""
    extents = [extent_of(schedule, loop) for loop in nest.spatial]
    body = schedule.get(nest.block).body
    values = structural_map(body.value, (TensorLoad, lambda load: tirx.const(0, load.ty.dtype)))
    best, size = 1, 1
    for count in range(1, len(extents) + 1):
        extent, variable = extents[-count], nest.variables[-count]
        if not extent or uses(values, variable):
            break
        if size * extent > _ROW and size >= _SHORT_ROW:
            break
        size *= extent
        if count > 1 and not _one_loop(nest, extents[-count:]):
            break
        best = count
    return best


def _one_loop(nest: Nest, extents: Sequence[int]) -> bool:
    """Whether loops of these extents, the last ones of a nest, are one along all memory."""
    row = tirx.Var("row", nest.variables[-1].ty)
    names = nest.variables[-len(extents) :]
    accesses = [(load.source, load.indices) for load in nest.loads]
    for buffer, indices in (*accesses, (nest.buffer, nest.writes)):
        below = 1
        along = list(indices)
        for variable, extent in zip(reversed(names), reversed(extents), strict=True):
            value = tirx.floormod(tirx.floordiv(row, below), extent)
            along = [replace(index, variable, value) for index in along]
            below *= extent
        if stride(buffer, along, row, below) not in (0, 1):
            return False
    return True


def _crossing(nest: Nest) -> int | None:
    """Which loop runs along the memory of what a transposing copy reads, if it is one."""
    *_, written = _along(nest.buffer, nest.writes)
    if not same(written, nest.variables[-1]):
        return None
    for load in nest.loads:
        *others, last = _along(load.source, load.indices)
        if not any(uses(other, nest.variables[-1]) for other in others):
            continue
        for index, variable in enumerate(nest.variables[:-1]):
            if same(last, variable):
                return index
    return None


def _along(buffer: Any, indices: Sequence[Any]) -> list[Any]:
    """The indices along axes of several elements, or None alone."""
    several = [i for i, size in zip(indices, buffer.shape, strict=True) if not _is_one(size)]
    return several or [None]


def _is_one(size: Any) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1


def _schedule_joined(schedule: Any, loops: list[Any], crossing: int, work: int, simd: Simd) -> None:
    """Vectors along what is read: what joins transposed parts is another thing in each column."""
    extent = extent_of(schedule, loops[crossing])
    size = divisor(extent, _TILE, simd.lanes)
    rows, row = schedule.split(
        loops[crossing], [None, size if size > 1 else divisor(extent, _TILE)]
    )
    outer = [*loops[:crossing], *loops[crossing + 1 : -1], rows]
    schedule.reorder(*outer, loops[-1], row)
    schedule.vectorize(row)
    parallelise(schedule, outer, work)


def _schedule_transpose(schedule: Any, loops: list[Any], crossing: int, work: int) -> None:
    """Tiles of one cache line squared, so that each line is read and written once."""
    outer = loops[:-1]
    if min(extent_of(schedule, loops[i]) for i in (crossing, -1)) >= 2:
        columns, column = schedule.split(loops[-1], [None, _TILE])
        rows, row = schedule.split(loops[crossing], [None, _TILE])
        outer = [*loops[:crossing], *loops[crossing + 1 : -1], rows, columns]
        schedule.reorder(*outer, row, column)
        schedule.vectorize(column)
        schedule.unroll(row)
    parallelise(schedule, outer, work)
