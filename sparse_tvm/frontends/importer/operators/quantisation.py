"""Rounding to integers and its undoing, as the reals that they are.

Integers wait as float32 wherever nothing but ``DequantizeLinear`` reads them: what is rounded is
then clipped, rounded and scaled in one go, and stays in the layout of activations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from tvm import relax

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.tensors import Tensor
from sparse_tvm.frontends.onnx.quantised_numbers import wrong_scale

_EXACT = ("int8", "uint8", "int16", "uint16")
"""Integers that float32 holds, and that models round to."""


@rule("QuantizeLinear")
def _quantize(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    dtype = node.dtype(2) if node.has(2) else _named_dtype(node)
    if dtype not in _EXACT:
        raise ValueError(f"activations of {dtype} are not supported")
    x, scale = node.input(0).astype("float32"), _scale(node)
    zero = _zero_point(node)
    return _integers(node, x.value, scale, zero, dtype)


@rule("DequantizeLinear")
def _dequantize(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    zero = _zero_point(node)
    integers = _as_floats(node.input(0))
    if zero is not None:
        integers = _unshifted(node, integers, zero)
    return node.emit(relax.op.multiply(integers, _scale(node)))


@rule("DynamicQuantizeLinear")
def _dynamic(node: Node) -> Any:
    """Scale and zero point are those of the values that there are, 0 being one of them."""
    if node.form is not Tensor:
        raise NotInForm
    x, nothing = node.tensor(0), _number(0)
    least = relax.op.minimum(relax.op.min(x), nothing)
    largest = relax.op.maximum(relax.op.max(x), nothing)
    span = relax.op.subtract(largest, least)
    empty = relax.op.equal(span, nothing)
    # By what only run time knows: a division by a constant may become a product.
    steps, span = (relax.op.where(empty, _number(1), value) for value in (_number(255), span))
    scale = node.emit(relax.op.divide(span, steps))
    distance = relax.op.divide(relax.op.subtract(nothing, least), scale.value)
    zero = node.emit(relax.op.round(_clipped(distance, nothing, _number(255))))
    q = _integers(node, x, scale.value, zero.value, "uint8")
    return q, scale, zero.astype("uint8")


def _named_dtype(node: Node) -> str:
    type_ = node.attributes.get("output_dtype", 0) or onnx.TensorProto.UINT8
    return str(onnx.helper.tensor_dtype_to_np_dtype(type_).name)


def _integers(
    node: Node, x: relax.Expr, scale: relax.Expr, zero: relax.Expr | None, dtype: str
) -> Tensor:
    """Return ``round(x / scale) + zero`` within what `dtype` holds."""
    limits = np.iinfo(dtype)
    low, high = (_minus(limit, zero) for limit in (limits.min, limits.max))
    rounded = relax.op.round(_clipped(relax.op.divide(x, scale), low, high))
    shifted = rounded if zero is None else relax.op.add(rounded, zero)
    return node.emit(relax.op.astype(shifted, dtype))


def _minus(limit: int, zero: relax.Expr | None) -> relax.Expr:
    if zero is None:
        return _number(limit)
    constant = _constant(zero)
    if constant is None:
        return relax.op.subtract(_number(limit), zero)
    return relax.const(np.float32(limit) - constant, "float32")


def _clipped(value: relax.Expr, low: relax.Expr, high: relax.Expr) -> relax.Expr:
    return relax.op.minimum(relax.op.maximum(value, low), high)


def _number(value: float) -> relax.Expr:
    return relax.const(value, "float32")


def _constant(value: relax.Expr) -> Any:
    return value.value.numpy() if hasattr(value, "value") else None


def _scale(node: Node) -> relax.Expr:
    """Return the scale so that it broadcasts."""
    constant = node.constant(1)
    if constant is not None and (found := wrong_scale(constant)) is not None:
        raise ValueError(f"its scale is {found:g}, not a positive number")
    return _along_axis(node, node.tensor(1), constant)


def _zero_point(node: Node) -> relax.Expr | None:
    """Return the zero point in float32, so that it broadcasts; None where it is 0."""
    if not node.has(2):
        return None
    constant = node.constant(2)
    if constant is None:
        return _along_axis(node, _as_floats(node.input(2)), None)
    values = constant.astype(np.float32)
    return _along_axis(node, _number(0), values) if values.any() else None


def _along_axis(node: Node, value: relax.Expr, constant: Any) -> relax.Expr:
    """Return a scale or zero point, whose elements may be known, so that it broadcasts."""
    block, shape = node.attributes.get("block_size", 0), node.shape(0)
    value = value if constant is None else relax.const(constant, "float32")
    sizes = list(value.ty.shape) if constant is None else list(constant.shape)
    if block:
        axis = node.axis(1)
        repeated = node.emit(relax.op.repeat(value, block, axis))
        return repeated.slice({axis: (0, shape[axis], 1)}).value
    if constant is not None and constant.size == 1:
        return relax.const(constant.reshape(()), "float32")
    if len(sizes) != 1:
        return value
    along = [sizes[0] if axis == node.axis(1) else 1 for axis in range(len(shape))]
    if constant is not None:
        return relax.const(constant.reshape(along), "float32")
    return relax.op.reshape(value, along)


def _as_floats(integers: Tensor) -> relax.Expr:
    """Return integers as float32: as they were before they became integers, if so here."""
    plain = integers.before("astype")
    if integers.dtype in _EXACT and plain.dtype == "float32" and _is_rounded(plain):
        return plain.value
    return integers.astype("float32").value


def _is_rounded(value: Tensor) -> bool:
    """Whether a float32 was rounded here, and perhaps shifted by a zero point."""
    return value.before("add").argument_of("round") is not None


def _unshifted(node: Node, integers: relax.Expr, zero: relax.Expr) -> relax.Expr:
    """Subtract the zero point, or rather not add it before."""
    call = node.scope.definition(integers)
    if isinstance(call, relax.Call) and Tensor(integers, node.scope).argument_of("add") is not None:
        ours, theirs = _constant(call.args[1]), _constant(zero)
        same = call.args[1].same_as(zero) if theirs is None else np.array_equal(ours, theirs)
        if same:
            return call.args[0]
    return relax.op.subtract(integers, zero)
