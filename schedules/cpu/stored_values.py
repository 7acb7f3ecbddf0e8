"""Numbers of a weight in memory, which kernels read as float32 in whatever type they are stored.

Halves (float16) are half the bytes, and one instruction widens a vector of them, on x86 since F16C
and on Arm: where few rows of activations read a weight, its bytes are the time it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cpu.block_arrays import value_dtype
from sparse_tvm.schedules.cpu.lane_tiles import (
    PREFETCH_BYTES,
    Buffer,
    Expr,
    argument,
    broadcast,
    fenced,
    span,
)

_TOGETHER = 4
"""Of a vector of 128 bits, the shortest there is."""


def _vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


@dataclass(frozen=True)
class StoredValues:
    """A buffer of float32, float16 or the bits of bfloat16: float32 to who reads its elements."""

    buffer: Buffer

    @classmethod
    def declare(cls, name: str, shape: Sequence[Expr], layout: Layout) -> StoredValues:
        """Declare the buffer as the next argument."""
        return cls(argument(name, shape, value_dtype(layout).name))

    def __getitem__(self, index: Expr | tuple[Expr, ...]) -> Expr:
        """One element or, where the last index is a ramp, a vector of them."""
        stored, dtype = self.buffer[index], str(self.buffer.dtype)
        lanes = stored.ty.dtype.lanes
        if dtype == "float32":
            return stored
        if dtype == "float16":
            return T.Cast(_vector("float32", lanes), stored)
        words = T.Cast(_vector("uint32", lanes), stored)
        upper = broadcast(tirx.const(16, "uint32"), lanes)
        return T.reinterpret(_vector("float32", lanes), T.shift_left(words, upper))

    def elements(self, first: tuple[Expr, ...], count: int) -> list[Expr]:
        """So many neighbours, each by itself; what is widened is widened together."""
        *lead, at = first
        if self.value_bytes == 4 or count == 1:
            return [self[(*lead, at + i)] for i in range(count)]
        found: list[Expr] = []
        for begin in range(0, count, _TOGETHER):
            some = min(_TOGETHER, count - begin)
            # LLVM would see where elements come from, and widen each by itself.
            wide = fenced(self[(*lead, span(at + begin, some))])
            found += [tirx.Shuffle([wide], [tirx.const(i, "int32")]) for i in range(some)]
        return found

    @property
    def value_bytes(self) -> int:
        """Bytes of an element."""
        return int(self.buffer.dtype.bits) // 8

    @property
    def per_line(self) -> int:
        """Elements of a cache line."""
        return 64 // self.value_bytes

    @property
    def ahead(self) -> int:
        """How many elements ahead of their use they are asked for."""
        return PREFETCH_BYTES // self.value_bytes

    def flat(self, size: Expr) -> StoredValues:
        """The same elements with one index."""
        return StoredValues(T.decl_buffer((size,), self.buffer.dtype, data=self.buffer.data))
