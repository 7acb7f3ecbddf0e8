"""Operators of which each element depends on one element of each input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import onnx
from tvm import relax, tirx

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.index_expressions import IndexExpression
from sparse_tvm.frontends.importer.known import Known, map_elements
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.sizes import Sizes, as_expr
from sparse_tvm.frontends.importer.tensors import Tensor


@dataclass(frozen=True)
class _Function:
    """What an operator does to the elements.

    Attributes
    ----------
    known : Callable
        Of `Sizes` and an element of each input; None where it cannot tell.
    index : Callable | None
        The same of index expressions, whose result may depend on the indices.
    tensor : Callable | None
        Relax's operator of two tensors; TVM's conversion by default.
    dtype : str | None
        The result's element type, where it is not the last input's.
    """

    known: Callable[..., Any]
    index: Callable[..., Any] | None = None
    tensor: Callable[..., relax.Expr] | None = None
    dtype: str | None = None


def elementwise(node: Node) -> Any:
    """Apply an operator of the table below."""
    function = _FUNCTIONS[node.op]
    if node.form is Known:
        return _on_known(node, function)
    if node.form is IndexExpression:
        return _on_index_expressions(node, function)
    return on_tensors(node, function.tensor)


def _on_known(node: Node, function: _Function) -> Known:
    def apply(*elements: Any) -> Any:
        return _simple(node.sizes, function.known(node.sizes, *elements))

    inputs: list[Known] = node.inputs()
    operands = [value.elements for value in inputs]
    if node.op in _VARIADIC:
        elements = reduce(partial(map_elements, apply), operands)
    else:
        elements = map_elements(apply, *operands)
    return Known(elements, function.dtype or inputs[-1].dtype)


def _simple(sizes: Sizes, value: Any) -> Any:
    if value is None:
        raise NotInForm
    return value if isinstance(value, bool | float) else sizes.simplify(value)


def _on_index_expressions(node: Node, function: _Function) -> IndexExpression:
    if function.index is None:
        raise NotInForm
    inputs: list[IndexExpression] = node.inputs()
    shape = node.sizes.broadcast([value.shape for value in inputs])
    values = [value.broadcast_to(shape).value for value in inputs]
    dtype = function.dtype or inputs[-1].dtype
    frame = IndexExpression(shape, 0, dtype, node.sizes)
    frame.bind()
    result = replace(frame, value=reduce(partial(function.index, node.sizes), values))
    return result if function.dtype == "bool" else result.simple()


def on_tensors(node: Node, operator: Callable[..., relax.Expr] | None = None) -> Tensor:
    """Apply an operator to tensors as they were before they were broadcast, and broadcast after."""
    inputs = [Tensor(value, node.scope) for value in node.tensors() if value is not None]
    plain = [value.before("broadcast_to").value for value in inputs]
    if operator is not None and len(plain) > 1:
        value = reduce(operator, plain)
    else:
        value = node.scope.by_tvm(node, plain)
    result = node.emit(node.scope.checked(node.scope.normalize(value), plain))
    return result.broadcast_to(node.sizes.broadcast([value.sizes_of_axes for value in inputs]))


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def apply(_: Sizes, left: Any, right: Any) -> Any:
        if isinstance(left, bool | float) or isinstance(right, bool | float):
            raise NotInForm
        return function(left, right)

    return apply


def _relation(operator: str, expression: type[tirx.Expr]) -> _Function:
    def known(sizes: Sizes, left: Any, right: Any) -> Any:
        return sizes.compare(operator, left, right)

    def index(sizes: Sizes, left: Any, right: Any) -> Any:
        if isinstance(left, bool | float) or isinstance(right, bool | float):
            raise NotInForm
        decided = sizes.compare(operator, left, right)
        return expression(as_expr(left), as_expr(right)) if decided is None else decided

    return _Function(known, index, dtype="bool")


def _divide(sizes: Sizes, left: Any, right: Any) -> Any:
    if isinstance(left, float) or isinstance(right, float):
        return left / right
    if isinstance(left, int) and isinstance(right, int):
        return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
    return sizes.floordiv(left, right)


def _absolute(sizes: Sizes, value: Any) -> Any:
    if isinstance(value, int | float):
        return abs(value)
    return value if sizes.compare("GreaterOrEqual", value, 0) else None


def _extreme(of_numbers: Callable[..., Any], of_sizes: Callable[..., Any]) -> Callable[..., Any]:
    def choose(sizes: Sizes, left: Any, right: Any) -> Any:
        if isinstance(left, float) or isinstance(right, float):
            return of_numbers(left, right)
        return of_sizes(sizes, left, right)

    return choose


_VARIADIC = ("Max", "Min", "Sum")

_FUNCTIONS: dict[str, _Function] = {
    "Abs": _Function(_absolute),
    "Add": _Function(lambda _, a, b: a + b, _arithmetic(lambda a, b: a + b)),
    "Ceil": _Function(lambda _, a: float(math.ceil(a))),
    "Div": _Function(_divide),
    "Equal": _relation("Equal", tirx.EQ),
    "Floor": _Function(lambda _, a: float(math.floor(a))),
    "Greater": _relation("Greater", tirx.GT),
    "GreaterOrEqual": _relation("GreaterOrEqual", tirx.GE),
    "Less": _relation("Less", tirx.LT),
    "LessOrEqual": _relation("LessOrEqual", tirx.LE),
    "Max": _Function(
        _extreme(max, Sizes.maximum),
        _arithmetic(lambda a, b: tirx.max(as_expr(a), as_expr(b))),
        relax.op.maximum,
    ),
    "Min": _Function(
        _extreme(min, Sizes.minimum),
        _arithmetic(lambda a, b: tirx.min(as_expr(a), as_expr(b))),
        relax.op.minimum,
    ),
    "Mod": _Function(lambda sizes, a, b: sizes.floormod(a, b)),
    "Mul": _Function(lambda _, a, b: a * b, _arithmetic(lambda a, b: a * b)),
    "Neg": _Function(lambda _, a: -a),
    "Sqrt": _Function(lambda _, a: math.sqrt(a)),
    "Sub": _Function(lambda _, a, b: a - b, _arithmetic(lambda a, b: a - b)),
    "Sum": _Function(lambda _, a, b: a + b, None, relax.op.add),
}

rule(*_FUNCTIONS)(elementwise)  # division.py has its own for tensors


@rule("Xor")
def _xor(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    return on_tensors(node)


@rule("And", "Or")
def _logical(node: Node) -> Any:
    """Neutral inputs drop out: masks that always hold."""
    absorbing = node.op == "Or"
    if node.form is Known:
        known = (lambda a, b: a or b) if absorbing else (lambda a, b: a and b)
        left, right = node.inputs()
        return Known(map_elements(known, left.elements, right.elements), "bool")
    if node.form is Tensor:
        for position, other in ((0, 1), (1, 0)):
            mask = node.index_expression(position)
            if mask is not None and mask.uniform is (not absorbing):
                shape = node.sizes.broadcast([node.shape(0), node.shape(1)])
                return node.emit(node.tensor(other)).broadcast_to(shape)
        return on_tensors(node)
    left, right = node.inputs()
    shape = node.sizes.broadcast([left.shape, right.shape])
    left, right = left.broadcast_to(shape), right.broadcast_to(shape)
    for one, other in ((left, right), (right, left)):
        if isinstance(one.value, bool):
            return one if one.value is absorbing else other
    return replace(left, value=(tirx.Or if absorbing else tirx.And)(left.value, right.value))


@rule("Not")
def _not(node: Node) -> Any:
    value = node.input(0)
    if node.form is Known:
        return Known(map_elements(lambda a: not a, value.elements), "bool")
    if node.form is IndexExpression:
        decided = isinstance(value.value, bool)
        return replace(value, value=not value.value if decided else tirx.Not(value.value))
    return on_tensors(node)


@rule("Where")
def _where(node: Node) -> Any:
    """A condition that is the same everywhere chooses one of the two."""
    if node.form is Known:
        condition, kept, other = node.inputs()

        def choose(wanted: Any, one: Any, two: Any) -> Any:
            return one if wanted else two

        elements = map_elements(choose, condition.elements, kept.elements, other.elements)
        return Known(elements, other.dtype)
    mask = node.index_expression(0)
    always = None if mask is None else mask.uniform
    if always is None:
        if node.form is IndexExpression:
            raise NotInForm
        return on_tensors(node)
    shape = node.sizes.broadcast([node.shape(position) for position in range(3)])
    return node.input(1 if always else 2).broadcast_to(shape)


@rule("Cast")
def _cast(node: Node) -> Any:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(node.attributes["to"]).name
    if node.form is Tensor:
        return on_tensors(node)  # TVM wraps what does not fit, as ONNX demands
    return node.input(0).astype(dtype)


@rule("CastLike")
def _cast_like(node: Node) -> Any:
    """Of the second input no more is read than its type."""
    if node.form is not Tensor:
        raise NotInForm
    known = node.known(0) or node.index_expression(0)
    return None if known is None else known.astype(node.dtype(1))


@rule("Clip")
def _clip(node: Node) -> Any:
    if node.form is not Tensor or any(node.has(p) and node.scalar(p) is None for p in (1, 2)):
        raise NotInForm
    value = node.tensor(0)
    value = relax.op.maximum(value, node.tensor(1)) if node.has(1) else value
    return node.emit(relax.op.minimum(value, node.tensor(2)) if node.has(2) else value)


@rule("Pow")
def _pow(node: Node) -> Any:
    """Multiply for the powers that models use: pow is slow and not vectorised."""
    if node.form is not Tensor:
        raise NotInForm
    base, exponent = node.input(0), node.scalar(1)
    if exponent == 2:
        return node.emit(relax.op.multiply(base.value, base.value))
    if exponent == 3:
        square = relax.op.multiply(base.value, base.value)
        return node.emit(relax.op.multiply(square, base.value))
    if exponent == 0.5 and base.dtype.startswith("float"):
        return node.emit(relax.op.sqrt(base.value))
    # Integers go by way of float64, and so does what has a power of another type.
    common = base.dtype if base.dtype.startswith("float") else "float64"
    power = relax.op.power(base.astype(common).value, node.input(1).astype(common).value)
    return node.emit(power if common == base.dtype else relax.op.round(power)).astype(base.dtype)


@rule("Sinh", "Cosh")
def _hyperbolic(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    growing = relax.op.exp(node.tensor(0))
    falling = relax.op.exp(relax.op.negative(node.tensor(0)))
    operator = relax.op.subtract if node.op == "Sinh" else relax.op.add
    return node.emit(relax.op.multiply(operator(growing, falling), relax.const(0.5, node.dtype(0))))


@rule("PRelu")
def _prelu(node: Node) -> Any:
    """Slopes broadcast as elsewhere, or go by channel as they did before opset 7."""
    if node.form is not Tensor:
        raise NotInForm
    shape, slopes = node.shape(0), node.shape(1)
    slope = node.input(1)
    last = len(slopes) == 1 and (slopes[0] == 1 or node.sizes.equal(slopes[0], shape[-1]))
    if len(slopes) == 1 and len(shape) > 1 and not last:
        slope = slope.reshape([slopes[0], *[1] * (len(shape) - 2)])
    data, zero = node.tensor(0), relax.const(0, node.dtype(0))
    below = relax.op.multiply(slope.value, relax.op.minimum(data, zero))
    return node.emit(relax.op.add(relax.op.maximum(data, zero), below))
