"""Select by data: operators whose results say how much of them counts become ours.

The importer writes them as calls of a function by ONNX's name, with the fields of the operator that
they become as JSON; their results are those of :mod:`sparse_tvm.operators.selection`. A backend
without a kernel for one refuses the model, for nothing else computes it.
"""

from __future__ import annotations

import json
from typing import Any

from tvm import relax

from sparse_tvm.errors import ModelError
from sparse_tvm.operators import (
    HoldSize,
    LargestElements,
    Operator,
    SelectNonzero,
    SuppressBoxes,
    UniqueRows,
    from_json,
)
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program

_OPERATORS: dict[str, type[Operator]] = {
    "onnx.Gather": HoldSize,
    "onnx.NonMaxSuppression": SuppressBoxes,
    "onnx.NonZero": SelectNonzero,
    "onnx.TopK": LargestElements,
    "onnx.Unique": UniqueRows,
}


@graph_pass()
def select_by_data(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _SelectByData(program, context).run()


class _SelectByData(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        name = _function_called(value)
        if name not in _OPERATORS:
            return None
        *args, text = value.args[1].fields
        op = from_json(_OPERATORS[name].name, json.loads(text.value))
        backend, target = self._context.backend, self._context.target
        refusal = backend.refuses(op, target)
        if refusal is not None:
            operator = name.removeprefix("onnx.")
            raise ModelError(f"{operator} cannot be compiled for {target.name}: {refusal}")
        args = [self.new(arg) for arg in args]
        if isinstance(value.ty, relax.TensorType):
            return dialect.call(op, args, value.ty.shape.values, str(value.ty.dtype))
        results = [(field.shape.values, str(field.dtype)) for field in value.ty.fields]
        return dialect.call_results(op, args, results)


def _function_called(value: Any) -> str:
    """The name of the function that a destination-passing call names, or nothing."""
    if not isinstance(value, relax.Call) or not value.args:
        return ""
    if not isinstance(value.args[0], relax.ExternFunc):
        return ""
    return str(value.args[0].global_symbol)
