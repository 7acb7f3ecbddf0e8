"""Overlap launches: kernels of ours are launched while those before them still run.

Matches kernels of ours for devices that can launch dependent ones early, of compute capability 9.0
and more. Such a kernel starts once every block of the one before has ended or allowed it, which
ours do as soon as those before them are done, and waits before it reads or writes: launching it,
and what it does before, cost no time of their own (CUDA's programmatic dependent launch). TVM's own
functions do not wait, and are left alone.
"""

from __future__ import annotations

import tvm

from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.lower_kernels import KERNEL_ATTRIBUTE
from sparse_tvm.passes.program import Program
from sparse_tvm.targets.cuda import CudaTarget

_FIRST_CAPABILITY = 90

_EARLY = "tirx.use_programtic_dependent_launch"  # TVM spells it so
_LAUNCH = "tirx.kernel_launch_params"


@graph_pass()
def overlap_launches(program: Program, context: Context) -> Program:
    """Apply the pass."""
    target = context.target
    assert isinstance(target, CudaTarget)
    if target.least.capability < _FIRST_CAPABILITY:
        return program
    for var, function in program.module.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc) and KERNEL_ATTRIBUTE in function.attrs:
            program.module[var] = function.with_attr(_LAUNCH, [_EARLY])
    return program
