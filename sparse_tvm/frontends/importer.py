"""TVM's ONNX importer, with plainer Relax for some operators.

For these TVM emits code that passes cannot see through (calls of TIR functions, stacking of
broadcast operands), or that is unsafe (reads at any index).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.ir import GenericConst
from tvm.relax.frontend.onnx import onnx_frontend

SUPPORTED_OPS = frozenset(onnx_frontend._get_convert_map()) - {"Attention"}
"""What can be imported. TVM's Attention is ONNX Runtime's operator, not the standard's."""


_Inputs = Any  # a list of expressions that gives None for an input left out
_Converter = Callable[[Any, dict[str, Any]], relax.Expr | None]


def _clip(inputs: _Inputs, _: dict[str, Any]) -> relax.Expr | None:
    value, low, high = inputs[0], inputs[1], inputs[2]
    if any(_scalar(bound) is None for bound in (low, high) if bound is not None):
        return None
    value = value if low is None else relax.op.maximum(value, low)
    return value if high is None else relax.op.minimum(value, high)


def _gather(inputs: _Inputs, attributes: dict[str, Any]) -> relax.Expr | None:
    """Wrap negative indices as ONNX demands, and clamp all: TVM reads whatever they point to."""
    data, indices = inputs[0], inputs[1]
    if isinstance(data, GenericConst) or not isinstance(data.ty, relax.TensorType):
        return None
    axis = attributes.get("axis", 0)
    indices = _wrap(indices, int(data.ty.shape[axis]))
    return relax.op.take(data, indices, axis, mode="clip")


def _wrap(indices: relax.Expr, extent: int) -> relax.Expr:
    """Count negative indices from the end, as ONNX does."""
    if isinstance(indices, GenericConst):
        values = indices.value.numpy()
        return relax.const(np.where(values < 0, values + extent, values), values.dtype)
    dtype = str(indices.ty.dtype)
    wrapped = relax.op.add(indices, relax.const(extent, dtype))
    negative = relax.op.less(indices, relax.const(0, dtype))
    return relax.op.where(negative, wrapped, indices)


def _one_hot(inputs: _Inputs, attributes: dict[str, Any]) -> relax.Expr | None:
    """Keep the dtype of the two values: TVM makes them float64."""
    indices, depth, values = inputs[0], _scalar(inputs[1]), inputs[2]
    if depth is None or not isinstance(values, GenericConst):
        return None
    dtype = str(values.ty.dtype)
    off, on = (tirx.const(value, dtype) for value in values.value.numpy().tolist())
    return relax.op.one_hot(
        _wrap(indices, int(depth)), on, off, int(depth), attributes.get("axis", -1)
    )


def _pow(inputs: _Inputs, _: dict[str, Any]) -> relax.Expr | None:
    """Multiply for the powers that models use: pow is slow and not vectorised."""
    base = inputs[0]
    exponent = _scalar(inputs[1])
    if exponent == 2:
        return relax.op.multiply(base, base)
    if exponent == 3:
        return relax.op.multiply(relax.op.multiply(base, base), base)
    if exponent == 0.5:
        return relax.op.sqrt(base)
    return None


def _pairwise(operator: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> _Converter:
    def convert(inputs: Any, _: dict[str, Any]) -> relax.Expr | None:
        return reduce(operator, inputs) if len(inputs) > 1 else None

    return convert


def _scalar(value: relax.Expr | None) -> float | None:
    """Return the value of a scalar constant."""
    if not isinstance(value, GenericConst) or value.value.shape not in ((), (1,)):
        return None
    return float(value.value.numpy().item())


_CONVERTERS: dict[str, _Converter] = {
    "Clip": _clip,
    "Gather": _gather,
    "Max": _pairwise(relax.op.maximum),
    "Min": _pairwise(relax.op.minimum),
    "OneHot": _one_hot,
    "Pow": _pow,
    "Sum": _pairwise(relax.op.add),
}


class Importer(onnx_frontend.ONNXGraphImporter):  # type: ignore[misc]
    """Build a Relax function from a simplified ONNX graph of opset 11 or newer."""

    def _convert_operator(
        self, op_name: str, inputs: Any, attrs: dict[str, Any], opset: int
    ) -> relax.Expr:
        convert = _CONVERTERS.get(op_name)
        plain = convert(inputs, attrs) if convert else None
        if plain is not None:
            return self.bb.normalize(plain)
        return super()._convert_operator(op_name, inputs, attrs, opset)
