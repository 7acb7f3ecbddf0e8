"""Tensors whose elements are functions of their own indices, kept as expressions.

Exporters write positions and masks with ``Range``, ``Expand``, comparisons, and gathers by such
indices: ``GatherND(mask, [batch index, key index])`` is the mask itself, seen along other axes.
Carrying the expression ``value(i0, i1, ...)`` along tells what such chains compute, without
computing it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tvm import relax, tirx

from sparse_tvm.frontends.importer.forms import INTEGERS, Form, NotInForm
from sparse_tvm.frontends.importer.known import Known
from sparse_tvm.frontends.importer.sizes import Size, Sizes, as_expr, is_number

MAX_TABLE = 1 << 24
"""Constant tables with more elements are not looked at."""

MAX_RANK = 8
"""Tensors with more axes are not looked at."""

_INDEX = [tirx.Var(f"i{axis}", "int64") for axis in range(MAX_RANK)]


@dataclass(frozen=True)
class IndexExpression(Form):
    """A tensor given by an expression of the indices of its elements.

    Attributes
    ----------
    shape : tuple[Size, ...]
        Sizes of its axes.
    value : Any
        A number, or an expression of sizes and of the index of each axis; an axis of size 1 does
        not occur in it.
    dtype : str
        The tensor's element type.
    sizes : Sizes
        Decides comparisons and simplifies.
    """

    shape: tuple[Size, ...]
    value: Any
    dtype: str
    sizes: Sizes = field(repr=False, compare=False)

    @property
    def axes(self) -> list[int]:
        """The axes that the value depends on."""
        return [axis for axis in range(len(self.shape)) if uses(self.value, axis)]

    @property
    def uniform(self) -> Any:
        """The number that all elements are; None if they differ, or are symbolic."""
        return self.value if isinstance(self.value, bool | int | float) else None

    @property
    def sizes_of_axes(self) -> list[Size]:
        """See `Form`."""
        return list(self.shape)

    def reshape(self, shape: Sequence[Size]) -> IndexExpression:
        """See `Form`. Only where all is uniform, or axes of size 1 move."""
        if not self.axes:
            return replace(self, shape=tuple(shape))
        old = [axis for axis, size in enumerate(self.shape) if not is_number(size, 1)]
        new = [axis for axis, size in enumerate(shape) if not is_number(size, 1)]
        if len(old) != len(new) or not all(
            self.sizes.equal(self.shape[a], shape[b]) for a, b in zip(old, new, strict=True)
        ):
            raise NotInForm
        return self.moved(shape, {a: index(b) for a, b in zip(old, new, strict=True)})

    def squeeze(self, axes: Sequence[int]) -> IndexExpression:
        """See `Form`."""
        return self.transpose([axis for axis in range(len(self.shape)) if axis not in axes])

    def expand_dims(self, axes: Sequence[int]) -> IndexExpression:
        """See `Form`."""
        rank = len(self.shape) + len(axes)
        kept = [axis for axis in range(rank) if axis not in axes]
        shape: list[Size] = [1] * rank
        for axis, size in zip(kept, self.shape, strict=True):
            shape[axis] = size
        return self.moved(shape, {old: index(new) for old, new in enumerate(kept)})

    def transpose(self, order: Sequence[int]) -> IndexExpression:
        """See `Form`; axes may also be left out."""
        places = {old: index(new) for new, old in enumerate(order)}
        return self.moved([self.shape[axis] for axis in order], places)

    def broadcast_to(self, shape: Sequence[Size]) -> IndexExpression:
        """See `Form`."""
        shift = len(shape) - len(self.shape)
        return self.moved(shape, {a: index(a + shift) for a in range(len(self.shape))})

    def slice(self, window: Mapping[int, tuple[Size, Size, int]]) -> IndexExpression:
        """See `Form`; only with steps of 1."""
        shape = list(self.shape)
        places: dict[int, Any] = {axis: index(axis) for axis in range(len(shape))}
        for axis, (first, last, step) in window.items():
            if step != 1:
                raise NotInForm
            shape[axis] = self.sizes.simplify(last - first)
            places[axis] = index(axis) + first
        return self.moved(shape, places)

    def concat(self, others: Sequence[IndexExpression], axis: int) -> IndexExpression | Coordinates:
        """See `Form`: one expression, if the last part's value is all's, or coordinates."""
        parts = [self, *others]
        whole = _joined(parts, axis)
        if whole is not None:
            return whole
        if axis != len(self.shape) - 1 or any(part.shape[-1] != 1 for part in parts):
            raise NotInForm
        return Coordinates(tuple(parts))

    def astype(self, dtype: str) -> IndexExpression:
        """See `Form`; between integers only, unless uniform."""
        if self.uniform is not None:
            return replace(self, value=np.asarray(self.uniform).astype(dtype).item(), dtype=dtype)
        if dtype != self.dtype and not (dtype in INTEGERS and self.dtype in INTEGERS):
            raise NotInForm
        return replace(self, dtype=dtype)

    def moved(self, shape: Sequence[Size], places: Mapping[int, Any]) -> IndexExpression:
        """Return a tensor of another shape: `places` says what each old index becomes."""
        if len(shape) > MAX_RANK:
            raise NotInForm
        value = self.value
        if not isinstance(value, bool | int | float):
            value = _substitute(value, {f"i{axis}": as_expr(new) for axis, new in places.items()})
        return replace(self, shape=tuple(shape), value=value).simple()

    def simple(self) -> IndexExpression:
        """Simplify the value by the ranges of the indices."""
        if isinstance(self.value, bool | int | float):
            return self
        single = {f"i{a}": as_expr(0) for a, size in enumerate(self.shape) if is_number(size, 1)}
        self.bind()
        value = self.sizes.simplify(_substitute(self.value, single))
        is_bool = self.dtype == "bool" and isinstance(value, int)
        return replace(self, value=bool(value) if is_bool else value)

    def bind(self) -> None:
        """Let the indices run over the shape. One that runs over 1 would be 0 ever after."""
        for axis, size in enumerate(self.shape):
            if not is_number(size, 1):
                self.sizes.bind_index(index(axis), size)


@dataclass(frozen=True)
class Coordinates:
    """Index expressions along a new last axis: what a GatherND gathers at."""

    parts: tuple[IndexExpression, ...]


def index(axis: int) -> Any:
    """Return the variable that stands for an element's index along an axis."""
    return _INDEX[axis]


def uses(value: Any, axis: int) -> bool:
    """Whether an expression depends on the index along an axis."""
    if isinstance(value, bool | int | float):
        return False
    return any(var.same_as(_INDEX[axis]) for var in tirx.analysis.undefined_vars(value))


def from_known(known: Known, sizes: Sizes) -> IndexExpression | None:
    """Return a tensor of one known element as an index expression."""
    if known.elements.size != 1:
        return None
    return IndexExpression((1,) * known.elements.ndim, known.elements.item(), known.dtype, sizes)


def from_table(array: np.ndarray, sizes: Sizes) -> IndexExpression | None:
    """Recognise constant tables: all elements the same, positions, or a lower triangle."""
    rank, shape, dtype = array.ndim, array.shape, array.dtype.name
    if dtype not in (*INTEGERS, "bool") or not 1 <= rank <= MAX_RANK:
        return None
    if not 0 < array.size <= MAX_TABLE:
        return None
    first = array.reshape(-1)[0].item()
    if (array == first).all():
        return IndexExpression(shape, first, dtype, sizes)
    if dtype != "bool" and (array == np.arange(first, first + shape[-1])).all():
        return IndexExpression(shape, _INDEX[rank - 1] + first, dtype, sizes)
    if rank >= 2 and dtype == "bool" and (array == np.tri(*shape[-2:], dtype=array.dtype)).all():
        return IndexExpression(shape, tirx.LE(_INDEX[rank - 1], _INDEX[rank - 2]), dtype, sizes)
    return None


def affine_start(value: Any, axis: int, sizes: Sizes) -> Size | None:
    """Return what `value` starts from, when it counts up along `axis` and nothing else."""
    start = sizes.simplify(as_expr(value) - _INDEX[axis])
    return None if any(uses(start, other) for other in range(MAX_RANK)) else start


def materialise(value: IndexExpression | Coordinates, sizes: Sizes) -> relax.Expr:
    """Return a run-time tensor of an index expression's elements."""
    if isinstance(value, Coordinates):
        return relax.op.concat([materialise(part, sizes) for part in value.parts], -1)
    if value.uniform is not None:
        return relax.op.broadcast_to(relax.const(value.uniform, value.dtype), value.shape)
    tensor = _emit(value.value, value, sizes)
    if value.dtype == "int32":
        tensor = relax.op.astype(tensor, value.dtype)
    own = tuple(size if axis in value.axes else 1 for axis, size in enumerate(value.shape))
    return tensor if sizes.same(own, value.shape) else relax.op.broadcast_to(tensor, value.shape)


def _emit(value: Any, whole: IndexExpression, sizes: Sizes) -> relax.Expr:
    rank = len(whole.shape)
    axes = [axis for axis in range(rank) if uses(value, axis)]
    operator = _OPERATORS.get(type(value).__name__)
    if len(axes) == 1:
        [axis] = axes
        start = None if operator and operator[1] else affine_start(value, axis, sizes)
        if start is not None:
            shape = [1] * rank
            shape[axis] = whole.shape[axis]
            end = sizes.simplify(start + whole.shape[axis])
            return relax.op.reshape(relax.op.arange(start, end, 1, "int64"), shape)
    if not axes and not (operator and operator[1]):
        if isinstance(value, int):
            return relax.const(value, "int64")
        return relax.op.reshape(relax.op.arange(value, value + 1, 1, "int64"), [1] * rank)
    if operator is None:
        raise ValueError(f"an index is computed by {type(value).__name__}")
    if isinstance(value, tirx.Not):
        return relax.op.logical_not(_emit(value.a, whole, sizes))
    return operator[0](_emit(value.a, whole, sizes), _emit(value.b, whole, sizes))


def _substitute(value: Any, places: Mapping[str, Any]) -> Any:
    """Replace indices by expressions."""
    if not any(uses(value, axis) for axis in range(MAX_RANK)):
        return value
    if isinstance(value, tirx.Var):
        return places.get(value.name, value)
    if type(value).__name__ not in _OPERATORS:
        raise NotInForm
    operands = [value.a] if isinstance(value, tirx.Not) else [value.a, value.b]
    return type(value)(*(_substitute(operand, places) for operand in operands))


def _joined(parts: Sequence[IndexExpression], axis: int) -> IndexExpression | None:
    """Return the one expression that parts along an axis are, if the last one's value is all's."""
    last, sizes = parts[-1], parts[-1].sizes
    offsets: list[Size] = [0]
    for part in parts:
        offsets.append(sizes.simplify(offsets[-1] + part.shape[axis]))
    shape = list(last.shape)
    shape[axis] = offsets.pop()
    whole = last.moved(shape, {axis: index(axis) - offsets[-1]})
    for part, offset in zip(parts[:-1], offsets[:-1], strict=True):
        places = {axis: index(axis) + offset} if part.shape[axis] != 1 else {axis: offset}
        expected = whole.moved(part.shape, places)
        if not _same(sizes, expected.value, part.value):
            return None
    return whole


def _same(sizes: Sizes, left: Any, right: Any) -> bool:
    if isinstance(left, bool | float) or isinstance(right, bool | float):
        return left is right or left == right
    return sizes.equal(left, right)


_OPERATORS: dict[str, tuple[Callable[..., relax.Expr], bool]] = {
    "Add": (relax.op.add, False),
    "Sub": (relax.op.subtract, False),
    "Mul": (relax.op.multiply, False),
    "FloorDiv": (relax.op.floor_divide, False),
    "FloorMod": (relax.op.floor_mod, False),
    "Min": (relax.op.minimum, False),
    "Max": (relax.op.maximum, False),
    "EQ": (relax.op.equal, True),
    "NE": (relax.op.not_equal, True),
    "LT": (relax.op.less, True),
    "LE": (relax.op.less_equal, True),
    "GT": (relax.op.greater, True),
    "GE": (relax.op.greater_equal, True),
    "And": (relax.op.logical_and, True),
    "Or": (relax.op.logical_or, True),
    "Not": (relax.op.logical_not, True),
}
"""Relax's operators by the expressions that they compute, and whether the result is a bool."""
