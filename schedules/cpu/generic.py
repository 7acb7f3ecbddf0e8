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
from math import prod
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import Expr, TensorLoad
from tvm_ffi import structural_walk

from sparse_tvm.schedules.cpu.conditions import uses
from sparse_tvm.schedules.cpu.elementwise import schedule_elementwise
from sparse_tvm.schedules.cpu.loops import vectorise_innermost
from sparse_tvm.schedules.cpu.nests import (
    REDUCTION,
    SPATIAL,
    UNKNOWN,
    WORTH_PARALLEL,
    Nest,
    divisor,
    extent_of,
    fused,
    parallelise,
    reads_at,
    same,
)
from sparse_tvm.schedules.cpu.simd import Simd

_REPEATED = 64
"""Nodes that inlining may repeat. LLVM computes equal expressions once, but TVM simplifies each
copy, and a few values that are read several times each grow exponentially."""


_WINDOW_ROWS = 8
"""Rows of windows computed together, which share most of what they read."""

_SHARING_ROWS = 4
"""Rows of results that share what they read, as in a product of matrices."""

_PARTIAL = 4
"""Vectors of a piece of a row."""


def schedule_generic(function: tirx.PrimFunc, simd: Simd) -> tirx.PrimFunc:
    """Schedule a PrimFunc of blocks; one without blocks is returned as it is."""
    schedule = s_tir.Schedule(function)
    root = schedule.get_sblock("root")
    blocks = [b for b in schedule.get_child_blocks(root) if not _inlined(schedule, b)]
    left = []
    for block in blocks:
        nest = Nest.of(schedule, block)
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
            nests = [Nest.of(schedule, b) for b in (block, consumer)]
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
    times = sum(same(load.source, buffer) for load in reads for buffer in written)
    return (times - 1) * _size(definition.body)


def _size(code: Any) -> int:
    nodes: list[Any] = []
    structural_walk(code, (Expr, nodes.append))
    return len(nodes)


def _is_reduction(definition: Any) -> bool:
    return any(int(v.iter_type) == REDUCTION for v in definition.iter_vars)


def _parallelise_only(schedule: Any, block: Any) -> None:
    """The loops of an irregular block, several results at once say, on all threads."""
    loops, variables = schedule.get_loops(block), schedule.get(block).iter_vars
    outer = []
    for loop, variable in zip(loops, variables, strict=False):
        if int(variable.iter_type) != SPATIAL:
            break
        outer.append(loop)
    if outer and len(loops) == len(variables):
        work = prod(extent_of(schedule, loop) or UNKNOWN for loop in loops)
        parallelise(schedule, outer[:-1] if len(outer) == len(loops) else outer, work)


def _schedule_group(schedule: Any, last: Nest, others: Sequence[Nest], simd: Simd) -> list[Nest]:
    """Schedule a nest, and within its pieces those of the others that only they need.

    Returns the nests that went there.
    """
    producers = [nest for nest in others if last.reads(nest)]
    if not producers and not last.reduction:
        schedule_elementwise(schedule, last, simd)
        return []
    outer = _outer(last, producers)
    placed = _placed(schedule, last, others, outer)
    work = max(nest.work(schedule) for nest in placed)

    around, row = _pieces(schedule, last, placed, outer, simd)
    if not around:
        _order_reduction(schedule, last, row, last.reduction)
        return []
    at = fused(schedule, around)
    if work >= WORTH_PARALLEL:
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


def _needs_a_part(schedule: Any, nest: Nest, at: Any) -> bool:
    """Whether a piece needs a part of a nest only, as far as TVM can tell.

    It computes the whole for each piece where it understands no better what is read.
    """
    pieces, whole = extent_of(schedule, at), nest.work(schedule)
    if pieces <= 1:
        return True
    trial = schedule.copy()
    trial.compute_at(nest.block, at, preserve_unit_loops=True)
    _, *loops = trial.get_loops(nest.block)
    return prod(extent_of(trial, loop) or UNKNOWN for loop in loops) < whole


def _pieces(
    schedule: Any,
    last: Nest,
    placed: dict[Nest, dict[Any, int]],
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
        extent = extent_of(schedule, loop)
        size = sizes.get(i, 0)
        inner = loop
        if size:
            size = divisor(extent, size) if outer else divisor(extent, size, simd.lanes)
            pieces, inner = schedule.split(loop, [None, size])
            around.append(pieces)
        row.append(inner)
    schedule.reorder(*around, *row, *last.reduction)
    return around, row


def _outer(last: Nest, producers: Sequence[Nest]) -> list[int]:
    """Spatial loops of a nest that cut it into pieces: all that it needs depends on each."""
    outer = [
        i
        for i, variable in enumerate(last.variables)
        if all(reads_at(load, variable) for nest in producers for load in last.reads(nest))
    ]
    reductions = [nest for nest in (last, *producers) if nest.reduction]
    single = reductions and all(nest.along_memory() for nest in reductions)
    innermost = len(last.variables) - 1
    if innermost in outer and not single:
        outer.remove(innermost)
    return outer


def _placed(
    schedule: Any, last: Nest, others: Sequence[Nest], outer: Sequence[int]
) -> dict[Nest, dict[Any, int]]:
    """A nest and those that only it needs, and of which its pieces need different parts.

    Consumers come first. Of each nest: which of the last nest's loops its variables follow.
    """
    wanted = {i for i in outer if extent_of(schedule, last.spatial[i]) != 1}
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
    schedule: Any, nest: Nest, spatial: Sequence[Any], reduction: Sequence[Any]
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
        first = fused(schedule, list(reduction))
    schedule.decompose_reduction(nest.block, first)


def _contiguous(nest: Nest, reduction: Sequence[Any]) -> bool:
    """Whether the loops of a reduction are one loop along what it reads."""
    count = len(reduction)
    return all(
        len(load.indices) >= count and all(map(same, load.indices[-count:], nest.reduced))
        for load in nest.loads
    )
