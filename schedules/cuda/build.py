"""The pieces that kernels are written with, in TVMScript's builder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from sparse_tvm.families import Extents

Expr = Any
Buffer = Any


@contextmanager
def prim_func() -> Iterator[dict[str, Any]]:
    """Open a PrimFunc; the finished function is ``result["func"]`` after the block."""
    result: dict[str, Any] = {}
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        yield result
    result["func"] = builder.get()


def argument(name: str, shape: Sequence[Expr], dtype: str) -> Buffer:
    """Declare the next argument of the open PrimFunc."""
    return T.arg(name, T.buffer(tuple(shape), dtype))


def tensor(name: str, extents: Extents) -> Buffer:
    """Declare the next argument, with symbols for the extents that run time decides."""
    shape = [symbol(f"{name}_{i}") if dim is None else dim for i, dim in enumerate(extents.shape)]
    return argument(name, shape, extents.dtype)


def size_of(shape: Sequence[Expr]) -> Expr:
    """How many elements there are."""
    size: Expr = 1
    for dim in shape:
        size = dim * size
    return size


def symbol(name: str) -> Expr:
    """A symbolic extent, bound by the shape of the argument it appears in."""
    return tirx.Var(name, "int64")


def flat(buffer: Buffer, size: Expr) -> Buffer:
    """The same memory, of one dimension."""
    return T.decl_buffer((size,), str(buffer.dtype), data=buffer.data)


def local(size: int, dtype: str) -> Buffer:
    """Registers of a thread: a small buffer whose every index is a constant."""
    # Through a view: TVM would shrink the buffer to the elements whose address is taken.
    buffer = T.alloc_buffer((size,), dtype, scope="local")
    return T.decl_buffer((size,), dtype, data=buffer.data, scope="local")


@dataclass(frozen=True)
class Registers:
    """A part of a thread's registers, by indices of its own.

    What is alive at the same time has to be parts of one buffer: TVM lets buffers of one size share
    their memory once it thinks one of them is no longer used, and it misses uses in calls.
    """

    buffer: Buffer
    first: int

    def __getitem__(self, index: int) -> Expr:
        return self.buffer[self.first + index]

    def store(self, index: int, value: Expr) -> None:
        """Set one of them."""
        T.buffer_store(self.buffer, value, [self.first + index])


def registers(dtype: str, *sizes: int) -> list[Registers]:
    """So many registers for each of several purposes."""
    buffer = local(sum(sizes), dtype)
    return [Registers(buffer, sum(sizes[:i])) for i in range(len(sizes))]
