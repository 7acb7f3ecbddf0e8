"""Legalise: Relax operators that are not ours become TIR, fused where they are elementwise.

These are TVM's own passes, but for operators whose TIR would call libraries that artifacts do not
load. Our operators pass through them as opaque calls.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from sparse_tvm.passes.cpu.lower_kernels import KERNEL_ATTRIBUTE
from sparse_tvm.passes.graph import dtype_of, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.top_k import top_k


@graph_pass()
def legalize(program: Program, context: Context) -> Program:
    """Apply the passes."""
    with tvm.target.Target(context.target.tvm_target()):
        program.module = tvm.transform.Sequential(
            [
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FoldConstant(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                relax.transform.RewriteDataflowReshape(),  # reshapes become views
                # What is no loop nest can only come now: the passes above stumble over it.
                relax.transform.LegalizeOps({"relax.topk": _top_k}),
                relax.backend.DispatchSortScan(),  # cumulative sums
                relax.transform.DeadCodeElimination(["main"]),
            ]
        )(program.module)
    return program


def _top_k(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    x, attributes = call.args[0], call.attrs
    shape = shape_of(x)
    axis, k = int(attributes.axis) % len(shape), int(attributes.k)
    kernel = top_k(shape, axis, k, attributes.largest, dtype_of(x), str(attributes.dtype))
    kernel = kernel.with_attrs({KERNEL_ATTRIBUTE: "top_k"})
    best = (*shape[:axis], k, *shape[axis + 1 :])
    types = [relax.TensorType(best, dtype) for dtype in (dtype_of(x), str(attributes.dtype))]
    return relax.call_tir(builder.add_func(kernel, "top_k"), [x], types)
