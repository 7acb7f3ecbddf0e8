"""Schedule the rest: every operator without a kernel of ours gets a schedule of TVM's for GPUs.

Matches the PrimFuncs that TVM's legalisation and fusion made, and applies the first rule that fits:
ours for elementwise functions over rows, then those of TVM's dlight, of which the last one fits
everything.
"""

from __future__ import annotations

import tvm
from tvm.s_tir import dlight

from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.lower_kernels import KERNEL_ATTRIBUTE
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cuda.elementwise import Rows
from sparse_tvm.schedules.cuda.storage import plainly_named


@graph_pass()
def schedule_rest(program: Program, context: Context) -> Program:
    """Apply the pass."""
    rest = {
        var: plainly_named(function)
        for var, function in program.module.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc) and KERNEL_ATTRIBUTE not in function.attrs
    }
    schedule = dlight.ApplyDefaultSchedule(
        Rows(),
        dlight.gpu.Matmul(),
        dlight.gpu.GEMV(),
        dlight.gpu.Reduction(),
        dlight.gpu.GeneralReduction(),
        dlight.gpu.Fallback(),
    )
    with tvm.target.Target(context.target.tvm_target()):
        scheduled = schedule(tvm.IRModule(rest))
    by_name = {var.name_hint: function for var, function in scheduled.functions.items()}
    for var in rest:
        program.module[var] = by_name[var.name_hint]
    return program
