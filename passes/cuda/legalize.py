"""Legalise: TVM's lowering of what is left, with a cumulative sum and gathers of ours.

TVM's own sum for GPUs relies on the threads of a warp running in step, which they need not; and it
fuses no gathers.
"""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx, topi

from sparse_tvm.passes.graph import INJECTIVE, dtype_of, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.legalize import legalized
from sparse_tvm.passes.program import Program


@graph_pass()
def legalize(program: Program, context: Context) -> Program:
    """Apply the pass."""
    target = context.target.tvm_target()
    rules = {"relax.cumsum": _cumulative_sum}
    program.module = legalized(program.module, target, rules, nests={"relax.take": _take})
    return program


def _take(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    """A gather that is fused with what reads it: an embedding's sum is one kernel."""
    x, indices = call.args
    attributes = call.attrs
    return builder.call_te(
        topi.take,
        x,
        indices,
        attributes.axis,
        mode=attributes.mode,
        primfunc_attrs={"op_pattern": INJECTIVE},
    )


def _cumulative_sum(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    """Each element as a sum of its own: as many steps as elements squared, all of them parallel."""
    x, attributes = call.args[0], call.attrs
    dtype = str(attributes.dtype or "") or dtype_of(x)
    if dtype == "void":
        dtype = dtype_of(x)
    rank = len(shape_of(x))
    axis = int(attributes.axis) % rank  # the importer's are along an axis
    exclusive = bool(attributes.exclusive)

    def compute(data: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, data.shape[axis]), "k")

        def element(*at: Any) -> Any:
            source = [k if i == axis else index for i, index in enumerate(at)]
            before = k < at[axis] if exclusive else k <= at[axis]
            zero = tirx.const(0, dtype)
            return te.sum(tirx.Select(before, data(*source).astype(dtype), zero), axis=k)

        return te.compute(data.shape, element, name="cumulative_sum")

    return builder.call_te(compute, x, primfunc_name_hint="cumulative_sum")
