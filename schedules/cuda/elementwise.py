"""Elementwise functions, by rows: a thread block has a row of a tensor, or a part of a long one.

TVM's own schedule for these numbers all elements through, so that every thread divides its number
by the length of a row, and looks up what belongs to the row, such as which line of a table it is.
Here that is the block's, and comes once.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import try_inline
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule

_SHORTEST = 128
"""Elements of a row, below which threads would have nothing to do."""

_THREADS = 256
_EACH = 4
"""Elements of a thread, at most."""


class Rows(GPUScheduleRule):  # type: ignore[misc]
    """The rule, as TVM's dlight applies it; it leaves alone what is more than one elementwise block
    over rows of a known length."""

    def apply(self, func: tirx.PrimFunc, target: Any, _: bool) -> s_tir.Schedule | None:
        """Return the schedule, or None where the rule does not apply."""
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        schedule = s_tir.Schedule(func)
        infos = normalize_prim_func(schedule)
        if infos is None:
            return None
        infos = try_inline(schedule, infos)
        if len(infos) != 1 or set(infos[0].dom_kind()) != {"S"}:
            return None
        *outer, last = schedule.get_loops(infos[0].block_rv)
        extent = schedule.get(last).extent
        if not outer or not isinstance(extent, tirx.IntImm) or int(extent) < _SHORTEST:
            return None
        each = min(_EACH, -(-int(extent) // _THREADS))
        part, turn, thread = schedule.split(last, [None, each, _THREADS])
        schedule.bind(schedule.fuse(*outer, part), "blockIdx.x")
        schedule.bind(thread, "threadIdx.x")
        schedule.unroll(turn)
        return schedule
