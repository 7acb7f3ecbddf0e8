"""Layer norm, of a sum if there is a residual: a warp has a row in its registers.

Each thread reads eight neighbouring elements at a time. The mean comes first, then the variance of
what is left of the row without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.families import Extents
from sparse_tvm.schedules.cuda import instructions
from sparse_tvm.schedules.cuda.build import (
    Registers,
    argument,
    flat,
    prim_func,
    registers,
    size_of,
    tensor,
)
from sparse_tvm.schedules.cuda.storage import HALF, LARGEST

Expr = Any
Buffer = Any

_WARPS = 4
"""Rows of a thread block."""

_CHUNK = 8
"""Elements that a thread reads at a time, in float16 16 bytes."""


def layer_norm(
    x: Extents,
    y: Extents,
    epsilon: float,
    second: str | None = None,
    residual: Extents | None = None,
    remainder: Extents | None = None,
) -> tirx.PrimFunc:
    """The kernel: x, gamma and beta of float32, the residual if any and its remainder, y.

    Rows are of 16 bits or float32. Behind y comes the ``second`` result: the same in float32, or in
    uint8 what rounding y left.
    """
    width = x.shape[-1]
    assert width is not None
    with prim_func() as result:
        source = tensor("x", x)
        gamma, beta = (argument(name, (width,), "float32") for name in ("gamma", "beta"))
        sources = [source]
        for name, extents in (("residual", residual), ("remainder", remainder)):
            if extents is not None:
                sources.append(tensor(name, extents))
        targets = [tensor("y", y)]
        if second is not None:
            targets.append(tensor("second", replace(y, dtype=second)))
        rows = size_of(source.shape[:-1])
        read, written = (
            [(_vectors(array, rows * width), str(array.dtype)) for array in arrays]
            for arrays in (sources, targets)
        )
        with (
            T.launch_thread("blockIdx.x", (rows + (_WARPS - 1)) // _WARPS) as block,
            T.launch_thread("threadIdx.x", 32 * _WARPS) as thread,
        ):
            instructions.await_previous()
            row = block * _WARPS + thread // 32
            with T.If(row < rows), T.Then():
                norm = _RowNorm(width, thread % 32, epsilon)
                for vectors, dtype in read:
                    norm.add(vectors, row * width, dtype)
                norm.normalise(gamma, beta)
                for vectors, dtype in written:
                    norm.write(vectors, row * width, dtype)
    return result["func"]


class _RowNorm:
    """The code of one warp for one row."""

    def __init__(self, width: int, lane: Expr, epsilon: float) -> None:
        self.width, self.lane, self.epsilon = width, lane, epsilon
        self.turns = -(-width // (32 * _CHUNK))
        self.row, self.factors, self.sums = registers("float32", self.turns * _CHUNK, 2 * _CHUNK, 2)

        for i in range(self.turns * _CHUNK):
            self.row.store(i, T.float32(0))

    def add(self, source: Buffer, first: Expr, dtype: str) -> None:
        """Add a row to what was added before."""
        each = _PER_WORD[dtype]
        (words,) = registers("uint32", _CHUNK // each) if each > 1 else [self.factors]
        for turn, column, guard in self._chunks():
            with guard:
                _load(words, 0, source, (first + column) // each, _CHUNK // each)
                for i in range(_CHUNK):
                    at = turn * _CHUNK + i
                    value = _number(words[i // each], i % each, dtype)
                    self.row.store(at, self.row[at] + value)

    def normalise(self, gamma: Buffer, beta: Buffer) -> None:
        """Leave ``(row - mean) / deviation * gamma + beta`` of the row."""
        mean, scale = self.sums[0], self.sums[1]
        self._average(0, lambda value: value)
        for turn, _, guard in self._chunks():
            with guard:
                for i in range(turn * _CHUNK, (turn + 1) * _CHUNK):
                    self.row.store(i, self.row[i] - mean)
        self._average(1, lambda value: value * value)
        self.sums.store(1, tirx.rsqrt(scale + T.float32(self.epsilon)))
        for turn, column, guard in self._chunks():
            with guard:
                _load(self.factors, 0, gamma, column)
                _load(self.factors, _CHUNK, beta, column)
                for i in range(_CHUNK):
                    at = turn * _CHUNK + i
                    scaled = self.row[at] * scale * self.factors[i]
                    self.row.store(at, scaled + self.factors[_CHUNK + i])

    def write(self, target: Buffer, first: Expr, dtype: str) -> None:
        """Write the row; what a type cannot hold becomes its largest number."""
        each = _PER_WORD[dtype]
        count = _CHUNK // each
        (words,) = registers("uint32", count) if each > 1 else [self.row]
        for turn, column, guard in self._chunks():
            with guard:
                for i in range(count if each > 1 else 0):
                    at = turn * _CHUNK + i * each
                    words.store(i, _word([self.row[at + j] for j in range(each)], dtype))
                start = words.first + (turn * _CHUNK if each == 1 else 0)
                for i in range(0, count, 4):
                    lanes = min(count, 4)
                    value = words.buffer[T.ramp(start + i, 1, lanes)]
                    at = (first + column) // each + i
                    T.buffer_store(target, value, [T.ramp(at, 1, lanes)])

    def _average(self, which: int, term: Any) -> None:
        """The mean of a term of the row's elements."""
        self.sums.store(which, T.float32(0))
        for i in range(self.turns * _CHUNK):
            self.sums.store(which, self.sums[which] + term(self.row[i]))
        total = instructions.value("warp_sum", self.sums[which])
        self.sums.store(which, total * T.float32(1 / self.width))

    def _chunks(self) -> Iterator[tuple[int, Expr, AbstractContextManager[None]]]:
        """Number and first column of the chunks of a thread, and what they stand under."""
        for turn in range(self.turns):
            column = (turn * 32 + self.lane) * _CHUNK
            whole = (turn + 1) * 32 * _CHUNK <= self.width
            yield turn, column, nullcontext() if whole else _where(column < self.width)


@contextmanager
def _where(condition: Expr) -> Iterator[None]:
    with T.If(condition), T.Then():
        yield


_PER_WORD = {"float32": 1, "float16": 2, "bfloat16": 2, "uint8": 4}
"""Elements in 32 bits."""


def _vectors(array: Buffer, size: Expr) -> Buffer:
    """An array as words or numbers that vectors are made of."""
    if str(array.dtype) == "float32":
        return flat(array, size)
    return T.decl_buffer((size // _PER_WORD[str(array.dtype)],), "uint32", data=array.data)


def _load(to: Registers, index: int, source: Buffer, first: Expr, count: int = _CHUNK) -> None:
    for i in range(0, count, 4):
        lanes = min(count, 4)
        value = source[T.ramp(first + i, 1, lanes)]
        T.buffer_store(to.buffer, value, [T.ramp(to.first + index + i, 1, lanes)])


def _number(word: Expr, which: int, dtype: str) -> Expr:
    """One of the numbers of a word."""
    if dtype == "float32":
        return word
    if dtype == "uint8":
        return instructions.value("unpack_remainder", word, which)
    return instructions.unpack(word, which, dtype)


def _word(values: list[Expr], dtype: str) -> Expr:
    """Numbers of the row as a word of a type."""
    if dtype == "uint8":
        kept = [_finite(value, HALF) for value in values]
        return instructions.value("pack_remainders", *kept, dtype="uint32")
    first, last = (_finite(value, dtype) for value in values)
    return instructions.pack(first, last, dtype)


def _finite(value: Expr, dtype: str) -> Expr:
    largest = T.float32(LARGEST[dtype])
    return tirx.max(tirx.min(value, largest), -largest)
