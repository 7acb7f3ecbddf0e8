"""Tensors whose elements are functions of their own indices, kept as expressions.

Exporters write positions and masks with ``Range``, ``Expand``, comparisons, and gathers by such
indices: ``GatherND(mask, [batch index, key index])`` is the mask itself, seen along other axes.
Carrying the expression ``value(i0, i1, ...)`` along tells what such chains compute, without
computing it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, tirx

from sparse_tvm.frontends.importer.shape_arithmetic import Known
from sparse_tvm.frontends.importer.sizes import Size, Sizes, as_expr

MAX_TABLE = 1 << 24
"""Constant tables with more elements are not looked at."""

MAX_RANK = 8
"""Tensors with more axes are not looked at."""

_INDEX = [tirx.Var(f"i{axis}", "int64") for axis in range(MAX_RANK)]
_INTEGERS = ("int64", "int32", "bool")


@dataclass(frozen=True)
class Grid:
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
    """

    shape: tuple[Size, ...]
    value: Any
    dtype: str

    @property
    def axes(self) -> list[int]:
        """The axes that the value depends on."""
        return [axis for axis in range(len(self.shape)) if uses(self.value, axis)]

    @property
    def uniform(self) -> Any:
        """The number that all elements are; None if they differ, or are symbolic."""
        return self.value if isinstance(self.value, bool | int | float) else None


@dataclass(frozen=True)
class Stack:
    """Grids along a new last axis: the coordinates of a GatherND."""

    parts: tuple[Grid, ...]


Value = Grid | Stack


def index(axis: int) -> Any:
    """Return the variable that stands for an element's index along an axis."""
    return _INDEX[axis]


def uses(value: Any, axis: int) -> bool:
    """Whether an expression depends on the index along an axis."""
    if isinstance(value, bool | int | float):
        return False
    return any(var.same_as(_INDEX[axis]) for var in tirx.analysis.undefined_vars(value))


def from_known(known: Known) -> Grid | None:
    """Return a tensor of one known element as a grid."""
    if known.elements.size != 1:
        return None
    return Grid((1,) * known.elements.ndim, known.elements.item(), known.dtype)


def from_table(array: np.ndarray) -> Grid | None:
    """Recognise constant tables: all elements the same, positions, or a lower triangle."""
    rank = array.ndim
    if array.dtype.name not in _INTEGERS or not 1 <= rank <= MAX_RANK or array.size > MAX_TABLE:
        return None
    shape, dtype = array.shape, array.dtype.name
    first = array.reshape(-1)[0].item()
    if (array == first).all():
        return Grid(shape, first, dtype)
    if dtype != "bool" and (array == np.arange(first, first + shape[-1])).all():
        return Grid(shape, _INDEX[rank - 1] + first, dtype)
    if rank >= 2 and (array == np.tri(*shape[-2:], dtype=array.dtype)).all() and dtype == "bool":
        return Grid(shape, tirx.LE(_INDEX[rank - 1], _INDEX[rank - 2]), dtype)
    return None


def materialise(value: Value, sizes: Sizes) -> relax.Expr:
    """Return a tensor of a grid's elements."""
    if isinstance(value, Stack):
        return relax.op.concat([materialise(part, sizes) for part in value.parts], -1)
    if value.uniform is not None:
        return relax.op.broadcast_to(relax.const(value.uniform, value.dtype), value.shape)
    tensor = _emit(value.value, value, sizes)
    if value.dtype == "int32":
        tensor = relax.op.astype(tensor, value.dtype)
    own = tuple(size if axis in value.axes else 1 for axis, size in enumerate(value.shape))
    return tensor if sizes.same(own, value.shape) else relax.op.broadcast_to(tensor, value.shape)


def _emit(value: Any, grid: Grid, sizes: Sizes) -> relax.Expr:
    rank = len(grid.shape)
    axes = [axis for axis in range(rank) if uses(value, axis)]
    operator = OPERATORS.get(type(value).__name__)
    if len(axes) == 1:
        [axis] = axes
        start = None if operator and operator[1] else affine_start(value, axis, sizes)
        if start is not None:
            shape = [1] * rank
            shape[axis] = grid.shape[axis]
            end = sizes.simplify(start + grid.shape[axis])
            return relax.op.reshape(relax.op.arange(start, end, 1, "int64"), shape)
    if not axes and not (operator and operator[1]):
        if isinstance(value, int):
            return relax.const(value, "int64")
        return relax.op.reshape(relax.op.arange(value, value + 1, 1, "int64"), [1] * rank)
    if operator is None:
        raise ValueError(f"an index is computed by {type(value).__name__}")
    if isinstance(value, tirx.Not):
        return relax.op.logical_not(_emit(value.a, grid, sizes))
    return operator[0](_emit(value.a, grid, sizes), _emit(value.b, grid, sizes))


def affine_start(value: Any, axis: int, sizes: Sizes) -> Size | None:
    """Return what `value` starts from, when it counts up along `axis` and nothing else."""
    start = sizes.simplify(as_expr(value) - _INDEX[axis])
    return None if any(uses(start, other) for other in range(MAX_RANK)) else start


OPERATORS: dict[str, tuple[Callable[..., relax.Expr], bool]] = {
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
