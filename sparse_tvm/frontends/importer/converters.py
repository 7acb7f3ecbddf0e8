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
import tvm
from tvm import relax, tirx
from tvm.ir import GenericConst

from sparse_tvm.frontends.importer.index_expressions import Grid, affine_start, index
from sparse_tvm.frontends.importer.shape_arithmetic import Known
from sparse_tvm.frontends.importer.sizes import Size, Sizes
from sparse_tvm.frontends.input_shapes import LARGEST


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
    def grid(self, index: int) -> Grid | None:
        """Return an input as an expression of its elements' indices, where it is one."""

    @abstractmethod
    def coordinates(self, index: int) -> Sequence[Grid]:
        """Return the grids that an input stacks along its last axis; none if it does not."""

    @abstractmethod
    def tensor(self, index: int) -> relax.Expr | None:
        """Return an input as a tensor; None for one left out."""

    @abstractmethod
    def tensors(self) -> list[relax.Expr | None]:
        """Return all inputs."""

    @abstractmethod
    def normalize(self, value: relax.Expr) -> relax.Expr:
        """Infer the type of an expression."""

    @abstractmethod
    def definition(self, value: relax.Expr) -> relax.Expr:
        """Return what a variable is bound to."""

    def argument_of(self, value: relax.Expr, name: str) -> relax.Expr | None:
        """Return the first argument of a call of an operator, if `value` is one."""
        call = self.definition(value)
        if isinstance(call, relax.Call) and call.op == tvm.ir.Op.get(f"relax.{name}"):
            return call.args[0]
        return None

    def before(self, value: relax.Expr, name: str) -> relax.Expr:
        """Look through a call of an operator, if `value` is one."""
        argument = self.argument_of(value, name)
        return value if argument is None else argument

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
    """Slice for indices that count up; else take with indices in bounds."""
    data, axis = op.tensor(0), op.attributes.get("axis", 0)
    if isinstance(data, GenericConst) and isinstance(op.tensor(1), GenericConst):
        return None
    axis %= len(op.shape(0))
    grid = op.grid(1)
    if grid is not None:
        part = _rows(op, grid, axis) if len(grid.axes) <= 1 else _unflattened(op, grid, axis)
        if part is not None:
            return part
    extent = op.shape(0)[axis]
    known = op.known(1)
    if known is not None and known.elements.ndim == 0 and not isinstance(extent, int):
        [index] = known.sizes()
        if op.sizes.compare("Less", index, 0):
            start = op.sizes.simplify(index + extent)
            last = relax.op.strided_slice(data, [axis], [start], [start + 1], assume_inbound=True)
            return relax.op.squeeze(last, [axis])
    return relax.op.take(data, _wrap(op, op.tensor(1), [extent]), axis, mode="clip")


def _rows(op: Operation, grid: Grid, axis: int) -> relax.Expr | None:
    """Gather with indices that count up along one of their axes, or are all the same."""
    shape = op.shape(0)
    start = affine_start(grid.value, grid.axes[0], op.sizes) if grid.axes else grid.value
    extent = grid.shape[grid.axes[0]] if grid.axes else 1
    if start is None or not grid.shape or not op.sizes.compare("GreaterOrEqual", start, 0):
        return None
    end = op.sizes.simplify(start + extent)
    if not op.sizes.fits(end, shape[axis]):
        return None
    part = op.tensor(0)
    if not (_is(start, 0) and op.sizes.equal(end, shape[axis])):
        part = relax.op.strided_slice(part, [axis], [start], [end], assume_inbound=True)
    own = [size if a in grid.axes else 1 for a, size in enumerate(grid.shape)]
    part = _with_shape(op, part, [*shape[:axis], *own, *shape[axis + 1 :]])
    return broadcast(op, part, [*shape[:axis], *grid.shape, *shape[axis + 1 :]])


def _unflattened(op: Operation, grid: Grid, axis: int) -> relax.Expr | None:
    """Gather from a flattened tensor at ``i * rows + j``, which is the tensor along other axes."""
    source = op.argument_of(op.tensor(0), "reshape")
    if source is None or axis != 0:
        return None
    shape, sizes = shape_of(source), op.sizes
    flat = next(
        (n for n in range(len(shape) + 1) if sizes.equal(sizes.product(shape[:n]), op.shape(0)[0])),
        None,
    )
    *factors, base = tvm.sym.detect_linear_equation(grid.value, [index(a) for a in grid.axes])
    if flat is None or flat != len(grid.axes) or not sizes.equal(base, 0):
        return None
    places: list[int | None] = []
    for own in range(flat):
        stride = sizes.product(shape[own + 1 : flat])
        places += [
            a
            for a, factor in zip(grid.axes, factors, strict=True)
            if sizes.equal(factor, stride) and sizes.equal(grid.shape[a], shape[own])
        ]
    if len(places) != flat:
        return None
    part = _along(op, source, places, grid.shape)
    return _with_shape(op, part, [*grid.shape, *op.shape(0)[1:]])


def _along(
    op: Operation, data: relax.Expr, places: Sequence[int | None], shape: Sequence[Size]
) -> relax.Expr:
    """Put the first axes of a tensor at other places of a shape, and broadcast the others.

    An axis without a place has size 1.
    """
    rest = shape_of(data)[len(places) :]
    order = sorted(range(len(places)), key=lambda axis: places[axis] or 0)
    if order != list(range(len(places))):
        data = relax.op.permute_dims(data, [*order, *range(len(places), len(places) + len(rest))])
    own = [size if axis in places else 1 for axis, size in enumerate(shape)]
    return broadcast(op, _with_shape(op, data, [*own, *rest]), [*shape, *rest])


def broadcast(op: Operation, value: relax.Expr, shape: Sequence[Size]) -> relax.Expr:
    """Broadcast where that changes the shape."""
    value = op.normalize(value)
    if op.sizes.same(shape_of(value), shape):
        return value
    return relax.op.broadcast_to(value, list(shape))


def _gather_elements(op: Operation) -> relax.Expr:
    axis = op.attributes.get("axis", 0)
    indices = _wrap(op, op.tensor(1), [op.shape(0)[axis]])
    return relax.op.gather_elements(op.tensor(0), indices, axis)


def _gather_nd(op: Operation) -> relax.Expr:
    batch = op.attributes.get("batch_dims", 0)
    places = _places(op) if batch == 0 else None
    if places is not None:
        return _along(op, op.tensor(0), places, op.shape(1)[:-1])
    coordinates = op.shape(1)[-1]
    if not isinstance(coordinates, int):
        raise ValueError("the rank of its output depends on data")
    indices = _wrap(op, op.tensor(1), op.shape(0)[batch : batch + coordinates])
    return relax.op.gather_nd(op.tensor(0), indices, batch)


def _places(op: Operation) -> list[int | None] | None:
    """Return along which axis of the result each axis runs, when each coordinate is an index."""
    places: list[int | None] = []
    for part, size in zip(op.coordinates(1), op.shape(0), strict=False):
        if part.uniform == 0 and _is(size, 1):
            places.append(None)
        elif (
            len(part.axes) == 1
            and part.axes[0] not in places
            and op.sizes.equal(part.value, index(part.axes[0]))
            and op.sizes.equal(part.shape[part.axes[0]], size)
        ):
            places.append(part.axes[0])
        else:
            return None
    return places or None


def _logical(absorbing: bool) -> Converter:
    def convert(op: Operation) -> relax.Expr | None:
        for position, other in ((0, 1), (1, 0)):
            grid = op.grid(position)
            if grid is not None and grid.uniform is (not absorbing):
                return op.tensor(other)
        return None

    return convert


def _where(op: Operation) -> relax.Expr | None:
    condition = op.grid(0)
    if condition is None or condition.uniform is None:
        return None
    return op.tensor(1 if condition.uniform else 2)


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
    value: Any = op.tensor(0)
    data, target = op.shape(0), op.vector(1)
    if not op.attributes.get("allowzero", 0):
        target = [data[axis] if size == 0 else size for axis, size in enumerate(target)]
    given = [size for size in target if not _is(size, -1)]
    if len(given) < len(target):
        rest = op.sizes.quotient(data, given)
        target = [rest if _is(size, -1) else size for size in target]
    if str(value.ty.dtype) in ("bool", "int64", "int32"):
        # Masks are flattened to be gathered from, and given their shape again.
        value = op.before(value, "reshape")
    return _with_shape(op, value, target)


def _with_shape(op: Operation, value: relax.Expr, shape: Sequence[Size]) -> relax.Expr:
    """Reshape where that changes the shape."""
    value = op.normalize(value)
    return value if op.sizes.same(shape_of(value), shape) else relax.op.reshape(value, list(shape))


def _unsqueeze(op: Operation) -> relax.Expr:
    axes = op.attributes.get("axes") or op.vector(1)
    return relax.op.expand_dims(op.tensor(0), list(axes))


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
    value = op.tensor(0)
    return broadcast(op, op.before(value, "broadcast_to"), shape)


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
            op.sizes.slice_bound(start, extent),
            op.sizes.slice_bound(end, extent),
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


def _is(size: Size, number: int) -> bool:
    return isinstance(size, int) and size == number


def _scalar(value: relax.Expr | None) -> float | None:
    """Return the value of a scalar constant."""
    if not isinstance(value, GenericConst) or value.value.shape not in ((), (1,)):
        return None
    return float(value.value.numpy().item())


ELEMENTWISE = frozenset(
    {
        *("Add", "And", "Cast", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        *("Max", "Min", "Mul", "Neg", "Not", "Or", "Sub", "Sum", "Where", "Xor"),
    }
)
"""Operators of which each element depends on one of each input: they broadcast by themselves."""

CONVERTERS: dict[str, Converter] = {
    "And": _logical(absorbing=False),
    "Clip": _clip,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Max": _pairwise(relax.op.maximum),
    "Min": _pairwise(relax.op.minimum),
    "OneHot": _one_hot,
    "Or": _logical(absorbing=True),
    "Pow": _pow,
    "Reshape": _reshape,
    "Slice": _slice,
    "Sum": _pairwise(relax.op.add),
    "Tile": _tile,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
