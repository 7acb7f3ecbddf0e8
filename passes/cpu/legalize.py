"""Legalise: TVM's lowering of what is left, with a kernel of ours for the largest elements."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx

from sparse_tvm.passes.graph import dtype_of, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.legalize import legalized
from sparse_tvm.passes.lower_kernels import KERNEL_ATTRIBUTE
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.top_k import top_k


@graph_pass()
def legalize(program: Program, context: Context) -> Program:
    """Apply the passes."""
    target = context.target.tvm_target()
    program.module = legalized(program.module, target, {"relax.topk": _top_k})
    return program


def _top_k(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    x, attributes = call.args[0], call.attrs
    shape = shape_of(x)
    axis, k = int(attributes.axis) % len(shape), int(attributes.k)
    # An expression of sizes, such as n + 1, is a size of its own to the kernel.
    sizes = [
        s if isinstance(s, int) else tirx.Var(f"size_{i}", "int64") for i, s in enumerate(shape)
    ]
    kernel = top_k(sizes, axis, k, attributes.largest, dtype_of(x), str(attributes.dtype))
    kernel = kernel.with_attrs({KERNEL_ATTRIBUTE: "top_k"})
    best = (*shape[:axis], k, *shape[axis + 1 :])
    types = [relax.TensorType(best, dtype) for dtype in (dtype_of(x), str(attributes.dtype))]
    return relax.call_tir(builder.add_func(kernel, "top_k"), [x], types)
