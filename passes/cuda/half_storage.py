"""Half storage: activations lie in memory as 16-bit floats, and operators compute in float32.

Matches whatever ``main`` computes in float32 once it is legalised. They are float16, or bfloat16
where that is the precision. Loads become conversions from it and stores conversions to it, inside
of the functions that TVM's lowering made; what a function accumulates stays float32 until it is
complete. Weights of two and more dimensions that such functions read are stored as float16;
vectors stay as they are, and so do the model's inputs and outputs, and what :mod:`.stored_forms`
says. Numbers beyond a type's range become its largest ones, so that a mask's ``-3e38`` does not
turn into an infinity whose product with 0 is no number.

Leaves everything alone where the user asks for fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax, te, tirx, topi

from sparse_tvm.operators import PRECISIONS, LayerNorm, Operator
from sparse_tvm.passes import dialect
from sparse_tvm.passes.cuda.stored_forms import REMAINDER, VIEWS, StoredForms, wanted_forms
from sparse_tvm.passes.graph import Rewrite, dtype_of, is_tensor, op_name, same_shape, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cuda.storage import LARGEST, stored_as
from sparse_tvm.schedules.cuda.weights import LARGEST_HALF


@graph_pass()
def half_storage(program: Program, context: Context) -> Program:
    """Apply the pass."""
    if context.options.precision == "fp32":
        return program
    storage = PRECISIONS[context.options.precision].input
    program = _HalfStorage(program, storage).run()
    program.module = relax.transform.DeadCodeElimination(["main"])(program.module)
    return program


class _HalfStorage(Rewrite):
    def __init__(self, program: Program, storage: str) -> None:
        super().__init__(program)
        self._storage = storage
        self._forms = StoredForms(self.graph, storage)
        self._both: dict[Any, dict[str | None, Any]] = {}  # by variable and type
        self._variants: dict[tuple[str, tuple[str, ...]], Any] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        ours = dialect.match(value, Operator)
        if ours is not None:
            return self._ours(ours, var)
        if op_name(value) == "relax.call_tir":
            return self._call(var, value)
        if isinstance(value, relax.Var | relax.TupleGetItem) or op_name(value) in VIEWS:
            return None
        return self._in_float32(value)

    def _ours(self, call: dialect.OperatorCall[Any], var: relax.Var) -> Any:
        """A call of an operator of ours, with its operands and results in their forms."""
        wanted = wanted_forms(call.op, len(call.args))
        op = call.op
        args = [self._operand(arg, form) for arg, form in zip(call.args, wanted, strict=True)]
        if isinstance(op, LayerNorm) and op.residual:
            op, args = self._with_remainder(op, args, call.args[-1])
        forms = self._forms.of(var) if dtype_of(var) == "float32" else [dtype_of(var)]
        if len(forms) == 1:
            return dialect.call(op, args, shape_of(var), forms[0])
        second = REMAINDER if REMAINDER in forms else "float32"
        types = (self._storage, second)
        both = dialect.call_several(replace(op, second=second), args, shape_of(var), types)
        stored = self.emit(both)
        found: dict[str | None, Any] = {
            dtype: self.emit(relax.TupleGetItem(stored, index)) for index, dtype in enumerate(types)
        }
        self._both[var] = found
        return found[forms[0]]

    def _with_remainder(
        self, op: LayerNorm, args: list[Any], residual: Any
    ) -> tuple[LayerNorm, list[Any]]:
        """A norm and its operands; its residual in two parts if it was stored so."""
        if REMAINDER not in self._both.get(self._forms.root(residual), {}):
            return op, args
        parts = [self._operand(residual, form) for form in (self._storage, REMAINDER)]
        return replace(op, remainder=True), [*args[:-1], *parts]

    def _operand(self, arg: Any, form: str | None) -> Any:
        """An operand in the form that is wanted: layers have no other, the rest take any."""
        known = self._both.get(self._forms.root(arg), {}).get(form)
        if known is not None:
            same = same_shape(shape_of(known), shape_of(arg))
            return known if same else self.emit(relax.op.reshape(known, shape_of(arg)))
        new = self.new(arg)
        return self._converted(new, form) if form in LARGEST else new

    def _call(self, var: relax.Var, value: Any) -> Any:
        function, operands = value.args[0], value.args[1]
        args = [self._half_weight(arg) for arg in operands.fields]
        types = [value.ty_args[0]]
        several = isinstance(types[0], relax.TupleType)
        if several:
            types = list(types[0].fields)
        dtypes = [
            *(dtype_of(arg) for arg in args),
            *(self._dtype(var, each) for each in types),
        ]
        variant = self._variant(function, dtypes)
        if variant is None:
            return self._in_float32(value)
        outputs = [
            relax.TensorType(each.shape, dtype)
            for each, dtype in zip(types, dtypes[len(args) :], strict=True)
        ]
        sizes = [value.args[2]] if len(value.args) > 2 else []
        return relax.call_tir(variant, args, outputs if several else outputs[0], *sizes)

    def _variant(self, function: Any, dtypes: Sequence[str]) -> Any:
        """The function that reads and writes these types; None if it cannot be had."""
        key = (function.name_hint, tuple(dtypes))
        if key not in self._variants:
            original = self.program.module[function]
            made = stored_as(original, dtypes)
            if made is not None and made is not original:
                function = self.builder.add_func(made, f"{function.name_hint}_half")
            self._variants[key] = None if made is None else function
        return self._variants[key]

    def _half_weight(self, arg: Any) -> Any:
        """An operand of a function, as float16 if it is a large weight."""
        source = self.graph.value(arg)
        is_weight = isinstance(source, relax.Var) and source.name in self.program.weights
        if not is_weight or len(shape_of(source)) < 2 or dtype_of(source) != "float32":
            return self.new(arg)
        array = self.program.weights[source.name]
        half = np.clip(array, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)
        return self.weight(f"{source.name}.half", half)

    def _in_float32(self, value: Any) -> Any:
        """A call whose operands are converted to what they were in the model."""
        new = super().new(value)
        if not isinstance(new, relax.Call):
            return new
        args = [self._widened(arg) for arg in new.args]
        return relax.Call(new.op, args, new.attrs, new.ty_args)

    def _widened(self, arg: Any) -> Any:
        if isinstance(arg, relax.Tuple):
            return relax.Tuple([self._widened(field) for field in arg.fields])
        if isinstance(arg, relax.Var) and is_tensor(arg) and dtype_of(arg) in LARGEST:
            return self._converted(arg, "float32")
        return arg

    def _converted(self, arg: Any, dtype: str) -> Any:
        if dtype_of(arg) == dtype:
            return arg
        return self.builder.emit_te(_convert, arg, dtype, primfunc_name_hint=f"to_{dtype}")

    def _dtype(self, var: relax.Var, type_: Any) -> str:
        """How a result of a function is stored."""
        dtype = str(type_.dtype)
        return self._forms.of(var)[0] if dtype == "float32" else dtype


def _convert(x: te.Tensor, dtype: str) -> te.Tensor:
    x = topi.cast(x, "float32")
    if dtype in LARGEST:
        largest = tirx.const(LARGEST[dtype], "float32")
        x = topi.maximum(topi.minimum(x, largest), -largest)
    return topi.cast(x, dtype)
