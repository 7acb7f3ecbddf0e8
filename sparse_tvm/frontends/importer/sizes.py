"""Sizes of tensors that are known only as expressions of the inputs' symbolic dimensions."""

from __future__ import annotations

import operator
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias

import tvm
from tvm import tirx

from sparse_tvm.spec import LARGEST_SIZE

Size: TypeAlias = int | Any
"""An int, or a ``tirx.Expr``: an int64 expression of symbolic dimensions."""

MULTIPLES = (2, 4, 8, 16, 32, 64, 128)
"""What a dimension may have to be a multiple of."""

_COMPARISONS: dict[str, tuple[Callable[..., bool], type[tirx.Expr], type[tirx.Expr]]] = {
    "Equal": (operator.eq, tirx.EQ, tirx.NE),
    "Less": (operator.lt, tirx.LT, tirx.GE),
    "LessOrEqual": (operator.le, tirx.LE, tirx.GT),
    "Greater": (operator.gt, tirx.GT, tirx.LE),
    "GreaterOrEqual": (operator.ge, tirx.GE, tirx.LT),
}


class Sizes:
    """Arithmetic on sizes, by what is known about the symbolic dimensions: inputs' are positive.

    Attributes
    ----------
    bounds : dict[str, tuple[int, int]]
        Smallest and largest value of the dimensions for which the user gives them, or the model
        implies them: it reads from a table of so many rows.
    multiples : dict[str, int]
        What dimensions are multiples of, because the model implies it: images are halved and
        doubled again.
    counted : set[str]
        The sizes that depend on data. They may be 0, and nothing can be demanded of them.
    """

    def __init__(
        self, bounds: dict[str, tuple[int, int]], multiples: dict[str, int] | None = None
    ) -> None:
        self.bounds = bounds
        self.multiples = {} if multiples is None else multiples
        self.counted: set[str] = set()
        self._declared: dict[tirx.Var, None] = {}
        self._analyzer = tvm.sym.Analyzer()

    def declare(self, dimension: tirx.Var) -> None:
        """Introduce a symbolic dimension."""
        self._declared[dimension] = None
        low, high = self.bounds.get(dimension.name, (1, LARGEST_SIZE))
        extent = tvm.ir.Range.from_min_extent(as_expr(low), as_expr(high - low + 1))
        self._analyzer.bind(dimension, extent, allow_override=True)

    def restore(self, bounds: Mapping[str, tuple[int, int]], multiples: Mapping[str, int]) -> None:
        """Return to what was known of dimensions before."""
        self.bounds.clear()
        self.bounds.update(bounds)
        self.multiples.clear()
        self.multiples.update(multiples)
        for dimension in self._declared:
            self.declare(dimension)

    def count(self, name: str) -> tirx.Var:
        """Introduce a size that depends on data."""
        size = tirx.Var(f"{name}_{len(self.counted)}", "int64")
        self.counted.add(size.name)
        extent = tvm.ir.Range.from_min_extent(as_expr(0), as_expr(LARGEST_SIZE + 1))
        self._analyzer.bind(size, extent)
        return size

    def depends_on_data(self, size: Size) -> bool:
        """Whether a size is one, or made of one, that depends on data."""
        return any(v.name in self.counted for v in tirx.analysis.undefined_vars(as_expr(size)))

    def bind_index(self, index: tirx.Var, extent: Size) -> None:
        """Introduce a loop variable that counts from 0 to below `extent`."""
        span = tvm.ir.Range.from_min_extent(as_expr(0), as_expr(extent))
        self._analyzer.bind(index, span, allow_override=True)

    def simplify(self, size: Size) -> Size:
        """Return the simplest equal size, an int where it is one."""
        if isinstance(size, int):
            return size
        simple = self._analyzer.simplify(size)
        if isinstance(simple, tirx.IntImm):
            return int(simple)
        bound = self._analyzer.const_int_bound(simple)
        return int(bound.min_value) if bound.min_value == bound.max_value else simple

    def compare(self, relation: str, left: Size, right: Size) -> bool | None:
        """Return what an ONNX comparison always gives; None when it depends on the inputs."""
        on_numbers, holds, fails = _COMPARISONS[relation]
        if isinstance(left, int | float) and isinstance(right, int | float):
            return on_numbers(left, right)
        left, right = as_expr(left), as_expr(right)
        if relation == "Equal" and self._analyzer.can_prove_equal(left, right):
            return True
        if self._analyzer.can_prove(holds(left, right)):
            return True
        return False if self._analyzer.can_prove(fails(left, right)) else None

    def equal(self, left: Size, right: Size) -> bool:
        """Whether two sizes are the same for all inputs."""
        return self.compare("Equal", left, right) is True

    def same(self, left: Sequence[Size], right: Sequence[Size]) -> bool:
        """Whether two shapes are the same for all inputs."""
        return len(left) == len(right) and all(map(self.equal, left, right))

    def product(self, sizes: Iterable[Size]) -> Size:
        """Multiply sizes."""
        return self.simplify(reduce(operator.mul, sizes, 1))

    def quotient(self, sizes: Sequence[Size], divisors: Sequence[Size]) -> Size:
        """Divide the product of `sizes` by that of `divisors`, which divides it."""
        remaining = list(sizes)
        uncancelled = []
        for divisor in divisors:
            match = next((s for s in remaining if self.equal(s, divisor)), None)
            if match is None:
                uncancelled.append(divisor)
            else:
                remaining = _without(remaining, match)
        return self.floordiv(self.product(remaining), self.product(uncancelled))

    def floordiv(self, size: Size, divisor: Size) -> Size:
        """Divide, rounding down."""
        if isinstance(size, int) and isinstance(divisor, int):
            return size // divisor
        return self.simplify(tirx.floordiv(as_expr(size), as_expr(divisor)))

    def floormod(self, size: Size, divisor: Size) -> Size:
        """Return the remainder of `floordiv`."""
        if isinstance(size, int) and isinstance(divisor, int):
            return size % divisor
        return self.simplify(tirx.floormod(as_expr(size), as_expr(divisor)))

    def minimum(self, left: Size, right: Size) -> Size:
        """Return the smaller size."""
        return self.simplify(tirx.min(as_expr(left), as_expr(right)))

    def maximum(self, left: Size, right: Size) -> Size:
        """Return the larger size."""
        return self.simplify(tirx.max(as_expr(left), as_expr(right)))

    def fits(self, size: Size, extent: Size) -> bool:
        """Whether ``size <= extent``; against a number, this may become a dimension's bound."""
        if self.compare("LessOrEqual", size, extent):
            return True
        return isinstance(extent, int) and self.limit(size, extent)

    def slice_bound(self, position: Size, extent: Size) -> Size:
        """Return where a slice of an axis starts or ends, counted from its first element.

        A symbolic position in a fixed extent is taken to lie in it: models slice tables of
        positions and masks so, and could not go on with fewer rows. This bounds a dimension.
        """
        if isinstance(position, int):  # the analyzer's sums with the largest integers overflow
            position = max(-LARGEST_SIZE, min(position, LARGEST_SIZE))
        if self.compare("Less", position, 0):
            position = self.simplify(position + extent)
            if self.compare("Less", position, 0):
                return 0
            if not self.compare("GreaterOrEqual", position, 0):
                position = self.maximum(position, 0)
        if self.compare("GreaterOrEqual", position, extent):
            return extent
        return position if self.fits(position, extent) else self.minimum(position, extent)

    def broadcast(self, shapes: Sequence[Sequence[Size]]) -> tuple[Size, ...]:
        """Return the shape that ONNX broadcasts shapes to."""
        rank = max(map(len, shapes))
        padded = [[1] * (rank - len(shape)) + list(shape) for shape in shapes]
        return tuple(
            next((size for size in column if not self.equal(size, 1)), 1)
            for column in zip(*padded, strict=True)
        )

    def limit(self, size: Size, largest: int) -> bool:
        """Demand that ``size <= largest``, and return whether that bounds a dimension.

        It can for ``dimension + constant``.
        """
        for dimension in tirx.analysis.undefined_vars(as_expr(size)):
            offset = self.simplify(size - dimension)
            if isinstance(offset, int) and dimension.name not in self.counted:
                low, high = self.bounds.get(dimension.name, (1, LARGEST_SIZE))
                self.bounds[dimension.name] = low, min(high, largest - offset)
                self.declare(dimension)
                return True
        return False

    def demand_equal(self, left: Size, right: Size) -> bool:
        """Demand that two sizes are the same, and return whether a new bound makes them so.

        It can for sizes of one dimension that differ from some value of that on, as
        ``min(sequence, 128)`` and ``sequence`` do.
        """
        [dimension, *others] = tirx.analysis.undefined_vars(as_expr(left) + as_expr(right)) or [
            None
        ]
        if dimension is None or others or dimension.name in self.counted:
            return False
        low, high = self.bounds.get(dimension.name, (1, LARGEST_SIZE))
        differ = bisect_left(
            range(low, high + 1),
            True,
            key=lambda value: _at(left, dimension, value) != _at(right, dimension, value),
        )
        if not 1 < differ <= high - low:  # for no size, for a single one, or for all
            return False
        self.bounds[dimension.name] = low, low + differ - 1
        self.declare(dimension)
        if self.equal(self.simplify(left), self.simplify(right)):
            return True
        self.bounds[dimension.name] = low, high
        self.declare(dimension)
        return False

    def demand_multiple(self, left: Size, right: Size) -> bool:
        """Demand that two sizes are the same, and return whether a dimension that is a multiple
        of some power of 2 makes them so.

        It does for ``(height + 1) // 2 * 2`` and ``height``.
        """
        [dimension, *others] = tirx.analysis.undefined_vars(as_expr(left) + as_expr(right)) or [
            None
        ]
        if dimension is None or others or dimension.name in self.counted:
            return False
        for multiple in MULTIPLES:
            if multiple <= self.multiples.get(dimension.name, 1):
                continue
            analyzer, part = tvm.sym.Analyzer(), tirx.Var("part", "int64")
            analyzer.bind(part, tvm.ir.Range.from_min_extent(as_expr(1), as_expr(LARGEST_SIZE)))
            analyzer.bind(dimension, part * multiple)
            if analyzer.can_prove_equal(*(analyzer.simplify(as_expr(n)) for n in (left, right))):
                self.multiples[dimension.name] = multiple
                return True
        return False

    def demand_positive(self, size: Size) -> bool:
        """Demand that a size is positive, and return False where it never is.

        This raises the lower bound of the dimension that it grows with; there is none for a size
        of several dimensions.
        """
        if self.compare("Greater", size, 0):
            return True
        dimensions = tirx.analysis.undefined_vars(as_expr(size))
        if self.depends_on_data(size):
            return False
        if len(dimensions) != 1:
            return len(dimensions) > 1
        [dimension] = dimensions
        low, high = self.bounds.get(dimension.name, (1, LARGEST_SIZE))
        least = low + bisect_left(
            range(low, high + 1), True, key=lambda value: _at(size, dimension, value) > 0
        )
        if least > high:
            return False
        if least > low:
            self.bounds[dimension.name] = least, high
            self.declare(dimension)
        return True


def is_number(size: Size, number: int) -> bool:
    """Whether a size is a certain number."""
    return isinstance(size, int) and size == number


def as_expr(size: Size) -> Any:
    """Return a size as an expression."""
    return tirx.IntImm("int64", size) if isinstance(size, int) else size


def as_text(size: Size) -> int | str:
    """Return a size as an int or a Python expression: ``"sequence * 2 + 1"``."""
    simple = tvm.sym.Analyzer().canonical_simplify(as_expr(size))
    if isinstance(simple, tirx.IntImm):
        return int(simple)
    return re.sub(r"T\.int64\((-?\d+)\)", r"\1", str(simple)).replace("T.", "")


def _at(size: Size, dimension: tirx.Var, value: int) -> int:
    """Return a size of one dimension at a value of that."""
    analyzer = tvm.sym.Analyzer()
    analyzer.bind(dimension, as_expr(value))
    return int(analyzer.simplify(as_expr(size)))


def _without(sizes: list[Size], removed: Size) -> list[Size]:
    index = next(i for i, size in enumerate(sizes) if size is removed)
    return sizes[:index] + sizes[index + 1 :]
