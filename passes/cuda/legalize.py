"""Legalise: TVM's lowering of what is left; sorting and scans by its kernels for GPUs."""

from __future__ import annotations

from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.legalize import legalized
from sparse_tvm.passes.program import Program


@graph_pass()
def legalize(program: Program, context: Context) -> Program:
    """Apply the pass."""
    program.module = legalized(program.module, context.target.tvm_target(), {})
    return program
