"""The activation layout every kernel shares: tokens in SIMD lanes, features across registers.

A logical activation ``[..., rows, features]`` is stored as ``[lead, tiles, features, lanes]``:
row ``m`` of a leading index sits in tile ``m // lanes``, lane ``m % lanes``. A weight then
multiplies a whole vector of tokens, a reduction over features is a plain sum of registers, and a
head is a slice of the feature axis. Lanes past the last row are padding: kernels compute them and
nobody reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

Expr = Any
Buffer = Any


@dataclass(frozen=True)
class Simd:
    """What a kernel needs to know of a CPU's vector unit.

    Attributes
    ----------
    lanes : int
        float32 elements in one vector register (8 for AVX2, 16 for AVX-512).
    registers : int
        Architectural vector registers (16 for AVX2, 32 for AVX-512).
    """

    lanes: int
    registers: int

    @property
    def accumulators(self) -> int:
        """Registers an inner loop may keep sums in, leaving some for its operands."""
        return self.registers - max(4, self.registers // 4)


@dataclass(frozen=True)
class LaneTiles:
    """Shape of a lane-tiled activation, without its feature axis.

    Attributes
    ----------
    lead : int
        Product of the leading dimensions (batch).
    rows : int
        Logical rows (tokens) per leading index.
    lanes : int
        Rows per tile, a multiple of the vector width.
    """

    lead: int
    rows: int
    lanes: int

    @property
    def per_lead(self) -> int:
        """Tiles per leading index; the last may be partly padding."""
        return math.ceil(self.rows / self.lanes)

    @property
    def count(self) -> int:
        """Tiles in all."""
        return self.lead * self.per_lead

    def shape(self, features: int) -> tuple[int, int, int, int]:
        """Shape of a tiled activation with this many features."""
        return (self.lead, self.per_lead, features, self.lanes)


def tiles_for(lead: int, rows: int, simd: Simd) -> LaneTiles:
    """Choose the lane tile: the widest of up to four vectors that pads the fewest rows.

    Narrower tiles pad less but reuse each weight for fewer tokens, hence the small handicap.
    """
    handicap = {1: 1.5, 2: 1.15, 3: 1.05, 4: 1.0}
    vectors = min(handicap, key=lambda v: math.ceil(rows / (v * simd.lanes)) * v * handicap[v])
    return LaneTiles(lead, rows, vectors * simd.lanes)


@contextmanager
def prim_func() -> Iterator[tuple[IRBuilder, dict[str, Any]]]:
    """Open a PrimFunc; the finished function is ``result["func"]`` after the block."""
    result: dict[str, Any] = {}
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_attr({"tirx.noalias": True})
            yield builder, result
    result["func"] = builder.get()


def argument(name: str, shape: tuple[Any, ...], dtype: str = "float32") -> Buffer:
    """Declare the next argument of the open PrimFunc."""
    return T.arg(name, T.buffer(shape, dtype))


def symbol(name: str) -> Expr:
    """A symbolic extent, bound by the shape of the argument it appears in."""
    return tirx.Var(name, "int64")


def local(size: int, dtype: str = "float32") -> Buffer:
    """Registers: a small buffer whose every index is a constant after unrolling."""
    return T.alloc_buffer((size,), dtype, scope="local")


def scalar(value: Expr, dtype: str = "int32") -> Expr:
    """Evaluate ``value`` once, here, and return it for repeated use."""
    cell = local(1, dtype)
    T.buffer_store(cell, value, [0])
    return cell[0]


def splat(value: Expr, simd: Simd) -> Expr:
    """The scalar ``value`` in every lane."""
    return T.broadcast(value, simd.lanes)


def ramp(base: Expr, simd: Simd) -> Expr:
    """Indices of one vector of consecutive elements."""
    return T.ramp(base, 1, simd.lanes)


class Registers:
    """A ``rows`` x ``vectors`` block of vector accumulators."""

    def __init__(self, rows: int, vectors: int, simd: Simd) -> None:
        self.rows, self.vectors, self.simd = rows, vectors, simd
        self._buffer = local(rows * vectors * simd.lanes)

    def _at(self, row: int, vector: int) -> Expr:
        return ramp((row * self.vectors + vector) * self.simd.lanes, self.simd)

    def get(self, row: int, vector: int) -> Expr:
        """Value of one register."""
        return self._buffer[self._at(row, vector)]

    def set(self, row: int, vector: int, value: Expr) -> None:
        """Assign one register."""
        T.buffer_store(self._buffer, value, [self._at(row, vector)])

    def fill(self, value: Callable[[int, int], Expr]) -> None:
        """Assign every register ``value(row, vector)``."""
        for row in range(self.rows):
            for vector in range(self.vectors):
                self.set(row, vector, value(row, vector))

    def add(self, other: Registers) -> None:
        """Add another block of the same shape."""
        self.fill(lambda row, vector: self.get(row, vector) + other.get(row, vector))

    def multiply_add(self, weight: Callable[[int], Expr], x: Callable[[int], Expr]) -> None:
        """Add the outer product of ``weight(row)`` (scalars) and ``x(vector)`` (vectors)."""
        for vector in range(self.vectors):
            operand = x(vector)
            for row in range(self.rows):
                product = splat(weight(row), self.simd) * operand
                self.set(row, vector, self.get(row, vector) + product)
