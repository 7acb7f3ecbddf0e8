"""The activation layout every kernel shares: tokens in SIMD lanes, features across registers.

A logical activation ``[..., rows, features]`` is stored as ``[lead, tiles, features, LANES]``:
row ``m`` of a leading index sits in tile ``m // LANES``, lane ``m % LANES``. A weight then
multiplies a whole vector of tokens, a reduction over features is a plain sum of registers, and a
head is a slice of the feature axis. Lanes past the last row are padding: kernels compute them and
nobody reads them.

A tile is one cache line wide on every CPU, so any number of tokens runs in steps of sixteen;
kernels block their registers over several tiles. All extents but the features may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import TensorLoad
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.sym import Analyzer
from tvm_ffi import structural_equal

from sparse_tvm.schedules.cpu.block_arrays import JOBS_PER_GROUP
from sparse_tvm.schedules.cpu.simd import LANES, Simd

Expr = Any
"""A TIR expression or a Python number."""

Buffer = Any

_ANALYZER = Analyzer()


@dataclass(frozen=True)
class Tiles:
    """Extents of a tiled activation, without features and lanes.

    Attributes
    ----------
    lead : int or expression
        Product of the leading dimensions (batch).
    per_lead : int or expression
        Tiles per leading index; the last may be partly padding.
    """

    lead: Expr
    per_lead: Expr

    @property
    def count(self) -> Expr:
        """Tiles in all."""
        return self.lead * self.per_lead

    def shape(self, features: Expr) -> tuple[Expr, ...]:
        """Shape of a tiled activation with this many features."""
        return (self.lead, self.per_lead, features, LANES)

    def flat(self, buffer: Buffer, features: int) -> Buffer:
        """The same memory seen as ``[count, features, LANES]``."""
        return T.decl_buffer((self.count, features, LANES), "float32", data=buffer.data)


@contextmanager
def prim_func() -> Iterator[dict[str, Any]]:
    """Open a PrimFunc; the finished function is ``result["func"]`` after the block."""
    result: dict[str, Any] = {}
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"tirx.noalias": True})
        yield result
    result["func"] = builder.get()


def argument(name: str, shape: Sequence[Expr], dtype: str = "float32") -> Buffer:
    """Declare the next argument of the open PrimFunc."""
    return T.arg(name, T.buffer(tuple(shape), dtype))


def symbol(name: str) -> Expr:
    """A symbolic extent, bound by the shape of the argument it appears in."""
    return tirx.Var(name, "int64")


def local(size: int, dtype: str = "float32") -> Buffer:
    """Registers: a small buffer whose every index is a constant after unrolling."""
    # On the stack, where LLVM makes it registers: left to TVM, it is memory from a pool.
    return T.alloc_buffer((size,), dtype, annotations={"disable_lower_builtin": 1})


def scratch(size: int, dtype: str = "float32") -> Buffer:
    """Memory on the stack, for indices that are not constant, from the start of a cache line."""
    bytes_per_line = 64
    lanes = bytes_per_line * 8 // int("".join(c for c in dtype if c.isdigit()))
    # As vectors, or LLVM aligns elements only. Through a view: TVM would shrink the buffer to what
    # an inner loop touches, and then fail.
    lines = local(-(-size // lanes), f"{dtype}x{lanes}")
    return T.decl_buffer((size,), dtype, data=lines.data)


def scalar(value: Expr, dtype: str = "int32") -> Expr:
    """Evaluate ``value`` once, here, and return it for repeated use; numbers stay numbers."""
    if isinstance(value, int):
        return value
    cell = local(1, dtype)
    T.buffer_store(cell, T.Cast(dtype, value), [0])
    return cell[0]


PREFETCH_BYTES = 4096
"""How far ahead of its use a weight is asked for: the CPU's own prefetchers stop at each page."""


def prefetch(buffer: Buffer, index: tuple[Expr, ...]) -> None:
    """Ask for the cache line of an element, which may lie behind the buffer's end."""
    read, all_levels, data = 0, 3, 1  # of LLVM's intrinsic
    numbers = [tirx.const(number, "int32") for number in (read, all_levels, data)]
    address = tirx.address_of(buffer[index])
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, *numbers))


def splat(value: Expr, simd: Simd) -> Expr:
    """The scalar ``value`` in every lane."""
    return T.broadcast(value, simd.lanes)


def splats(buffer: Buffer, first: Expr, simd: Simd) -> list[Expr]:
    """Each of four elements in every lane of a vector, all of one load.

    ``buffer`` has one dimension, and the expressions are to be used where they are made.
    """
    fours = four_repeated(buffer[span(first, 4)], simd)
    quads = range(0, simd.lanes, 4)
    return [tirx.Shuffle([fours], [quad + i for quad in quads for _ in range(4)]) for i in range(4)]


def four_repeated(four: Expr, simd: Simd) -> Expr:
    """Four elements in each quad of a vector, for the fastest shuffles stay within quads."""
    # LLVM would see where elements come from, and load each by itself.
    return fenced(tirx.Shuffle([four] * (simd.lanes // 4), list(range(simd.lanes))))


def fenced(value: Expr) -> Expr:
    """A scalar or vector of which LLVM does not see what it was made of: no instruction."""
    lanes, dtype = value.ty.dtype.lanes, str(value.ty.dtype)
    kept = local(lanes)
    fence = T.call_llvm_pure_intrin(dtype, "llvm.arithmetic.fence", value)
    T.buffer_store(kept, fence, [span(0, lanes)])
    return kept[span(0, lanes)]


def small_integers(buffer: Buffer, first: Expr) -> list[Expr]:
    """Four elements as int64; of uint16, one load brings all, and stays out of vector registers."""
    if str(buffer.dtype) != "uint16":
        return [scalar(buffer[first + i], "int64") for i in range(4)]
    word, bits = scalar(T.reinterpret("uint64", buffer[span(first, 4)]), "uint64"), 16
    mask = tirx.const((1 << bits) - 1, "uint64")
    shifted = [T.shift_right(word, tirx.const(bits * i, "uint64")) for i in range(4)]
    return [scalar(T.bitwise_and(value, mask), "int64") for value in shifted]


def broadcast(value: Expr, lanes: int) -> Expr:
    """A scalar in each of so many lanes."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def ramp(base: Expr, simd: Simd) -> Expr:
    """Indices of one vector of consecutive elements."""
    return T.ramp(base, 1, simd.lanes)


def span(first: Expr, lanes: int, step: int = 1) -> Expr:
    """Indices of any number of elements ``step`` apart."""
    return T.ramp(first, step, lanes) if lanes > 1 else first


def zero(simd: Simd) -> Expr:
    """A vector of zeros."""
    return splat(T.float32(0), simd)


def side_by_side(vectors: Sequence[Expr]) -> Expr:
    """Vectors as one, which LLVM computes in as many registers."""
    if len(vectors) == 1:
        return vectors[0]
    count = len(vectors) * int(vectors[0].ty.dtype.lanes)
    return tirx.Shuffle(list(vectors), [tirx.const(i, "int32") for i in range(count)])


class TileVectors:
    """The vectors of ``count`` consecutive tiles, numbered across them.

    ``at(v)`` gives tile and lanes of vector ``v``, to index a flat tiled buffer with. ``used``
    counts those of a tile that hold rows, by default all.
    """

    def __init__(self, first: Expr, count: int, simd: Simd, used: int | None = None) -> None:
        self.used = used or simd.per_tile
        self.first, self.count, self.simd = first, count * self.used, simd

    def at(self, vector: int) -> tuple[Expr, Expr]:
        """Tile index and lane indices of one vector."""
        tile, part = divmod(vector, self.used)
        return self.first + tile, ramp(part * self.simd.lanes, self.simd)


def for_group_sizes(
    count: Expr, limit: int, index: Expr, body: Callable[[Expr, int], None]
) -> None:
    """Call ``body(first, size)`` for group ``index`` of ``count`` tiles.

    The tiles are shared out among ``groups_of(count, limit)`` groups as evenly as can be. ``body``
    is generated once per possible size, since sizes decide registers.
    """
    groups = groups_of(count, limit)
    first = scalar(index * count // groups)
    size = scalar((index + 1) * count // groups - first)
    if isinstance(count, int):
        sizes = sorted({count // groups, -(-count // groups)})
    else:
        sizes = list(range(1, limit + 1))
    for candidate in sizes[:-1]:
        with T.If(size == candidate), T.Then():
            body(first, candidate)
    if len(sizes) == 1:
        body(first, sizes[0])
    else:
        with T.If(size == sizes[-1]), T.Then():
            body(first, sizes[-1])


def groups_of(count: Expr, limit: int) -> Expr:
    """How many groups of at most ``limit`` tiles there are."""
    return (count + (limit - 1)) // limit


def share_jobs(
    thread: Expr, threads: Expr, units: Expr, body: Callable[[Expr, Expr, Expr], None]
) -> None:
    """Call ``body(unit, first job, end of jobs)`` for a thread's share of all units' jobs.

    Units have `JOBS_PER_GROUP` jobs each. Every thread takes one range of them all.
    """
    jobs = scalar(units * JOBS_PER_GROUP)
    begin = scalar(thread * jobs // threads)
    end = scalar((thread + 1) * jobs // threads)
    first_unit = scalar(begin // JOBS_PER_GROUP)
    stop_unit = (end + (JOBS_PER_GROUP - 1)) // JOBS_PER_GROUP
    with T.serial(0, scalar(stop_unit - first_unit)) as i:
        unit = scalar(first_unit + i)
        job = scalar(tirx.max(begin - unit * JOBS_PER_GROUP, 0))
        last_job = scalar(tirx.min(end - unit * JOBS_PER_GROUP, JOBS_PER_GROUP))
        body(unit, job, last_job)


def unrolled(count: Expr, by: int, body: Callable[[Expr, int], None]) -> None:
    """``body(i, i % by)`` for all i below ``count``, as a loop with ``by`` of them in a row."""
    with T.serial(0, count // by) as i:
        for chain in range(by):
            body(i * by + chain, chain)
    if by > 1 and not (isinstance(count, int) and count % by == 0):
        with T.serial(0, count % by) as i:
            body(count // by * by + i, 0)


class Registers:
    """A ``rows`` x ``vectors`` block of vector accumulators."""

    def __init__(self, rows: int, vectors: int, simd: Simd, dtype: str = "float32") -> None:
        self.rows, self.vectors, self.simd = rows, vectors, simd
        self._buffer = local(rows * vectors * simd.lanes, dtype)

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

    def add(self, others: Registers) -> None:
        """Add as many others, one by one."""
        self.fill(lambda row, vector: self.get(row, vector) + others.get(row, vector))

    def multiply_add(self, weight: Callable[[int], Expr], x: Callable[[int], Expr]) -> None:
        """Add the outer product of ``weight(row)`` (scalars) and ``x(vector)`` (vectors)."""
        if self.simd.by_element:
            # Vector by vector: the weights of all rows wait in a few registers.
            weights = loaded_together([weight(row) for row in range(self.rows)], self.simd)
            for vector in range(self.vectors):
                for row in range(self.rows):
                    self._add_product(row, vector, weights[row], x(vector))
            return
        if self.rows < self.vectors and not self.simd.fits(self.rows, self.vectors):
            # Vector by vector, as many weights are live as there are rows.
            scales, operand = Registers(self.rows, 1, self.simd), Registers(1, 1, self.simd)
            scales.fill(lambda row, _: splat(weight(row), self.simd))
            for vector in range(self.vectors):
                operand.set(0, 0, x(vector))
                for row in range(self.rows):
                    product = scales.get(row, 0) * operand.get(0, 0)
                    self.set(row, vector, self.get(row, vector) + product)
            return
        # Row by row, one weight at a time is live: the other order spills at 24 accumulators.
        operands = [x(vector) for vector in range(self.vectors)]
        for row in range(self.rows):
            scale = weight(row)
            for vector, operand in enumerate(operands):
                self._add_product(row, vector, scale, operand)

    def multiply_add_steps(
        self, steps: int, weight: Callable[[int, int], Expr], x: Callable[[int, int], Expr]
    ) -> None:
        """Add ``steps`` outer products, of ``weight(row, step)`` and ``x(vector, step)``.

        For weights that are neighbours from step to step, not from row to row.
        """
        if not self.simd.by_element:
            for step in range(steps):
                self.multiply_add(partial(_swapped, weight, step), partial(_swapped, x, step))
            return
        weights = [
            loaded_together([weight(row, step) for step in range(steps)], self.simd)
            for row in range(self.rows)
        ]
        for step in range(steps):
            for vector in range(self.vectors):
                for row in range(self.rows):
                    self._add_product(row, vector, weights[row][step], x(vector, step))

    def _add_product(self, row: int, vector: int, scale: Expr, operand: Expr) -> None:
        self.set(row, vector, self.get(row, vector) + splat(scale, self.simd) * operand)


def _swapped(function: Callable[[int, int], Expr], second: int, first: int) -> Expr:
    return function(first, second)


def loaded_together(elements: Sequence[Expr], simd: Simd) -> list[Expr]:
    """The same scalars, as elements of vectors where they are neighbours in memory."""
    together: list[Expr] = []
    while len(together) < len(elements):
        rest = elements[len(together) :]
        sizes = (
            size
            for size in range(2, simd.lanes + 1)
            if size <= len(rest) and size & (size - 1) == 0 and _neighbours(rest[:size])
        )
        size = max(sizes, default=1)
        if size == 1:
            together.append(rest[0])
            continue
        *lead, first = rest[0].indices
        vector = rest[0].source[(*lead, span(first, size))]
        together += [tirx.Shuffle([vector], [tirx.const(i, "int32")]) for i in range(size)]
    return together


def _neighbours(elements: Sequence[Expr]) -> bool:
    """Whether scalars lie one after the other in memory."""
    first = elements[0]
    return all(
        isinstance(element, TensorLoad)
        and element.source.same_as(first.source)
        and structural_equal(element.indices[:-1], first.indices[:-1])
        and _ANALYZER.can_prove_equal(element.indices[-1] - first.indices[-1], i)
        for i, element in enumerate(elements)
    )
