"""A schedule for every operator that has no kernel of its own: parallel outside, SIMD inside.

TVM lowers such operators to serial scalar loops. Here what only feeds other blocks is inlined,
and then

- soft-max, normalisations and the like compute one row after the other, start to end;
- a reduction along consecutive elements keeps vectors of partial results;
- any other reduction runs outside of a vectorised spatial loop, with four rows of sums unrolled;
- a transposing copy moves square tiles;
- anything else is cut into vectors along its last axis.

Extents may be symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import Expr, TensorLoad
from tvm_ffi import structural_equal, structural_walk

from sparse_tvm.schedules.cpu.loops import vectorise_innermost
from sparse_tvm.schedules.cpu.simd import Simd

_WORTH_PARALLEL = 1 << 14
"""Iterations below which starting threads costs more than it saves."""

_UNKNOWN = 1 << 7
"""What a symbolic extent counts as."""

_REPEATED = 64
"""Nodes that inlining may repeat. LLVM computes equal expressions once, but TVM simplifies each
copy, and a few values that are read several times each grow exponentially."""

_ROWS = 4
_TILE = 16
_SPATIAL, _REDUCTION = 0, 2


@dataclass(frozen=True)
class _Nest:
    """A block and its loops, of which each binds one of the block's variables."""

    block: Any
    spatial: list[Any]
    reduction: list[Any]

    @classmethod
    def of(cls, schedule: Any, block: Any) -> _Nest | None:
        """The nest around a block, if it is that regular."""
        loops = schedule.get_loops(block)
        kinds = [int(v.iter_type) for v in schedule.get(block).iter_vars]
        if not loops or len(kinds) != len(loops) or not set(kinds) <= {_SPATIAL, _REDUCTION}:
            return None
        pairs = list(zip(loops, kinds, strict=True))
        return cls(
            block,
            [loop for loop, kind in pairs if kind == _SPATIAL],
            [loop for loop, kind in pairs if kind == _REDUCTION],
        )

    def work(self, schedule: Any) -> int:
        """Iterations, symbolic extents guessed."""
        return prod(_extent(schedule, loop) or _UNKNOWN for loop in self.spatial + self.reduction)


def schedule_generic(function: tirx.PrimFunc, simd: Simd) -> tirx.PrimFunc:
    """Schedule a PrimFunc of blocks; one without blocks is returned as it is."""
    schedule = s_tir.Schedule(function)
    root = schedule.get_sblock("root")
    blocks = [b for b in schedule.get_child_blocks(root) if not _inlined(schedule, b)]
    nests = [_Nest.of(schedule, block) for block in blocks]
    if not _schedule_rows(schedule, nests):
        for nest in nests:
            if nest is not None and nest.reduction:
                _schedule_reduction(schedule, nest, simd)
            elif nest is not None:
                _schedule_elementwise(schedule, nest, simd)
    return vectorise_innermost(schedule.mod["main"], simd)


def _inlined(schedule: Any, block: Any) -> bool:
    """Inline a block, unless a reduction or long code would compute its elements again."""
    if _is_reduction(schedule.get(block)):
        return False
    consumers = schedule.get_consumers(block)
    if not consumers or _repeated(schedule, block, consumers) > _REPEATED:
        return False
    for consumer in consumers:
        if _is_reduction(schedule.get(consumer)):
            nests = [_Nest.of(schedule, b) for b in (block, consumer)]
            works = {nest and nest.work(schedule) for nest in nests}
            if len(consumers) > 1 or None in works or len(works) > 1:
                return False
    try:
        schedule.compute_inline(block)
    except s_tir.ScheduleError:  # an output, say
        return False
    return True


def _repeated(schedule: Any, block: Any, consumers: Sequence[Any]) -> int:
    """Nodes of a block's expression that inlining writes down more than once."""
    definition = schedule.get(block)
    written = [region.source for region in definition.writes]
    reads: list[Any] = []
    for consumer in consumers:
        structural_walk(schedule.get(consumer).body, (TensorLoad, reads.append))
    times = sum(_same(load.source, buffer) for load in reads for buffer in written)
    return (times - 1) * _size(definition.body)


def _size(code: Any) -> int:
    nodes: list[Any] = []
    structural_walk(code, (Expr, nodes.append))
    return len(nodes)


def _is_reduction(definition: Any) -> bool:
    return any(int(v.iter_type) == _REDUCTION for v in definition.iter_vars)


def _extent(schedule: Any, loop: Any) -> int:
    """Extent of a loop, 0 if it is symbolic."""
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else 0


def _vector_factor(extent: int, simd: Simd) -> int:
    """The widest SIMD-friendly divisor of a loop's extent; 1 when there is none."""
    widths = (simd.lanes, simd.lanes // 2, 4)
    return next((f for f in widths if f > 1 and extent and extent % f == 0), 1)


def _fused(schedule: Any, loops: list[Any]) -> Any:
    return schedule.fuse(*loops) if len(loops) > 1 else loops[0]


def _parallelise(schedule: Any, loops: list[Any], work: int) -> None:
    if loops and work >= _WORTH_PARALLEL:
        schedule.parallel(_fused(schedule, loops))


def _schedule_rows(schedule: Any, nests: Sequence[_Nest | None]) -> bool:
    """Compute each row of the last block, and all that it needs, at once.

    Applies where all blocks share their leading spatial loops, and reductions run along the last
    axis of what they read.
    """
    found = [nest for nest in nests if nest is not None]
    if len(found) < max(2, len(nests)) or found[-1].reduction:
        return False
    reducing = [nest for nest in found if nest.reduction]
    rows = min(len(nest.spatial) for nest in found)
    if not rows or not reducing or any(len(nest.spatial) != rows for nest in reducing):
        return False
    extents = [[schedule.get(loop).extent for loop in nest.spatial[:rows]] for nest in found]
    if any(
        not structural_equal(a, b)
        for other in extents
        for a, b in zip(other, extents[0], strict=True)
    ):
        return False
    if not all(_along_memory(schedule, nest) for nest in reducing):
        return False
    work = max(nest.work(schedule) for nest in found)
    row = _fused(schedule, found[-1].spatial[:rows])
    if work >= _WORTH_PARALLEL:
        schedule.parallel(row)
    for nest in reversed(found[:-1]):
        schedule.compute_at(nest.block, row)
    for nest in reducing:
        loops = schedule.get_loops(nest.block)[1:]
        if loops:
            schedule.decompose_reduction(nest.block, _fused(schedule, loops))
    return True


def _along_memory(schedule: Any, nest: _Nest) -> bool:
    """Whether the reduction runs along the last axes of whatever it reads, in their order."""
    block = schedule.get(nest.block)
    reduced = [v.var for v in block.iter_vars if int(v.iter_type) == _REDUCTION]
    along = False
    for read in block.reads:
        indices = [bounds.min for bounds in read.region]
        last = indices[-len(reduced) :]
        if len(last) == len(reduced) and all(map(_same, last, reduced)):
            along = True
        elif any(_same(index, variable) for index in indices for variable in reduced):
            return False
    return along


def _same(a: Any, b: Any) -> bool:
    return bool(a.same_as(b))


def _schedule_elementwise(schedule: Any, nest: _Nest, simd: Simd) -> None:
    work, loops = nest.work(schedule), list(nest.spatial)
    crossing = _crossing(schedule, nest)
    if crossing is not None:
        _schedule_transpose(schedule, loops, crossing, work)
        return
    *outer, inner = loops
    extent = _extent(schedule, inner)
    if _vector_factor(extent, simd) == 1 and extent < simd.lanes and outer:
        inner, outer = schedule.fuse(*loops), []
        extent = _extent(schedule, inner)
    factor = _vector_factor(extent, simd)
    if factor > 1:
        inner, lanes = schedule.split(inner, [None, factor])
        schedule.vectorize(lanes)
        outer.append(inner)
    _parallelise(schedule, outer, work)


def _crossing(schedule: Any, nest: _Nest) -> int | None:
    """Which loop runs along the memory of what a transposing copy reads, if it is one."""
    block = schedule.get(nest.block)
    variables = [v.var for v in block.iter_vars]
    if len(block.writes) != 1 or not _same(block.writes[0].region[-1].min, variables[-1]):
        return None
    for read in block.reads:
        for index, variable in enumerate(variables[:-1]):
            if read.region and _same(read.region[-1].min, variable):
                return index
    return None


def _schedule_transpose(schedule: Any, loops: list[Any], crossing: int, work: int) -> None:
    """Tiles of one cache line squared, so that each line is read and written once."""
    if min(_extent(schedule, loops[i]) for i in (crossing, -1)) < 2:
        _parallelise(schedule, loops[:-1], work)
        return
    columns, column = schedule.split(loops[-1], [None, _TILE])
    rows, row = schedule.split(loops[crossing], [None, _TILE])
    outer = [*loops[:crossing], *loops[crossing + 1 : -1], rows, columns]
    schedule.reorder(*outer, row, column)
    schedule.vectorize(column)
    schedule.unroll(row)
    _parallelise(schedule, outer, work)


def _schedule_reduction(schedule: Any, nest: _Nest, simd: Simd) -> None:
    work = nest.work(schedule)
    outer, inner = list(nest.spatial), []  # inside of the reduction: rows, then lanes
    along_memory = _along_memory(schedule, nest)
    # TVM vectorises no loop inside of a symbolic reduction; `vectorise_innermost` will.
    symbolic = any(not _extent(schedule, loop) for loop in nest.reduction)
    factor = _vector_factor(_extent(schedule, outer[-1]), simd) if outer else 1
    if factor > 1 and not along_memory:
        outer[-1], lanes = schedule.split(outer[-1], [None, factor])
        inner = [lanes]
        if len(outer) > 1 and (_extent(schedule, outer[-2]) or 1) % _ROWS == 0:
            outer[-2], rows = schedule.split(outer[-2], [None, _ROWS])
            inner = [rows, lanes]
    schedule.reorder(*outer, *nest.reduction, *inner)
    first = nest.reduction[0]
    if along_memory:
        first = _fused(schedule, nest.reduction)
    _parallelise(schedule, outer, work)
    init = schedule.decompose_reduction(nest.block, first)
    if not inner:
        return
    for loops in (inner, schedule.get_loops(init)[-len(inner) :]):
        if not symbolic:
            schedule.vectorize(loops[-1])
        for loop in loops[:-1]:
            schedule.unroll(loop)
