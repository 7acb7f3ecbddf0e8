"""What a model's input or output looks like, shared by front ends, artifacts and the runtime."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

LARGEST_SIZE = 10**9
"""No dimension is larger: where exporters write this number, they mean the end of an axis."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of one input or output.

    Parameters
    ----------
    name : str
        The name in the source model.
    dtype : str
        NumPy's name of the element type, such as ``"float32"``.
    shape : tuple[int | str, ...]
        One entry per dimension; a string is a symbolic dimension.
    values : tuple[int, int] | None
        For an integer input whose elements are indices into a table: the smallest, and one more
        than the largest.
    typical : tuple[int, int] | None
        For an integer input that may have any value but is meant to have these: the same.
    multiples : tuple[int, ...] | None
        Of an input, what each dimension must be a multiple of.
    only : int | None
        For an integer input, the one value that its elements may have: the model was compiled for
        what it does then.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    values: tuple[int, int] | None = field(default=None, compare=False)
    typical: tuple[int, int] | None = field(default=None, compare=False)
    multiples: tuple[int, ...] | None = field(default=None, compare=False)
    only: int | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"

    def as_json(self) -> dict[str, Any]:
        """Return the entry of a manifest."""
        entry = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
        ranges = {"range": self.values, "typical": self.typical, "multiples": self.multiples}
        entry |= {name: list(found) for name, found in ranges.items() if found is not None}
        return entry if self.only is None else {**entry, "only": self.only}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> TensorSpec:
        """Read the entry of a manifest."""
        values, typical, multiples = (
            tuple(entry[name]) if name in entry else None
            for name in ("range", "typical", "multiples")
        )
        shape, only = tuple(entry["shape"]), entry.get("only")
        return cls(entry["name"], entry["dtype"], shape, values, typical, multiples, only)


def multiples_of(specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Return what symbolic dimensions must be multiples of, where that is more than 1."""
    return {
        dim: multiple
        for spec in specs
        for dim, multiple in zip(spec.shape, spec.multiples or (), strict=False)
        if isinstance(dim, str) and multiple > 1
    }


@lru_cache
def symbols_of(dim: int | str) -> tuple[str, ...]:
    """Return the symbols in a dimension: itself, or those of an expression as ``past + new``."""
    return tuple(re.findall(r"[A-Za-z_]\w*", dim)) if isinstance(dim, str) else ()


def size_of(dim: int | str, sizes: Mapping[str, int]) -> int:
    """Return the size of a dimension, by those of its symbols; 1 for those that are not there.

    >>> size_of("past + new", {"past": 3, "new": 4})
    7
    """
    if isinstance(dim, int):
        return dim
    if dim in sizes or not symbols_of(dim):
        return sizes.get(dim, 1)
    return _evaluate(ast.parse(dim, mode="eval").body, sizes)


_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
}


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.BinOp):
        function = _ARITHMETIC[type(node.op)]
        return function(_evaluate(node.left, sizes), _evaluate(node.right, sizes))
    if isinstance(node, ast.Name):
        return sizes.get(node.id, 1)
    assert isinstance(node, ast.Constant)
    assert isinstance(node.value, int)
    return node.value
