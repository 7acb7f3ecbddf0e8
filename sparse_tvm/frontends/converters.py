"""ONNX operators as plainer Relax than TVM's importer makes of them.

For these TVM emits code that passes cannot see through (calls of TIR functions, stacking of
broadcast operands), that is unsafe (reads at any index), or whose shape is lost where sizes are
symbolic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx
from tvm import relax, tirx
from tvm.ir import GenericConst

from sparse_tvm.frontends.input_shapes import LARGEST
from sparse_tvm.frontends.shape_arithmetic import Known
from sparse_tvm.frontends.sizes import Size, Sizes


class Operation(ABC):
    """An ONNX node whose inputs are at hand.

    Attributes
    ----------
    attributes : dict[str, Any]
        The node's attributes by name.
    sizes : Sizes
        What is known of the symbolic dimensions.
    """

    attributes: dict[str, Any]
    sizes: Sizes

    @abstractmethod
    def known(self, index: int) -> Known | None:
        """Return an input's elements, where they follow from constants and sizes."""

    @abstractmethod
    def tensor(self, index: int) -> relax.Expr | None:
        """Return an input as a tensor; None for one left out."""

    @abstractmethod
    def tensors(self) -> list[relax.Expr | None]:
        """Return all inputs."""

    @abstractmethod
    def normalize(self, value: relax.Expr) -> relax.Expr:
        """Infer the type of an expression."""

    def shape(self, index: int) -> list[Size]:
        """Return an input's sizes."""
        return shape_of(self.tensor(index))

    def vector(self, index: int) -> list[Size]:
        """Return the elements of an input that holds sizes.

        Raises
        ------
        ValueError
            When they depend on data.
        """
        known = self.known(index)
        if known is None:
            raise ValueError("a shape depends on the values of tensors")
        return known.sizes()


Converter = Callable[[Operation], relax.Expr | None]
"""Returns None to leave the node to TVM's importer."""


def shape_of(value: relax.Expr) -> list[Size]:
    """Return a tensor's sizes, plain numbers as ints."""
    return [int(s) if isinstance(s, tirx.IntImm) else s for s in value.ty.shape]


def materialise(value: Known) -> relax.Expr:
    """Return a tensor of known elements: a constant, or one computed from symbolic sizes."""
    if value.is_constant:
        return relax.const(value.constant(), value.dtype)
    elements = [relax.op.arange(size, size + 1, 1, "int64") for size in value.sizes()]
    vector = elements[0] if len(elements) == 1 else relax.op.concat(elements, 0)
    if value.dtype != "int64":
        vector = relax.op.astype(vector, value.dtype)
    return relax.op.reshape(vector, value.elements.shape)


def _clip(op: Operation) -> relax.Expr | None:
    value, low, high = (op.tensor(index) for index in range(3))
    if any(_scalar(bound) is None for bound in (low, high) if bound is not None):
        return None
    value = value if low is None else relax.op.maximum(value, low)
    return value if high is None else relax.op.minimum(value, high)


def _gather(op: Operation) -> relax.Expr | None:
    """Take with indices in bounds: a single known one may count from the end."""
    data, axis = op.tensor(0), op.attributes.get("axis", 0)
    if isinstance(data, GenericConst) and isinstance(op.tensor(1), GenericConst):
        return None
    extent = op.shape(0)[axis]
    known = op.known(1)
    if known is not None and known.elements.ndim == 0 and not isinstance(extent, int):
        [index] = known.sizes()
        if op.sizes.compare("Less", index, 0):
            start = op.sizes.simplify(index + extent)
            last = relax.op.strided_slice(data, [axis], [start], [start + 1], assume_inbound=True)
            return relax.op.squeeze(last, [axis])
    return relax.op.take(data, _wrap(op, op.tensor(1), [extent]), axis, mode="clip")


def _gather_elements(op: Operation) -> relax.Expr:
    axis = op.attributes.get("axis", 0)
    indices = _wrap(op, op.tensor(1), [op.shape(0)[axis]])
    return relax.op.gather_elements(op.tensor(0), indices, axis)


def _gather_nd(op: Operation) -> relax.Expr:
    batch = op.attributes.get("batch_dims", 0)
    coordinates = op.shape(1)[-1]
    if not isinstance(coordinates, int):
        raise ValueError("the rank of its output depends on data")
    indices = _wrap(op, op.tensor(1), op.shape(0)[batch : batch + coordinates])
    return relax.op.gather_nd(op.tensor(0), indices, batch)


def _wrap(op: Operation, indices: relax.Expr, extents: Sequence[Size]) -> relax.Expr:
    """Let negative indices count from the end, as ONNX demands."""
    extent = Known.shape(extents) if len(extents) > 1 else Known.of(np.array(0, np.int64))
    if len(extents) == 1:
        extent.elements[()] = extents[0]
    if isinstance(indices, GenericConst):
        values = indices.value.numpy()
        if not (values < 0).any():
            return indices
        if extent.is_constant:
            return relax.const(np.where(values < 0, values + extent.constant(), values))
    dtype = str(indices.ty.dtype)
    extent = Known(extent.elements, dtype)
    wrapped = relax.op.add(indices, op.normalize(materialise(extent)))
    negative = relax.op.less(indices, relax.const(0, dtype))
    return relax.op.where(negative, wrapped, indices)


def _one_hot(op: Operation) -> relax.Expr | None:
    """Keep the dtype of the two values: TVM makes them float64."""
    depth, values = _scalar(op.tensor(1)), op.tensor(2)
    if depth is None or not isinstance(values, GenericConst):
        return None
    dtype = str(values.ty.dtype)
    off, on = (tirx.const(value, dtype) for value in values.value.numpy().tolist())
    indices = _wrap(op, op.tensor(0), [int(depth)])
    return relax.op.one_hot(indices, on, off, int(depth), op.attributes.get("axis", -1))


def _pow(op: Operation) -> relax.Expr | None:
    """Multiply for the powers that models use: pow is slow and not vectorised."""
    base = op.tensor(0)
    exponent = _scalar(op.tensor(1))
    if exponent == 2:
        return relax.op.multiply(base, base)
    if exponent == 3:
        return relax.op.multiply(relax.op.multiply(base, base), base)
    if exponent == 0.5:
        return relax.op.sqrt(base)
    return None


def _pairwise(operator: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Converter:
    def convert(op: Operation) -> relax.Expr | None:
        tensors = op.tensors()
        return reduce(operator, tensors) if len(tensors) > 1 else None

    return convert


def _reshape(op: Operation) -> relax.Expr:
    data, target = op.shape(0), op.vector(1)
    if not op.attributes.get("allowzero", 0):
        target = [data[axis] if size == 0 else size for axis, size in enumerate(target)]
    given = [size for size in target if not _is(size, -1)]
    if len(given) < len(target):
        rest = op.sizes.quotient(data, given)
        target = [rest if _is(size, -1) else size for size in target]
    return relax.op.reshape(op.tensor(0), target)


def _flatten(op: Operation) -> relax.Expr:
    data = op.shape(0)
    axis = op.attributes.get("axis", 1) % (len(data) + 1)
    rows, columns = op.sizes.product(data[:axis]), op.sizes.product(data[axis:])
    return relax.op.reshape(op.tensor(0), (rows, columns))


def _expand(op: Operation) -> relax.Expr:
    """Broadcast both ways: a size of 1 in the target leaves the tensor's own size."""
    data, target = op.shape(0), op.vector(1)
    rank = max(len(data), len(target))
    data, target = ([1] * (rank - len(shape)) + shape for shape in (data, target))
    shape = [own if _is(wanted, 1) else wanted for own, wanted in zip(data, target, strict=True)]
    return relax.op.broadcast_to(op.tensor(0), shape)


def _tile(op: Operation) -> relax.Expr:
    """Broadcast along a new axis before each that is repeated."""
    value, data, repeats = op.tensor(0), op.shape(0), op.vector(1)
    split: list[Size] = []
    tiled: list[Size] = []
    for size, repeat in zip(data, repeats, strict=True):
        split += [1, size]
        tiled += [repeat, size]
    result = [op.sizes.product(pair) for pair in zip(data, repeats, strict=True)]
    value = relax.op.broadcast_to(relax.op.reshape(value, split), tiled)
    return relax.op.reshape(value, result)


def _constant_of_shape(op: Operation) -> relax.Expr:
    tensor = op.attributes.get("value")
    fill = np.float32(0) if tensor is None else onnx.numpy_helper.to_array(tensor).reshape(())
    dtype = fill.dtype.name
    return relax.op.full(op.vector(0), relax.const(fill, dtype), dtype)


def _range(op: Operation) -> relax.Expr | None:
    scalars = [op.known(index) for index in range(3)]
    if any(scalar is None or scalar.dtype != "int64" for scalar in scalars):
        return None
    [start], [limit], [step] = (op.vector(index) for index in range(3))
    return relax.op.arange(start, limit, step, "int64")


def _slice(op: Operation) -> relax.Expr:
    data = op.shape(0)
    starts, ends = op.vector(1), op.vector(2)
    axes = op.vector(3) if op.known(3) else list(range(len(starts)))
    steps = op.vector(4) if op.known(4) else [1] * len(starts)
    window: dict[int, tuple[Size, Size]] = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        assert isinstance(axis, int)
        if step != 1:
            return _strided(op, axes, starts, ends, steps)
        extent = data[axis]
        window[axis % len(data)] = (
            _bound(op.sizes, start, extent),
            _bound(op.sizes, end, extent),
        )
    cut = {
        axis: (begin, end)
        for axis, (begin, end) in window.items()
        if not (_is(begin, 0) and op.sizes.equal(end, data[axis]))
    }
    if not cut:
        return op.tensor(0)
    begins, limits = zip(*cut.values(), strict=True)
    return relax.op.strided_slice(
        op.tensor(0), list(cut), list(begins), list(limits), assume_inbound=True
    )


def _strided(
    op: Operation,
    axes: Sequence[Size],
    starts: Sequence[Size],
    ends: Sequence[Size],
    steps: Sequence[Size],
) -> relax.Expr:
    """Leave the bounds of slices with other steps than 1 to TVM."""
    bounds = ([max(min(b, LARGEST), -LARGEST) for b in bs] for bs in (starts, ends))
    return relax.op.strided_slice(op.tensor(0), list(axes), *bounds, list(steps))


def _bound(sizes: Sizes, position: Size, extent: Size) -> Size:
    """Return where a slice of an axis starts or ends, counted from its first element.

    A symbolic position in a fixed extent is taken to lie in it: models slice tables of positions
    and masks so, and could not go on with fewer rows. This limits the symbolic dimension.
    """
    if sizes.compare("Less", position, 0):
        position = sizes.simplify(position + extent)
        if sizes.compare("Less", position, 0):
            return 0
    if sizes.compare("GreaterOrEqual", position, extent):
        return extent
    if sizes.compare("LessOrEqual", position, extent):
        return position
    if isinstance(extent, int) and sizes.limit(position, extent):
        return position
    return sizes.minimum(position, extent)


def _is(size: Size, number: int) -> bool:
    return isinstance(size, int) and size == number


def _scalar(value: relax.Expr | None) -> float | None:
    """Return the value of a scalar constant."""
    if not isinstance(value, GenericConst) or value.value.shape not in ((), (1,)):
        return None
    return float(value.value.numpy().item())


CONVERTERS: dict[str, Converter] = {
    "Clip": _clip,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Max": _pairwise(relax.op.maximum),
    "Min": _pairwise(relax.op.minimum),
    "OneHot": _one_hot,
    "Pow": _pow,
    "Range": _range,
    "Reshape": _reshape,
    "Slice": _slice,
    "Sum": _pairwise(relax.op.add),
    "Tile": _tile,
}
