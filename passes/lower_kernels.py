"""Lower kernels: our operators become calls of TIR kernels.

Matches every operator of ours and turns it into ``call_tir`` of the kernel that its family builds
for its operands. Calls for which the same kernel was built share it, so BERT-base's 73 layers need
a handful. The program remembers what each kernel computes and for which layers, for the profiler.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from tvm import relax, tirx

from sparse_tvm.families import Extents, Kernel
from sparse_tvm.operators import Operator, WeightedOperator, to_json
from sparse_tvm.passes import dialect
from sparse_tvm.passes.dense_to_sparse import WEIGHTS_STORED
from sparse_tvm.passes.graph import OPAQUE, Rewrite
from sparse_tvm.passes.infrastructure import Context, Property, graph_pass
from sparse_tvm.passes.program import Program

KERNEL_ATTRIBUTE = "sparse_tvm.kernel"
"""Marks functions that are scheduled already."""


def _not_lowered(program: Program) -> Iterable[str]:
    return dialect.described(dialect.calls(program, Operator))


LOWERED = Property("no operator of ours is left", _not_lowered)


@graph_pass(requires=[WEIGHTS_STORED], ensures=[LOWERED])
def lower_kernels(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _LowerKernels(program, context).run()


class _LowerKernels(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value, Operator)
        if found is None:
            return None
        family = self._context.backend.family_for(found.op, self._context.target)
        operands = [_extents(arg) for arg in found.args]
        several = isinstance(var.ty, relax.TupleType)
        types = list(var.ty.fields) if several else [var.ty]
        built = family.build(found.op, operands, _tensor_extents(types[0]), self._context.target)
        name = found.op.name
        marked = built.function.with_attrs({KERNEL_ATTRIBUTE: name, "op_pattern": OPAQUE})
        kernel = self.builder.add_func(marked, built.title)  # the one there is, if it is the same
        self._note(kernel.name_hint, family.name, found.op, built)
        args = []
        for arg in found.args:
            if isinstance(arg, relax.ShapeExpr):  # numbers are in the kernel already
                args += [dim for dim in arg.values if not isinstance(dim, tirx.IntImm)]
            else:
                args.append(self.new(arg))
        return relax.call_tir(kernel, args, types)

    def _note(self, function: str, family: str, op: Operator, built: Kernel) -> None:
        """Remember what the function computes, and which layer this call serves."""
        layer = op.layer if isinstance(op, WeightedOperator) else op.name
        anonymous = replace(op, layer="") if isinstance(op, WeightedOperator) else op
        kernel = self.program.kernels.setdefault(
            function,
            {
                "kind": op.name,
                "family": family,
                "operator": to_json(anonymous),
                "layers": [],
            },
        )
        for each in self.program.merged.get(layer, (layer,)):
            kernel["layers"].append(each)
            if each in self.program.reports:
                self.program.reports[each].kernel = built.title


def _extents(expr: Any) -> Extents:
    """What a family needs to know of an operand."""
    if isinstance(expr, relax.ShapeExpr):
        known = [int(dim) if isinstance(dim, tirx.IntImm) else None for dim in expr.values]
        return Extents(tuple(known), "int64", numbers=True)
    return _tensor_extents(expr.ty)


def _tensor_extents(type_: relax.TensorType) -> Extents:
    known = [int(dim) if isinstance(dim, tirx.IntImm) else None for dim in type_.shape.values]
    return Extents(tuple(known), str(type_.dtype))
