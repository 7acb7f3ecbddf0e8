"""Schedule the rest: every operator without a kernel of ours gets a parallel, vectorised loop.

Matches the PrimFuncs that TVM's legalisation and fusion made, and applies
``schedules.cpu.generic``. A function that cannot be scheduled keeps TVM's loops, and a note
says what that costs.
"""

from __future__ import annotations

from tvm import s_tir, tirx

from sparse_tvm.passes.cpu.target import cpu_target
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.lower_kernels import KERNEL_ATTRIBUTE
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.generic import schedule_generic
from sparse_tvm.schedules.cpu.simd import Simd


@graph_pass()
def schedule_rest(program: Program, context: Context) -> Program:
    """Apply the pass."""
    simd = Simd.of(cpu_target(context))
    for var, function in program.module.functions.items():
        if not isinstance(function, tirx.PrimFunc) or KERNEL_ATTRIBUTE in function.attrs:
            continue
        try:
            scheduled = schedule_generic(function, simd)
        except s_tir.ScheduleError:
            program.notes.append(
                f"{var.name_hint} runs in plain loops on one thread, several times slower than it "
                "could: no schedule fits it"
            )
            continue
        program.module[var] = scheduled.with_attrs(dict(function.attrs.items()))
    return program
