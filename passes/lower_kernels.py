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

from sparse_tvm.families import Extents, Kernel, KernelFamily
from sparse_tvm.operators import Operator, WeightedOperator, to_json
from sparse_tvm.passes import dialect
from sparse_tvm.passes.dense_to_sparse import WEIGHTS_STORED
from sparse_tvm.passes.graph import OPAQUE, Rewrite
from sparse_tvm.passes.infrastructure import Context, Property, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.tuning.forms import KernelCall
from sparse_tvm.tuning.schedule_records import GENERIC, kind

KERNEL_ATTRIBUTE = "sparse_tvm.kernel"
"""Marks functions that are scheduled already."""


def _not_lowered(program: Program) -> Iterable[str]:
    return dialect.described(dialect.calls(program, Operator))


LOWERED = Property("no operator of ours is left", _not_lowered)


@graph_pass(requires=[WEIGHTS_STORED], ensures=[LOWERED])
def lower_kernels(program: Program, context: Context) -> Program:
    """Apply the pass."""
    walk = _LowerKernels(program, context)
    lowered = walk.run()
    if walk.measured:
        told = ", ".join(f"{title} ({how})" for title, how in walk.measured.items())
        lowered.notes.append(f"kernels that were measured in several forms: {told}")
    return lowered


class _LowerKernels(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self.measured: dict[str, str] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value, Operator)
        if found is None:
            return None
        family = self._context.backend.family_for(found.op, self._context.target)
        operands = [extents_of(arg) for arg in found.args]
        several = isinstance(var.ty, relax.TupleType)
        types = list(var.ty.fields) if several else [var.ty]
        built = self._build(family, KernelCall(found.op, operands, tensor_extents(types[0])))
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

    def _build(self, family: KernelFamily[Any], call: KernelCall) -> Kernel:
        """The kernel of a call, in the form that was measured to be the fastest, if one was."""
        target, evidence = self._context.target, self._context.evidence
        forms, chosen = {GENERIC: call.op}, None
        if len(evidence.records.schedules):
            forms = dict(call.forms(family, target))
            chosen = evidence.schedule(call.fingerprint, target.name) if len(forms) > 1 else None
        if chosen is None or chosen.schedule not in forms:  # such a record may be damaged
            return family.build(call.op, call.operands, call.output, target)
        built = family.build(forms[chosen.schedule], call.operands, call.output, target)
        usual = chosen.schedule == GENERIC
        faster = "" if usual else f", {chosen.gain:.2f}x faster than usual"
        form = "the usual form" if usual else kind(chosen.schedule)
        self.measured[built.title] = f"measured: {form}{faster}"
        return built

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


def extents_of(expr: Any) -> Extents:
    """What a family needs to know of an operand."""
    if isinstance(expr, relax.ShapeExpr):
        known = [int(dim) if isinstance(dim, tirx.IntImm) else None for dim in expr.values]
        return Extents(tuple(known), "int64", numbers=True)
    return tensor_extents(expr.ty)


def tensor_extents(type_: relax.TensorType) -> Extents:
    """What a family needs to know of a tensor."""
    known = [int(dim) if isinstance(dim, tirx.IntImm) else None for dim in type_.shape.values]
    return Extents(tuple(known), str(type_.dtype))
