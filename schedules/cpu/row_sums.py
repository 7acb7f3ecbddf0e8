"""W X for few rows of activations: what its kernels share, whatever the weight is stored in.

Activations are gathered in a buffer first, and the sums go to another, where they also wait
between parts of columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.block_arrays import JOBS_PER_GROUP
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    broadcast,
    local,
    prefetch,
    scalar,
    span,
)
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.stored_weight import StoredWeight

CHAINS = 8
"""Independent sums that keep the multiply-adds busy."""


class Sums:
    """Sums in registers, a buffer each, of so many lanes."""

    def __init__(self, count: int, lanes: int) -> None:
        self.count, self.lanes, self._buffers = count, lanes, [local(lanes) for _ in range(count)]
        for i in range(count):
            self._set(i, broadcast(T.float32(0), lanes))

    def _set(self, i: int, value: Expr) -> None:
        T.buffer_store(self._buffers[i], value, [span(0, self.lanes)])

    def get(self, i: int) -> Expr:
        """One sum."""
        return self._buffers[i][span(0, self.lanes)]

    def add(self, i: int, weight: Expr, x: Expr) -> None:
        """Add a product to one sum."""
        self._set(i, self.get(i) + weight * x)

    def total(self, i: int, step: int) -> Expr:
        """Every ``step``-th sum from ``i`` on, added up."""
        total = self.get(i)
        for other in range(i + step, len(self._buffers), step):
            total = total + self.get(other)
        return total


@dataclass(frozen=True)
class RowProduct(ABC):
    """The product of a weight and ``m`` rows, from ``xs`` ``[k_in * m]`` to ``ys``.

    ``ys`` has room for ``width * m`` sums. :meth:`place` says where activations are to be, and
    :meth:`at` where sums are.
    """

    weight: StoredWeight
    m: int
    xs: Buffer
    ys: Buffer
    simd: Simd

    @classmethod
    def allocate(cls, weight: StoredWeight, m: int, simd: Simd) -> Self:
        """With buffers of its own."""
        xs = T.alloc_buffer((weight.k_in * m,), "float32")
        product = cls(weight, m, xs, None, simd)
        ys = T.alloc_buffer((product.width * m,), "float32")
        return replace(product, ys=ys)

    @property
    @abstractmethod
    def block(self) -> int:
        """Outputs that are computed together, and belong to one thread."""

    @property
    @abstractmethod
    def outputs(self) -> bool:
        """Whether outputs alone fill the lanes."""

    @abstractmethod
    def place(self, column: Expr, row: Expr, lanes: int) -> Expr:
        """Where a row's values of some neighbouring input columns are."""

    @abstractmethod
    def place_of_all(self, column: Expr) -> Expr:
        """Where all rows' values of one input column are."""

    @abstractmethod
    def first_of(self, job: Expr) -> Expr:
        """The first block of a job."""

    @abstractmethod
    def run(self, start: Expr, stop: Expr) -> None:
        """Compute a range of the blocks."""

    def ask(self, buffer: Buffer, index: tuple[Expr, ...]) -> None:
        """Ask for weights further on, where the CPU does not foresee them."""
        if self.weight.asks(self.m, self.simd):
            prefetch(buffer, index)

    @property
    def width(self) -> int:
        """Outputs of all blocks, the last of which may be more than there are."""
        return -(-self.weight.n_out // self.block) * self.block

    def at(self, output: Expr, row: int, lanes: int) -> Expr:
        """Where sums are: of some outputs of a row, or of all rows for an output."""
        return span(row * self.width + output, lanes)

    @abstractmethod
    def by_row(self, output: Expr) -> None:
        """Bring a vector of outputs' sums, of all rows, in the order that `sums` wants."""

    def sums(self, output: Expr, row: Expr, lanes: int) -> Expr:
        """The sums of one or, once they are in order, of a vector of outputs of one row."""
        return self.ys[span(row * self.width + output, lanes)]

    @abstractmethod
    def put(self, column: Expr, rows: Sequence[Expr]) -> None:
        """Store each row's values of a vector of neighbouring input columns."""

    def share(self, thread: Expr, threads: Expr) -> tuple[Expr, Expr]:
        """The blocks of a thread: the first, and the one behind the last."""
        start = self.first_of(scalar(thread * JOBS_PER_GROUP // threads))
        return start, self.first_of(scalar((thread + 1) * JOBS_PER_GROUP // threads))
