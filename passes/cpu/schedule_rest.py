"""Schedule the rest: every operator without a kernel of ours gets a parallel, vectorised loop.

Matches the PrimFuncs that TVM's legalisation and fusion made, and applies the schedule that was
measured to be the fastest, ``schedules.cpu.generic`` where none was. A function that cannot be
scheduled keeps TVM's loops, and a note says what that costs.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx

from sparse_tvm.passes.cpu.target import cpu_target
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.lower_kernels import KERNEL_ATTRIBUTE
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.searched import apply_schedule, fingerprint
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.tuning.schedule_records import GENERIC, Chosen, kind


@graph_pass()
def schedule_rest(program: Program, context: Context) -> Program:
    """Apply the pass."""
    simd = Simd.of(cpu_target(context))
    told, usual = [], 0
    for var, function in without_kernel(program):
        if (found := _measured(function, context, simd)) is not None:
            program.module[var], chosen = found
            usual += chosen.schedule == GENERIC
            if chosen.schedule != GENERIC:
                how = f"{kind(chosen.schedule)}, {chosen.gain:.2f}x faster than usual"
                told.append(f"{var.name_hint} ({how})")
            continue
        try:
            program.module[var] = apply_schedule(function, GENERIC, simd)
        except s_tir.ScheduleError:
            program.notes.append(
                f"{var.name_hint} runs in plain loops on one thread, several times slower than it "
                "could: no schedule fits it"
            )
    if told or usual:
        told.append(f"{usual} in the usual schedule")
        program.notes.append("operators without a kernel, as measured: " + ", ".join(told))
    return program


def without_kernel(program: Program) -> list[tuple[Any, tirx.PrimFunc]]:
    """Operators that have no kernel of ours: their variables and functions."""
    return [
        (var, function)
        for var, function in program.module.functions.items()
        if isinstance(function, tirx.PrimFunc) and KERNEL_ATTRIBUTE not in function.attrs
    ]


def _measured(
    function: tirx.PrimFunc, context: Context, simd: Simd
) -> tuple[tirx.PrimFunc, Chosen] | None:
    """A function in its fastest schedule, and which that is; None if it was not measured."""
    if not len(context.evidence.records.schedules):
        return None
    chosen = context.evidence.schedule(fingerprint(function), context.target.name)
    if chosen is None:
        return None
    try:
        return apply_schedule(function, chosen.schedule, simd), chosen
    except Exception:  # of several kinds: the record may be damaged
        return None
