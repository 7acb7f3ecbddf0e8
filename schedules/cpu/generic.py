"""A schedule for every operator that has no kernel of its own: parallel outside, SIMD inside.

TVM lowers such operators to serial scalar loops, one nest after the other. Here what only feeds
other blocks is inlined. Of the nests that remain, the last is cut into pieces of its output, in
parallel, and for each piece all that it needs is computed right there, in cache: a row of a
soft-max from its maximum to its quotient, the padded rows under a few rows of pooling windows. What
several pieces would compute again is a nest of its own, cut likewise. Within a piece

- a reduction along consecutive elements runs innermost;
- any other reduction runs around a row of its results;
- a transposing copy moves square tiles.

:mod:`loops` then makes vectors of the innermost loops. Extents may be symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import s_tir, tirx
from tvm.error import InternalError
from tvm.ir import Expr, TensorLoad
from tvm_ffi import structural_map, structural_walk

from sparse_tvm.schedules.cpu.conditions import comparisons, replace, uses
from sparse_tvm.schedules.cpu.loops import stride, vectorise_innermost
from sparse_tvm.schedules.cpu.simd import Simd

_WORTH_PARALLEL = 1 << 14
"""Iterations below which starting threads costs more than it saves."""

_UNKNOWN = 1 << 7
"""What a symbolic extent counts as."""

_REPEATED = 64
"""Nodes that inlining may repeat. LLVM computes equal expressions once, but TVM simplifies each
copy, and a few values that are read several times each grow exponentially."""

_ROW = 1 << 12
"""Elements of a row that is long enough: longer ones are cut where there are no other loops."""

_WINDOW_ROWS = 8
"""Rows of windows computed together, which share most of what they read."""

_SHARING_ROWS = 4
"""Rows of results that share what they read, as in a product of matrices."""

_PARTIAL = 4
"""Vectors of a piece of a row."""

_TILE = 16
_SPATIAL, _REDUCTION = 0, 2


@dataclass(frozen=True, eq=False)
class _Nest:
    """A block and its loops, of which each binds one of the block's variables."""

    block: Any
    spatial: list[Any]
    reduction: list[Any]
    variables: list[Any]
    """Of the spatial loops."""
    reduced: list[Any]
    """Of the reduction loops."""
    loads: list[Any]
    writes: list[Any]
    """Indices at which the block writes."""
    buffer: Any

    @classmethod
    def of(cls, schedule: Any, block: Any) -> _Nest | None:
        """The nest around a block, if it is that regular."""
        loops, definition = schedule.get_loops(block), schedule.get(block)
        variables = list(definition.iter_vars)
        kinds = [int(v.iter_type) for v in variables]
        if not loops or len(kinds) != len(loops) or not set(kinds) <= {_SPATIAL, _REDUCTION}:
            return None
        body = definition.body
        if len(definition.writes) != 1 or not isinstance(body, tirx.BufferStore):
            return None
        loads: list[Any] = []
        structural_walk(body.value, (TensorLoad, loads.append))
        own = [load for load in loads if not load.source.same_as(body.buffer)]

        def those(of: Sequence[Any], wanted: int) -> list[Any]:
            return [x for x, kind in zip(of, kinds, strict=True) if kind == wanted]

        only = [v.var for v in variables]
        return cls(
            block,
            those(loops, _SPATIAL),
            those(loops, _REDUCTION),
            those(only, _SPATIAL),
            those(only, _REDUCTION),
            own,
            list(body.indices),
            body.buffer,
        )

    def work(self, schedule: Any) -> int:
        """Iterations, symbolic extents guessed."""
        return prod(_extent(schedule, loop) or _UNKNOWN for loop in self.spatial + self.reduction)

    def reads(self, other: _Nest) -> list[Any]:
        """Loads of what another nest writes."""
        return [load for load in self.loads if load.source.same_as(other.buffer)]

    def along_memory(self) -> bool:
        """Whether a reduction's last loop runs along the memory of all that it reads."""
        var = self.reduced[-1]
        strides = [stride(load.source, load.indices, var) for load in self.loads]
        return 1 in strides and set(strides) <= {0, 1} and not self.windows()

    def sharing(self) -> list[Any]:
        """Variables of rows of results that are computed from the same vectors."""
        if not self.reduction or not self.variables:
            return []
        *rows, lane = self.variables
        vectors = [load for load in self.loads if _reads_at(load, lane)]
        if not vectors or len(vectors) == len(self.loads):
            return []
        return [row for row in rows if not any(_reads_at(load, row) for load in vectors)]

    def windows(self) -> bool:
        """Whether neighbouring results read some of the same elements, as in pooling."""
        return any(
            any(uses(index, v) for v in self.variables)
            and any(uses(index, v) for v in self.reduced)
            for load in self.loads
            for index in load.indices
        )


def _reads_at(load: Any, variable: Any) -> bool:
    """Whether a variable decides what is read."""
    return any(uses(index, variable) for index in load.indices)


def schedule_generic(function: tirx.PrimFunc, simd: Simd) -> tirx.PrimFunc:
    """Schedule a PrimFunc of blocks; one without blocks is returned as it is."""
    schedule = s_tir.Schedule(function)
    root = schedule.get_sblock("root")
    blocks = [b for b in schedule.get_child_blocks(root) if not _inlined(schedule, b)]
    left = []
    for block in blocks:
        nest = _Nest.of(schedule, block)
        if nest is None:
            _parallelise_only(schedule, block)
        else:
            left.append(nest)
    while left:
        last = left.pop()
        for nest in _schedule_group(schedule, last, left, simd):
            left.remove(nest)
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


def _fused(schedule: Any, loops: list[Any]) -> Any:
    return schedule.fuse(*loops) if len(loops) > 1 else loops[0]


def _outermost(schedule: Any, loops: list[Any]) -> Any:
    """As many of the outer loops as TVM can fuse: not always those of symbolic pieces."""
    try:
        return _fused(schedule, loops)
    except InternalError:
        return _outermost(schedule, loops[:-1])


def _parallelise_only(schedule: Any, block: Any) -> None:
    """The loops of an irregular block, several results at once say, on all threads."""
    loops, variables = schedule.get_loops(block), schedule.get(block).iter_vars
    outer = []
    for loop, variable in zip(loops, variables, strict=False):
        if int(variable.iter_type) != _SPATIAL:
            break
        outer.append(loop)
    if outer and len(loops) == len(variables):
        work = prod(_extent(schedule, loop) or _UNKNOWN for loop in loops)
        _parallelise(schedule, outer[:-1] if len(outer) == len(loops) else outer, work)


def _parallelise(schedule: Any, loops: list[Any], work: int) -> None:
    if loops and work >= _WORTH_PARALLEL:
        schedule.parallel(_outermost(schedule, loops))


def _schedule_group(schedule: Any, last: _Nest, others: Sequence[_Nest], simd: Simd) -> list[_Nest]:
    """Schedule a nest, and within its pieces those of the others that only they need.

    Returns the nests that went there.
    """
    producers = [nest for nest in others if last.reads(nest)]
    if not producers and not last.reduction:
        _schedule_elementwise(schedule, last, simd)
        return []
    outer = _outer(last, producers)
    placed = _placed(schedule, last, others, outer)
    work = max(nest.work(schedule) for nest in placed)

    around, row = _pieces(schedule, last, placed, outer, simd)
    if not around:
        _order_reduction(schedule, last, row, last.reduction)
        return []
    at = _fused(schedule, around)
    if work >= _WORTH_PARALLEL:
        schedule.parallel(at)
    members = [last]
    for nest in placed:
        readers = [other for other in placed if other.reads(nest)]
        if nest is last or any(other not in members for other in readers):
            continue
        if not _needs_a_part(schedule, nest, at):
            continue
        schedule.compute_at(nest.block, at, preserve_unit_loops=True)
        members.append(nest)
        _, *loops = schedule.get_loops(nest.block)
        count = len(nest.spatial)
        _order_reduction(schedule, nest, loops[:count], loops[count:])
    _order_reduction(schedule, last, row, last.reduction)
    return members[1:]


def _needs_a_part(schedule: Any, nest: _Nest, at: Any) -> bool:
    """Whether a piece needs a part of a nest only, as far as TVM can tell.

    It computes the whole for each piece where it understands no better what is read.
    """
    pieces, whole = _extent(schedule, at), nest.work(schedule)
    if pieces <= 1:
        return True
    trial = schedule.copy()
    trial.compute_at(nest.block, at, preserve_unit_loops=True)
    _, *loops = trial.get_loops(nest.block)
    return prod(_extent(trial, loop) or _UNKNOWN for loop in loops) < whole


def _pieces(
    schedule: Any,
    last: _Nest,
    placed: dict[_Nest, dict[Any, int]],
    outer: Sequence[int],
    simd: Simd,
) -> tuple[list[Any], list[Any]]:
    """Loops over the pieces of a nest, and the spatial loops within a piece, by variable."""
    sizes = dict.fromkeys(outer, 1)
    for nest, loops in placed.items():
        sizes |= {loops[v]: _SHARING_ROWS for v in nest.sharing() if v in loops}
    if outer and any(nest.windows() for nest in placed):
        sizes[outer[-1]] = _WINDOW_ROWS
    elif not outer:
        sizes[len(last.spatial) - 1] = _PARTIAL * simd.lanes
    around, row = [], []
    for i, loop in enumerate(last.spatial):
        extent = _extent(schedule, loop)
        size = sizes.get(i, 0)
        inner = loop
        if size:
            size = _divisor(extent, size) if outer else _divisor(extent, size, simd.lanes)
            pieces, inner = schedule.split(loop, [None, size])
            around.append(pieces)
        row.append(inner)
    schedule.reorder(*around, *row, *last.reduction)
    return around, row


def _outer(last: _Nest, producers: Sequence[_Nest]) -> list[int]:
    """Spatial loops of a nest that cut it into pieces: all that it needs depends on each."""
    outer = [
        i
        for i, variable in enumerate(last.variables)
        if all(_reads_at(load, variable) for nest in producers for load in last.reads(nest))
    ]
    reductions = [nest for nest in (last, *producers) if nest.reduction]
    single = reductions and all(nest.along_memory() for nest in reductions)
    innermost = len(last.variables) - 1
    if innermost in outer and not single:
        outer.remove(innermost)
    return outer


def _placed(
    schedule: Any, last: _Nest, others: Sequence[_Nest], outer: Sequence[int]
) -> dict[_Nest, dict[Any, int]]:
    """A nest and those that only it needs, and of which its pieces need different parts.

    Consumers come first. Of each nest: which of the last nest's loops its variables follow.
    """
    wanted = {i for i in outer if _extent(schedule, last.spatial[i]) != 1}
    placed = {last: {last.variables[i]: i for i in outer}}
    for nest in reversed(others):
        readers = [other for other in placed if other.reads(nest)]
        if len(readers) != len(schedule.get_consumers(nest.block)) or not readers:
            continue
        found: dict[Any, int] = {}
        for load in readers[0].reads(nest):
            for index, own in zip(load.indices, nest.writes, strict=True):
                for variable, loop in placed[readers[0]].items():
                    if uses(index, variable) and own in nest.variables:
                        found[own] = loop
        if wanted <= set(found.values()):
            placed[nest] = found
    return placed


def _order_reduction(
    schedule: Any, nest: _Nest, spatial: Sequence[Any], reduction: Sequence[Any]
) -> None:
    """Put a reduction's loops inside of all others, or around rows of results."""
    if not reduction:
        return
    first = reduction[0]
    if spatial and not nest.along_memory():
        sharing = nest.sharing()
        rows = [loop for loop, v in zip(spatial, nest.variables, strict=True) if v in sharing]
        outer = [loop for loop in spatial[:-1] if loop not in rows]
        schedule.reorder(*outer, *reduction, *rows, spatial[-1])
    elif _contiguous(nest, reduction):
        first = _fused(schedule, list(reduction))
    schedule.decompose_reduction(nest.block, first)


def _contiguous(nest: _Nest, reduction: Sequence[Any]) -> bool:
    """Whether the loops of a reduction are one loop along what it reads."""
    count = len(reduction)
    return all(
        len(load.indices) >= count and all(map(_same, load.indices[-count:], nest.reduced))
        for load in nest.loads
    )


def _divisor(extent: int, most: int, multiple: int = 1) -> int:
    """The largest divisor of an extent that is not larger than ``most``; 1 if there is none."""
    found = (d for d in range(most, 1, -1) if d % multiple == 0 and extent % d == 0)
    return next(found, 1) if extent else 1


def _same(a: Any, b: Any) -> bool:
    return bool(a.same_as(b))


def _schedule_elementwise(schedule: Any, nest: _Nest, simd: Simd) -> None:
    """Rows in parallel, of as many trailing loops as are one loop along all memory."""
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
    outer, row = loops[:-count], _fused(schedule, loops[-count:])
    if not outer:
        extent = _extent(schedule, row)
        piece = _divisor(extent, _ROW, simd.lanes)
        if work >= _WORTH_PARALLEL and (piece > 1 or not extent):
            row, _ = schedule.split(row, [None, piece if extent else _ROW])
            outer = [row]
    _parallelise(schedule, outer, work)


def _row_loops(schedule: Any, nest: _Nest) -> int:
    """Trailing loops along which everything is consecutive, or the same."""
    extents = [_extent(schedule, loop) for loop in nest.spatial]
    body = schedule.get(nest.block).body
    values = structural_map(body.value, (TensorLoad, lambda load: tirx.const(0, load.ty.dtype)))
    best, size = 1, 1
    for count in range(1, len(extents) + 1):
        extent, variable = extents[-count], nest.variables[-count]
        if not extent or uses(values, variable):
            break
        size *= extent
        if size > _ROW and best > 1:
            break
        if count > 1 and not _one_loop(nest, extents[-count:]):
            break
        best = count
    return best


def _one_loop(nest: _Nest, extents: Sequence[int]) -> bool:
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


def _crossing(nest: _Nest) -> int | None:
    """Which loop runs along the memory of what a transposing copy reads, if it is one."""
    if not _same(nest.writes[-1], nest.variables[-1]):
        return None
    for load in nest.loads:
        for index, variable in enumerate(nest.variables[:-1]):
            if load.indices and _same(load.indices[-1], variable):
                return index
    return None


def _schedule_joined(schedule: Any, loops: list[Any], crossing: int, work: int, simd: Simd) -> None:
    """Vectors along what is read: what joins transposed parts is another thing in each column."""
    extent = _extent(schedule, loops[crossing])
    size = _divisor(extent, _TILE, simd.lanes)
    rows, row = schedule.split(
        loops[crossing], [None, size if size > 1 else _divisor(extent, _TILE)]
    )
    outer = [*loops[:crossing], *loops[crossing + 1 : -1], rows]
    schedule.reorder(*outer, loops[-1], row)
    schedule.vectorize(row)
    _parallelise(schedule, outer, work)


def _schedule_transpose(schedule: Any, loops: list[Any], crossing: int, work: int) -> None:
    """Tiles of one cache line squared, so that each line is read and written once."""
    outer = loops[:-1]
    if min(_extent(schedule, loops[i]) for i in (crossing, -1)) >= 2:
        columns, column = schedule.split(loops[-1], [None, _TILE])
        rows, row = schedule.split(loops[crossing], [None, _TILE])
        outer = [*loops[:crossing], *loops[crossing + 1 : -1], rows, columns]
        schedule.reorder(*outer, row, column)
        schedule.vectorize(column)
        schedule.unroll(row)
    _parallelise(schedule, outer, work)
