"""Legalise: Relax operators that are not ours become TIR, fused where they are elementwise.

These are TVM's own passes; our operators pass through them as opaque calls.
"""

from __future__ import annotations

import tvm
from tvm import relax

from sparse_tvm.passes.program import Program
from sparse_tvm.targets import Target


def legalize(program: Program, target: Target) -> Program:
    """Apply the passes."""
    with tvm.target.Target(target.tvm_target()):
        program.module = tvm.transform.Sequential(
            [
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FoldConstant(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                relax.transform.RewriteDataflowReshape(),  # reshapes become views
                relax.transform.DeadCodeElimination(["main"]),
            ]
        )(program.module)
    return program
