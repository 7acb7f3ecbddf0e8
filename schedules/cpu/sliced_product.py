"""W X for few rows of activations, W in sliced rows: outputs fill the lanes, whatever the zeros.

One load brings a window of an input row, one instruction hands each lane the value that its weight
multiplies (``vpermps``): where single weights are scattered over their rows, nothing else keeps all
lanes busy without a load for each. See :class:`sparse_tvm.sparsity.sliced.SlicedRows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.block_arrays import STEPS_TOGETHER
from sparse_tvm.schedules.cpu.lane_tiles import (
    Expr,
    broadcast,
    fenced,
    scalar,
    span,
)
from sparse_tvm.schedules.cpu.row_sums import CHAINS, RowProduct, Sums
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.stored_weight import SlicedWeight
from sparse_tvm.schedules.cpu.vector_math import lanes_of


@dataclass(frozen=True)
class SlicedProduct(RowProduct):
    """The product of a weight's slices, each with its outputs in the lanes."""

    @property
    def block(self) -> int:
        return self._sliced.lanes

    @property
    def outputs(self) -> bool:
        return True

    @property
    def _sliced(self) -> SlicedWeight:
        assert self.weight.sliced is not None
        return self.weight.sliced

    def place(self, column: Expr, row: Expr, lanes: int) -> Expr:
        return span(row * self.weight.k_in + column, lanes)

    def place_of_all(self, column: Expr) -> Expr:
        return span(column, self.m, self.weight.k_in)

    def by_row(self, output: Expr) -> None:
        """They are."""

    def put(self, column: Expr, rows: Sequence[Expr]) -> None:
        for row, values in enumerate(rows):
            T.buffer_store(self.xs, values, [self.place(column, row, lanes_of(values))])

    def first_of(self, job: Expr) -> Expr:
        return scalar(self._sliced.partition[job])

    def run(self, start: Expr, stop: Expr) -> None:
        lanes, slices = self._sliced.lanes, self._sliced.slices
        chains = max(1, min(STEPS_TOGETHER, CHAINS // self.m))
        with T.serial(0, stop - start) as i:
            one = scalar(start + i)
            first = scalar(slices[one])
            sums = Sums(chains * self.m, lanes)
            with T.serial(0, slices[one + 1] - first) as j:
                self._some_steps(sums, scalar(first + j))
            for row in range(self.m):
                total = sums.total(row, self.m)
                T.buffer_store(self.ys, total, [self.at(one * lanes, row, lanes)])

    def _some_steps(self, sums: Sums, group: Expr) -> None:
        """Add the products of a group of steps, whose places lie together in words."""
        sliced, lanes, row_of = self._sliced, self._sliced.lanes, self.weight.k_in
        data = sliced.data
        ahead = group + data.ahead // (STEPS_TOGETHER * lanes)
        for step in range(0, STEPS_TOGETHER, max(1, data.per_line // lanes)):
            self.ask(data.buffer, (ahead, step, 0))
        words = sliced.places[group, span(0, lanes)]
        for step in range(STEPS_TOGETHER):
            window = scalar(sliced.windows[group, step], "int64")
            w = data[group, step, span(0, lanes)]
            places = _shifted(words, 8 * step)
            for row in range(self.m):
                x = picked(self.xs, window + row * row_of, places, self.simd)
                sums.add((step * self.m + row) % sums.count, w, x)


def picked(buffer: Any, first: Expr, places: Expr, simd: Simd) -> Expr:
    """Of as many neighbours as a vector has lanes, the one that each lane wants.

    ``places`` are int32, of which the lowest bits count. On a CPU without such an instruction,
    lane by lane.
    """
    lanes = simd.lanes
    if simd.permutation is None:
        within = T.bitwise_and(places, _words(lanes - 1, lanes))
        return buffer[T.Cast(f"int64x{lanes}", within) + broadcast(first, lanes)]
    # Behind a fence, which is no instruction: from memory, ``vpermps`` takes half as long again.
    window = fenced(buffer[span(first, lanes)])
    return T.call_llvm_pure_intrin(f"float32x{lanes}", simd.permutation, window, places)


def _shifted(words: Expr, bits: int) -> Expr:
    lanes = int(str(words.ty.dtype).partition("x")[2])
    return T.shift_right(words, _words(bits, lanes)) if bits else words


def _words(value: int, lanes: int) -> Expr:
    return T.broadcast(tirx.const(value, "int32"), lanes)
