"""Blocks of elementwise operators and reductions with the loops around them, and parts of loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from math import prod
from typing import Any

from tvm import tirx
from tvm.error import InternalError
from tvm.ir import TensorLoad
from tvm_ffi import structural_walk

from sparse_tvm.schedules.cpu.conditions import replace, uses
from sparse_tvm.schedules.cpu.loops import stride

WORTH_PARALLEL = 1 << 14
"""Iterations below which starting threads costs more than it saves."""

UNKNOWN = 1 << 7
"""What a symbolic extent counts as."""

SPATIAL, REDUCTION = 0, 2


@dataclass(frozen=True, eq=False)
class Nest:
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
    def of(cls, schedule: Any, block: Any) -> Nest | None:
        """The nest around a block, if it is that regular."""
        loops, definition = schedule.get_loops(block), schedule.get(block)
        variables = list(definition.iter_vars)
        kinds = [int(v.iter_type) for v in variables]
        if not loops or len(kinds) != len(loops) or not set(kinds) <= {SPATIAL, REDUCTION}:
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
            those(loops, SPATIAL),
            those(loops, REDUCTION),
            those(only, SPATIAL),
            those(only, REDUCTION),
            own,
            list(body.indices),
            body.buffer,
        )

    def without_single(self, schedule: Any) -> Nest:
        """The nest without spatial loops of one iteration, which go around it.

        They say nothing about the order in which memory is read and written.
        """
        once = [loop for loop in self.spatial if extent_of(schedule, loop) == 1]
        if not once or len(once) == len(self.spatial):
            return self
        kept = [i for i, loop in enumerate(self.spatial) if loop not in once]
        loops = [self.spatial[i] for i in kept]
        schedule.reorder(*once, *loops)
        loads, writes = self.loads, self.writes
        for loop, variable in zip(self.spatial, self.variables, strict=True):
            if loop in once:
                zero = tirx.const(0, variable.ty.dtype)
                loads, writes = (
                    [replace(one, variable, zero) for one in accesses]
                    for accesses in (loads, writes)
                )
        names = [self.variables[i] for i in kept]
        return replace_fields(self, spatial=loops, variables=names, loads=loads, writes=writes)

    def work(self, schedule: Any) -> int:
        """Iterations, symbolic extents guessed."""
        return prod(extent_of(schedule, loop) or UNKNOWN for loop in self.spatial + self.reduction)

    def reads(self, other: Nest) -> list[Any]:
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
        vectors = [load for load in self.loads if reads_at(load, lane)]
        if not vectors or len(vectors) == len(self.loads):
            return []
        return [row for row in rows if not any(reads_at(load, row) for load in vectors)]

    def windows(self) -> bool:
        """Whether neighbouring results read some of the same elements, as in pooling."""
        return any(
            any(uses(index, v) for v in self.variables)
            and any(uses(index, v) for v in self.reduced)
            for load in self.loads
            for index in load.indices
        )


def reads_at(load: Any, variable: Any) -> bool:
    """Whether a variable decides what is read."""
    return any(uses(index, variable) for index in load.indices)


def extent_of(schedule: Any, loop: Any) -> int:
    """Extent of a loop, 0 if it is symbolic."""
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else 0


def fused(schedule: Any, loops: list[Any]) -> Any:
    """Loops, each directly in the one before, as one."""
    return schedule.fuse(*loops) if len(loops) > 1 else loops[0]


def _outermost(schedule: Any, loops: list[Any]) -> Any:
    """As many of the outer loops as TVM can fuse: not always those of symbolic pieces."""
    try:
        return fused(schedule, loops)
    except InternalError:
        return _outermost(schedule, loops[:-1])


def parallelise(schedule: Any, loops: list[Any], work: int) -> None:
    """Run outer loops on all threads, if the iterations of all loops are worth it."""
    if loops and work >= WORTH_PARALLEL:
        schedule.parallel(_outermost(schedule, loops))


def divisor(extent: int, most: int, multiple: int = 1) -> int:
    """The largest divisor of an extent that is not larger than ``most``; 1 if there is none."""
    found = (d for d in range(most, 1, -1) if d % multiple == 0 and extent % d == 0)
    return next(found, 1) if extent else 1


def same(a: Any, b: Any) -> bool:
    """Whether both are one node of TVM's."""
    return a is not None and bool(a.same_as(b))
