"""Evaluate the integer arithmetic on shapes that exporters write into ONNX graphs.

``Shape -> Gather -> Unsqueeze -> Concat -> Reshape`` and its like compute nothing but sizes. They
are evaluated here on small arrays whose elements are numbers or expressions of the inputs'
symbolic dimensions, so that none of them becomes a run-time operator, and all shapes stay known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import onnx

from sparse_tvm.frontends.importer.sizes import Size, Sizes

MAX_ELEMENTS = 64
"""Larger arrays are not shapes."""

_INTEGERS = ("int64", "int32")


@dataclass(frozen=True)
class Known:
    """A tensor whose elements are known, at least as expressions.

    Attributes
    ----------
    elements : np.ndarray
        An array of objects: Python numbers, and expressions where sizes are symbolic.
    dtype : str
        The tensor's element type.
    """

    elements: np.ndarray
    dtype: str

    @classmethod
    def of(cls, array: np.ndarray) -> Known:
        """Wrap an array of numbers."""
        return cls(_objects(array.tolist(), array.shape), array.dtype.name)

    @classmethod
    def shape(cls, sizes: Sequence[Size]) -> Known:
        """Wrap a shape."""
        return cls(_objects(list(sizes), (len(sizes),)), "int64")

    @property
    def is_constant(self) -> bool:
        """Whether all elements are numbers."""
        return all(isinstance(e, int | float) for e in self.elements.flat)

    def constant(self) -> np.ndarray:
        """Return the elements of a constant."""
        return self.elements.astype(self.dtype)

    def sizes(self) -> list[Size]:
        """Return the elements of a vector, or of a scalar."""
        return list(self.elements.flat)


class _Unknown(Exception):
    """Raised where a value depends on more than constants and sizes."""


def evaluate(
    node: onnx.NodeProto, inputs: Sequence[Known | None], sizes: Sizes
) -> list[Known] | None:
    """Return a node's outputs when they follow from constants and sizes alone.

    Parameters
    ----------
    node : onnx.NodeProto
        Of opset 11 or newer.
    inputs : Sequence[Known | None]
        What is known of each input; None also stands for an input left out.
    sizes : Sizes
        Decides comparisons and simplifies.

    Returns
    -------
    list[Known] | None
        None when an input that is given is not known, or the operator is not one for shapes.
    """
    given = [value for name, value in zip(node.input, inputs, strict=True) if name]
    if not given or any(value is None for value in given) or node.domain not in ("", "ai.onnx"):
        return None
    arithmetic = _Arithmetic(node, list(inputs), sizes)
    try:
        outputs = arithmetic.run()
    except (_Unknown, TypeError, ValueError, ZeroDivisionError, IndexError, OverflowError):
        return None
    too_large = any(output.elements.size > MAX_ELEMENTS for output in outputs)
    return None if too_large else outputs


class _Arithmetic:
    def __init__(self, node: onnx.NodeProto, inputs: list[Known | None], sizes: Sizes) -> None:
        self.op = node.op_type
        self.output_count = len(node.output)
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self.inputs = inputs
        self.sizes = sizes

    def run(self) -> list[Known]:
        if self.op == "Cast":
            dtype = onnx.helper.tensor_dtype_to_np_dtype(self.attributes["to"]).name
            return [Known(_map(lambda value: _cast(value, dtype), self.array(0)), dtype)]
        if self.op in _ELEMENTWISE:
            return [self.elementwise(*_ELEMENTWISE[self.op])]
        if self.op == "ConstantOfShape":
            return [self.filled()]
        if self.op == "Split":
            return self.split()
        structure = getattr(self, f"on_{self.op.lower()}", None)
        if structure is None:
            raise _Unknown
        return [Known(structure(self.array(0)), self.dtype(0))]

    def array(self, index: int) -> np.ndarray:
        return self.known(index).elements

    def known(self, index: int) -> Known:
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise _Unknown
        return value

    def dtype(self, index: int) -> str:
        return self.known(index).dtype

    def integers(self, index: int, attribute: str = "", default: Any = None) -> Any:
        """Return an input, or in older opsets an attribute, that holds plain integers."""
        if attribute in self.attributes:
            return self.attributes[attribute]
        if index >= len(self.inputs) or self.inputs[index] is None:
            return default
        return self.known(index).constant().tolist()

    def elementwise(self, function: Callable[..., Any], result: str | None) -> Known:
        def apply(*elements: Any) -> Any:
            return self.simplify(function(self.sizes, *elements))

        operands = [value.elements for value in self.inputs if value is not None]
        if self.op in _VARIADIC:
            total = reduce(partial(_map, apply), operands)
        else:
            total = _map(apply, *operands)
        return Known(total, result or self.dtype(-1))

    def simplify(self, value: Any) -> Any:
        if value is None:
            raise _Unknown
        return value if isinstance(value, bool | float) else self.sizes.simplify(value)

    # Operators that move elements

    def on_identity(self, data: np.ndarray) -> np.ndarray:
        return data

    def on_concat(self, _: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [self.array(i) for i in range(len(self.inputs))], self.attributes["axis"]
        )

    def on_gather(self, data: np.ndarray) -> np.ndarray:
        indices = np.asarray(self.integers(1))
        return _as_array(np.take(data, indices, self.attributes.get("axis", 0)))

    def on_slice(self, data: np.ndarray) -> np.ndarray:
        starts, ends = self.integers(1), self.integers(2)
        axes = self.integers(3, default=range(len(starts)))
        steps = self.integers(4, default=[1] * len(starts))
        window: list[slice] = [slice(None)] * data.ndim
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            below_first = step < 0 and end < -data.shape[axis]
            window[axis] = slice(start, None if below_first else end, step)
        return _as_array(data[tuple(window)])

    def on_squeeze(self, data: np.ndarray) -> np.ndarray:
        axes = self.integers(1, "axes")
        return _as_array(data.squeeze(None if axes is None else tuple(axes)))

    def on_unsqueeze(self, data: np.ndarray) -> np.ndarray:
        return np.expand_dims(data, tuple(self.integers(1, "axes")))

    def on_reshape(self, data: np.ndarray) -> np.ndarray:
        shape = self.integers(1)
        if not self.attributes.get("allowzero", 0):
            shape = [size or data.shape[axis] for axis, size in enumerate(shape)]
        return data.reshape(shape)

    def on_flatten(self, data: np.ndarray) -> np.ndarray:
        axis = self.attributes.get("axis", 1)
        return data.reshape(math.prod(data.shape[:axis]), -1)

    def on_transpose(self, data: np.ndarray) -> np.ndarray:
        return data.transpose(self.attributes.get("perm"))

    def on_expand(self, data: np.ndarray) -> np.ndarray:
        shape = np.broadcast_shapes(data.shape, tuple(self.small(self.integers(1))))
        return np.broadcast_to(data, shape)

    def on_tile(self, data: np.ndarray) -> np.ndarray:
        return np.tile(data, self.small(self.integers(1)))

    def on_range(self, _: np.ndarray) -> np.ndarray:
        start, limit, step = (self.integers(index) for index in range(3))
        if abs(limit - start) > abs(step) * MAX_ELEMENTS:
            raise _Unknown
        values = np.arange(start, limit, step)
        return _objects(values.tolist(), values.shape)

    def on_reducesum(self, data: np.ndarray) -> np.ndarray:
        return self.accumulate(np.add, data)

    def on_reduceprod(self, data: np.ndarray) -> np.ndarray:
        return self.accumulate(np.multiply, data)

    def on_reducemax(self, data: np.ndarray) -> np.ndarray:
        return self.accumulate(np.frompyfunc(self.sizes.maximum, 2, 1), data)

    def on_reducemin(self, data: np.ndarray) -> np.ndarray:
        return self.accumulate(np.frompyfunc(self.sizes.minimum, 2, 1), data)

    def accumulate(self, function: np.ufunc, data: np.ndarray) -> np.ndarray:
        if self.dtype(0) not in _INTEGERS:
            raise _Unknown
        axes = self.integers(1, "axes")
        if axes is None:
            axes = () if self.attributes.get("noop_with_empty_axes", 0) else range(data.ndim)
        for axis in axes:
            data = function.reduce(data, axis=axis, keepdims=True)
        if not self.attributes.get("keepdims", 1):
            data = np.squeeze(data, tuple(axes))
        return _map(self.simplify, _as_array(data))

    def filled(self) -> Known:
        shape = self.small(self.integers(0))
        value = self.attributes.get("value")
        fill = np.float32(0) if value is None else onnx.numpy_helper.to_array(value).reshape(())
        return Known.of(np.full(shape, fill))

    def split(self) -> list[Known]:
        data, axis = self.array(0), self.attributes.get("axis", 0)
        parts = self.integers(1, "split")
        if parts is None:
            part = -(-data.shape[axis] // self.output_count)
            parts = [part] * (self.output_count - 1)
        pieces = np.split(data, np.cumsum(parts)[: self.output_count - 1], axis)
        return [Known(piece, self.dtype(0)) for piece in pieces]

    def small(self, shape: list[int]) -> list[int]:
        if math.prod(shape) > MAX_ELEMENTS:
            raise _Unknown
        return shape


def _objects(values: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, object)
    array[...] = np.array(values, object).reshape(shape) if shape else values
    return array


def _as_array(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else _objects(value, ())


def _map(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """Apply a function to the elements of arrays that are broadcast to one shape."""
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    if math.prod(shape) > MAX_ELEMENTS:
        raise _Unknown
    result = np.empty(shape, object)
    operands = [np.broadcast_to(array, shape) for array in arrays]
    for index in np.ndindex(shape):
        result[index] = function(*(operand[index] for operand in operands))
    return result


def _cast(value: Any, dtype: str) -> Any:
    if isinstance(value, bool | int | float):
        return np.asarray(value).astype(dtype).item()
    if dtype in _INTEGERS:
        return value
    raise _Unknown


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


def _extreme(relation: str) -> Callable[..., Any]:
    def choose(sizes: Sizes, left: Any, right: Any) -> Any:
        if isinstance(left, float) or isinstance(right, float):
            return max(left, right) if relation == "Greater" else min(left, right)
        return (sizes.maximum if relation == "Greater" else sizes.minimum)(left, right)

    return choose


def _comparison(relation: str) -> Callable[..., Any]:
    def compare(sizes: Sizes, left: Any, right: Any) -> Any:
        return sizes.compare(relation, left, right)

    return compare


_VARIADIC = ("Max", "Min", "Sum")

# The function of an element of each input, and the element type where it is not the last input's.
_ELEMENTWISE: dict[str, tuple[Callable[..., Any], str | None]] = {
    "Abs": (_absolute, None),
    "Add": (lambda _, a, b: a + b, None),
    "And": (lambda _, a, b: a and b, "bool"),
    "Cast": (lambda _, a: a, None),
    "Ceil": (lambda _, a: float(math.ceil(a)), None),
    "Div": (_divide, None),
    "Equal": (_comparison("Equal"), "bool"),
    "Floor": (lambda _, a: float(math.floor(a)), None),
    "Greater": (_comparison("Greater"), "bool"),
    "GreaterOrEqual": (_comparison("GreaterOrEqual"), "bool"),
    "Less": (_comparison("Less"), "bool"),
    "LessOrEqual": (_comparison("LessOrEqual"), "bool"),
    "Max": (_extreme("Greater"), None),
    "Min": (_extreme("Less"), None),
    "Mod": (lambda sizes, a, b: sizes.floormod(a, b), None),
    "Mul": (lambda _, a, b: a * b, None),
    "Neg": (lambda _, a: -a, None),
    "Not": (lambda _, a: not a, "bool"),
    "Or": (lambda _, a, b: a or b, "bool"),
    "Sqrt": (lambda _, a: math.sqrt(a), None),
    "Sub": (lambda _, a, b: a - b, None),
    "Sum": (lambda _, a, b: a + b, None),
    "Where": (lambda _, condition, a, b: a if condition else b, None),
}
