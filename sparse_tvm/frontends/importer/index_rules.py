"""Which ONNX operators keep a grid a grid: rules from inputs to outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import onnx
from tvm import tirx

from sparse_tvm.frontends.importer.index_expressions import (
    MAX_RANK,
    OPERATORS,
    Grid,
    Stack,
    Value,
    from_known,
    index,
    uses,
)
from sparse_tvm.frontends.importer.shape_arithmetic import Known
from sparse_tvm.frontends.importer.sizes import Size, Sizes, as_expr


def evaluate(
    node: onnx.NodeProto,
    attributes: Mapping[str, Any],
    known: Mapping[str, Known],
    grids: Mapping[str, Value],
    sizes: Sizes,
) -> Value | None:
    """Return a node's output as a grid, when its inputs are grids, or known.

    Parameters
    ----------
    node : onnx.NodeProto
        Of opset 11 or newer.
    attributes : Mapping[str, Any]
        Its attributes by name.
    known : Mapping[str, Known]
        Tensors whose elements are known.
    grids : Mapping[str, Value]
        Tensors that are grids.
    sizes : Sizes
        Decides comparisons and simplifies.
    """
    rule = _RULES.get(node.op_type)
    if rule is None or any(name not in known and name not in grids for name in node.input if name):
        return None
    try:
        return rule(_Rule(node.op_type, attributes, list(node.input), known, grids, sizes))
    except _NotAGrid:
        return None


class _NotAGrid(Exception):
    """Raised where an output is not a function of indices and sizes."""


@dataclass
class _Rule:
    """One node, with helpers that its rule uses."""

    op: str
    attributes: Mapping[str, Any]
    names: list[str]
    known: Mapping[str, Known]
    grids: Mapping[str, Value]
    sizes: Sizes

    def name(self, position: int) -> str:
        return self.names[position] if position < len(self.names) else ""

    def value(self, position: int) -> Value:
        name = self.name(position)
        value = self.grids.get(name)
        if value is None and name in self.known:
            value = from_known(self.known[name])
        if value is None:
            raise _NotAGrid
        return value

    def grid(self, position: int) -> Grid:
        value = self.value(position)
        if not isinstance(value, Grid):
            raise _NotAGrid
        return value

    def grids_of_all(self) -> list[Grid]:
        return [self.grid(position) for position in range(len(self.names))]

    def vector(self, position: int, default: Sequence[Size] | None = None) -> list[Size]:
        known = self.known.get(self.name(position))
        if known is not None:
            return known.sizes()
        if default is None or self.name(position):
            raise _NotAGrid
        return list(default)

    def axes(self, position: int) -> list[int] | None:
        """Return axes from an input, or in older opsets an attribute."""
        if "axes" in self.attributes:
            return list(self.attributes["axes"])
        return [int(axis) for axis in self.vector(position)] if self.name(position) else None

    def moved(self, grid: Grid, shape: Sequence[Size], places: Mapping[int, Any]) -> Grid:
        """Return a grid of another shape: `places` says what each old index becomes."""
        if len(shape) > MAX_RANK:
            raise _NotAGrid
        value = grid.value
        if not isinstance(value, bool | int | float):
            value = _substitute(value, {f"i{axis}": as_expr(new) for axis, new in places.items()})
        return self.simple(Grid(tuple(shape), value, grid.dtype))

    def simple(self, grid: Grid) -> Grid:
        """Simplify a grid's value by the ranges of its indices."""
        value = grid.value
        if isinstance(value, bool | int | float):
            return grid
        single = {f"i{axis}": as_expr(0) for axis, size in enumerate(grid.shape) if _is(size, 1)}
        self.bind(grid.shape)
        value = self.sizes.simplify(_substitute(value, single))
        is_bool = grid.dtype == "bool" and isinstance(value, int)
        return replace(grid, value=bool(value) if is_bool else value)

    def bind(self, shape: Sequence[Size]) -> None:
        """Let the indices run over a shape. One that runs over 1 would be 0 ever after."""
        for axis, size in enumerate(shape):
            if not _is(size, 1):
                self.sizes.bind_index(index(axis), size)

    def broadcast(self, grids: Sequence[Grid]) -> tuple[list[Any], tuple[Size, ...]]:
        """Return the values of grids over the shape that they are broadcast to."""
        shape = broadcast_shape([grid.shape for grid in grids], self.sizes)
        values = []
        for grid in grids:
            shift = len(shape) - len(grid.shape)
            places = {axis: index(axis + shift) for axis in range(len(grid.shape))}
            values.append(self.moved(grid, shape, places).value)
        return values, shape


def _substitute(value: Any, places: Mapping[str, Any]) -> Any:
    """Replace indices by expressions."""
    if not any(uses(value, axis) for axis in range(MAX_RANK)):
        return value
    if isinstance(value, tirx.Var):
        return places.get(value.name, value)
    if type(value).__name__ not in OPERATORS:
        raise _NotAGrid
    operands = [value.a] if isinstance(value, tirx.Not) else [value.a, value.b]
    return type(value)(*(_substitute(operand, places) for operand in operands))


def broadcast_shape(shapes: Sequence[Sequence[Size]], sizes: Sizes) -> tuple[Size, ...]:
    """Return the shape that ONNX broadcasts shapes to."""
    rank = max(map(len, shapes))
    padded = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
    return tuple(
        next((size for size in column if not sizes.equal(size, 1)), 1)
        for column in zip(*padded, strict=True)
    )


def _range(rule: _Rule) -> Grid:
    [start], [limit], [step] = (rule.vector(position) for position in range(3))
    dtype = rule.grid(0).dtype
    if step != 1 or dtype not in ("int64", "int32"):
        raise _NotAGrid
    extent = rule.sizes.simplify(limit - start)
    return rule.simple(Grid((extent,), start + index(0), dtype))


def _constant_of_shape(rule: _Rule) -> Grid:
    tensor = rule.attributes.get("value")
    fill = np.float32(0) if tensor is None else onnx.numpy_helper.to_array(tensor)
    return Grid(tuple(rule.vector(0)), fill.reshape(()).item(), fill.dtype.name)


def _unsqueeze(rule: _Rule) -> Grid:
    grid, axes = rule.grid(0), rule.axes(1)
    rank = len(grid.shape) + len(axes or ())
    added = {axis % rank for axis in axes or ()}
    kept = [axis for axis in range(rank) if axis not in added]
    shape: list[Size] = [1] * rank
    for axis, size in zip(kept, grid.shape, strict=True):
        shape[axis] = size
    return rule.moved(grid, shape, {old: index(new) for old, new in enumerate(kept)})


def _squeeze(rule: _Rule) -> Grid:
    grid, axes = rule.grid(0), rule.axes(1)
    if axes is None:
        raise _NotAGrid
    dropped = {axis % len(grid.shape) for axis in axes}
    return _keep(rule, grid, [axis for axis in range(len(grid.shape)) if axis not in dropped])


def _keep(rule: _Rule, grid: Grid, kept: list[int]) -> Grid:
    """Return the grid with only some of its axes, in the order given."""
    places = {old: index(new) for new, old in enumerate(kept)}
    return rule.moved(grid, [grid.shape[axis] for axis in kept], places)


def _transpose(rule: _Rule) -> Grid:
    grid = rule.grid(0)
    order = rule.attributes.get("perm", range(len(grid.shape))[::-1])
    return _keep(rule, grid, list(order))


def _reshape(rule: _Rule) -> Grid:
    """Only of a uniform grid, or to other places of axes of size 1."""
    grid, target = rule.grid(0), rule.vector(1)
    if not rule.attributes.get("allowzero", 0):
        target = [grid.shape[a] if _is(size, 0) else size for a, size in enumerate(target)]
    given = [size for size in target if not _is(size, -1)]
    rest = rule.sizes.quotient(grid.shape, given)
    shape = [rest if _is(size, -1) else size for size in target]
    if not grid.axes:
        return replace(grid, shape=tuple(shape))
    old = [axis for axis, size in enumerate(grid.shape) if not _is(size, 1)]
    new = [axis for axis, size in enumerate(shape) if not _is(size, 1)]
    if len(old) != len(new) or not all(
        rule.sizes.equal(grid.shape[a], shape[b]) for a, b in zip(old, new, strict=True)
    ):
        raise _NotAGrid
    return rule.moved(grid, shape, {a: index(b) for a, b in zip(old, new, strict=True)})


def _expand(rule: _Rule) -> Grid:
    grid, target = rule.grid(0), rule.vector(1)
    like = Grid(tuple(target), 0, "int64")
    values, shape = rule.broadcast([grid, like])
    return Grid(shape, values[0], grid.dtype)


def _slice(rule: _Rule) -> Grid:
    grid = rule.grid(0)
    starts, ends = rule.vector(1), rule.vector(2)
    axes = rule.vector(3, default=range(len(starts)))
    steps = rule.vector(4, default=[1] * len(starts))
    shape = list(grid.shape)
    places: dict[int, Any] = {axis: index(axis) for axis in range(len(shape))}
    for given, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = given % len(shape)
        if step != 1:
            raise _NotAGrid
        begin = rule.sizes.slice_bound(start, shape[axis])
        shape[axis] = rule.sizes.simplify(rule.sizes.slice_bound(end, shape[axis]) - begin)
        places[axis] = index(axis) + begin
    return rule.moved(grid, shape, places)


def _concat(rule: _Rule) -> Value:
    parts = rule.grids_of_all()
    rank = len(parts[0].shape)
    axis = rule.attributes["axis"] % rank
    whole = _joined(rule, parts, axis)
    if whole is not None:
        return whole
    if axis != rank - 1 or any(part.shape[-1] != 1 for part in parts):
        raise _NotAGrid
    return Stack(tuple(parts))


def _joined(rule: _Rule, parts: list[Grid], axis: int) -> Grid | None:
    """Return the one grid that parts along an axis are, if the last one's value is all's."""
    offsets: list[Size] = [0]
    for part in parts:
        offsets.append(rule.sizes.simplify(offsets[-1] + part.shape[axis]))
    shape = list(parts[-1].shape)
    shape[axis] = offsets.pop()
    whole = rule.moved(parts[-1], shape, {axis: index(axis) - offsets[-1]})
    for part, offset in zip(parts[:-1], offsets[:-1], strict=True):
        places = {axis: index(axis) + offset} if part.shape[axis] != 1 else {axis: offset}
        expected = rule.moved(whole, part.shape, places)
        if not _same(rule, expected.value, part.value):
            return None
    return whole


def _same(rule: _Rule, left: Any, right: Any) -> bool:
    if isinstance(left, bool | float) or isinstance(right, bool | float):
        return left is right or left == right
    return rule.sizes.equal(left, right)


def _cast(rule: _Rule) -> Grid:
    grid = rule.grid(0)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(rule.attributes["to"]).name
    if grid.uniform is not None:
        return replace(grid, value=np.asarray(grid.uniform).astype(dtype).item(), dtype=dtype)
    integers = ("int64", "int32")
    if dtype != grid.dtype and not (dtype in integers and grid.dtype in integers):
        raise _NotAGrid
    return replace(grid, dtype=dtype)


def _cum_sum(rule: _Rule) -> Grid:
    grid, [axis] = rule.grid(0), rule.vector(1)
    if grid.uniform is None or rule.attributes.get("exclusive") or rule.attributes.get("reverse"):
        raise _NotAGrid
    position = index(axis % len(grid.shape))
    return rule.simple(replace(grid, value=(position + 1) * grid.uniform))


def _gather_nd(rule: _Rule) -> Grid:
    """Of a grid: its value at the coordinates."""
    data, coordinates = rule.grid(0), rule.value(1)
    if rule.attributes.get("batch_dims", 0) or not isinstance(coordinates, Stack):
        raise _NotAGrid
    parts = coordinates.parts
    if len(parts) != len(data.shape):
        raise _NotAGrid
    shape = parts[0].shape[:-1]
    return rule.moved(data, shape, {axis: part.value for axis, part in enumerate(parts)})


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[[_Rule], Grid]:
    def apply(rule: _Rule) -> Grid:
        grids = rule.grids_of_all()
        values, shape = rule.broadcast(grids)
        if any(isinstance(value, bool | float) for value in values):
            raise _NotAGrid
        return rule.simple(Grid(shape, reduce(function, values), grids[0].dtype))

    return apply


def _comparison(rule: _Rule) -> Grid:
    values, shape = rule.broadcast([rule.grid(0), rule.grid(1)])
    if any(isinstance(value, bool | float) for value in values):
        raise _NotAGrid
    rule.bind(shape)
    decided = rule.sizes.compare(rule.op, *values)
    if decided is None:
        return Grid(shape, _RELATIONS[rule.op](*map(as_expr, values)), "bool")
    return Grid(shape, decided, "bool")


def _logical(rule: _Rule) -> Grid:
    (left, right), shape = rule.broadcast([rule.grid(0), rule.grid(1)])
    absorbing = rule.op == "Or"
    for one, other in ((left, right), (right, left)):
        if isinstance(one, bool):
            return Grid(shape, absorbing if one is absorbing else other, "bool")
    return Grid(shape, (tirx.Or if absorbing else tirx.And)(left, right), "bool")


def _not(rule: _Rule) -> Grid:
    grid = rule.grid(0)
    value = not grid.value if isinstance(grid.value, bool) else tirx.Not(grid.value)
    return replace(grid, value=value)


def _where(rule: _Rule) -> Grid:
    grids = rule.grids_of_all()
    (condition, kept, other), shape = rule.broadcast(grids)
    if not isinstance(condition, bool):
        raise _NotAGrid
    return Grid(shape, kept if condition else other, grids[1].dtype)


def _is(size: Size, number: int) -> bool:
    return isinstance(size, int) and size == number


_RELATIONS = {
    "Equal": tirx.EQ,
    "Greater": tirx.GT,
    "GreaterOrEqual": tirx.GE,
    "Less": tirx.LT,
    "LessOrEqual": tirx.LE,
}

_RULES: dict[str, Callable[[_Rule], Value]] = {
    "Add": _arithmetic(lambda a, b: a + b),
    "And": _logical,
    "Cast": _cast,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cum_sum,
    "Expand": _expand,
    "GatherND": _gather_nd,
    "Identity": lambda rule: rule.grid(0),
    "Max": _arithmetic(lambda a, b: tirx.max(as_expr(a), as_expr(b))),
    "Min": _arithmetic(lambda a, b: tirx.min(as_expr(a), as_expr(b))),
    "Mul": _arithmetic(lambda a, b: a * b),
    "Not": _not,
    "Or": _logical,
    "Range": _range,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _arithmetic(lambda a, b: a - b),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    **dict.fromkeys(_RELATIONS, _comparison),
}
