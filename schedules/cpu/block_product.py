"""W X for few rows of activations, W dense, CSR or BSR.

Outputs fill the vector lanes where a block of the weight has enough of them: each vector of weights
multiplies one broadcast value per row. Else the M rows fill the lanes, and each weight is
broadcast; with AVX2, and single weights with AVX-512, fill them with rows of four weights together,
which one load brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd
from operator import add

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import (
    Expr,
    broadcast,
    four_repeated,
    local,
    scalar,
    small_integers,
    span,
    unrolled,
)
from sparse_tvm.schedules.cpu.quads import interleaved, parted
from sparse_tvm.schedules.cpu.row_cost import four_together, outputs_in_lanes
from sparse_tvm.schedules.cpu.row_sums import CHAINS, RowProduct, Sums
from sparse_tvm.schedules.cpu.vector_math import lanes_of


@dataclass(frozen=True)
class BlockProduct(RowProduct):
    """The product of a weight in blocks."""

    @property
    def block(self) -> int:
        return self.weight.layout.block[0]

    @property
    def outputs(self) -> bool:
        return outputs_in_lanes(self.weight.layout, self.m, self.simd.lanes)

    @property
    def abreast(self) -> int:
        """Rows of single weights that are summed up side by side, as far as registers go."""
        together = four_together(self.weight.layout, self.m, self.simd.lanes)
        vectors = -(-4 * self.m // self.simd.lanes)
        fits = self.simd.rows_abreast(self.weight.layout)
        return min(fits, CHAINS // vectors) if together else 1

    def place(self, column: Expr, row: Expr, lanes: int) -> Expr:
        return span(column * self.m + row, lanes, self.m)

    def place_of_all(self, column: Expr) -> Expr:
        return span(column * self.m, self.m)

    def first_of(self, job: Expr) -> Expr:
        return self.weight.first_of(job)

    def x(self, column: Expr, row: int = 0, lanes: int = 1) -> Expr:
        """Some rows' values of an input column."""
        return self.xs[span(column * self.m + row, lanes)]

    def at(self, output: Expr, row: int, lanes: int) -> Expr:
        if self.outputs:
            return super().at(output, row, lanes)
        return span(output * self.m + row, lanes)

    def by_row(self, output: Expr) -> None:
        if self.outputs or self.m == 1:
            return
        lanes = self.simd.lanes
        places = [span(output * self.m + i * lanes, lanes) for i in range(self.m)]
        for place, values in zip(places, parted([self.ys[p] for p in places], self.m), strict=True):
            T.buffer_store(self.ys, values, [place])

    def sums(self, output: Expr, row: Expr, lanes: int) -> Expr:
        if self.outputs:
            return super().sums(output, row, lanes)
        return self.ys[span(output * self.m + row * lanes, lanes)]

    def put(self, column: Expr, rows: Sequence[Expr]) -> None:
        lanes = self.simd.lanes
        for i, values in enumerate(interleaved(rows)):
            T.buffer_store(self.xs, values, [span(column * self.m + i * lanes, lanes)])

    def run(self, start: Expr, stop: Expr) -> None:
        """Compute a range of each part's block rows."""
        weight = self.weight
        if weight.layout.sparse:
            abreast = self.abreast
            with T.serial(0, weight.parts) as part:
                begin, count = scalar(part * weight.block_rows + start), stop - start
                if abreast > 1:
                    with T.serial(0, count // abreast) as i:
                        self._some_rows(part, scalar(begin + i * abreast))
                    begin = scalar(begin + count // abreast * abreast)
                    count = count % abreast
                self._one_after_the_other(part, begin, count)
        else:
            with T.serial(0, stop - start) as i:
                self._dense_block(scalar(start + i))

    def _one_after_the_other(self, part: Expr, begin: Expr, count: Expr) -> None:
        """One part's product for some block rows."""
        with T.serial(0, count) as i:
            segment = scalar(begin + i)
            self._block_row(part, segment, scalar(self.weight.order[segment]))

    def _some_rows(self, part: Expr, segment: Expr) -> None:
        """The same for as many rows as are summed up side by side, if they are equally long.

        They lie by their length, so that the first and the last tell.
        """
        indptr, last = self.weight.indptr, segment + self.abreast - 1
        equal = indptr[segment + 1] - indptr[segment] == indptr[last + 1] - indptr[last]
        with T.If(equal):
            with T.Then():
                self._rows_abreast(part, segment)
            with T.Else():
                self._one_after_the_other(part, segment, self.abreast)

    def _dense_block(self, block: Expr) -> None:
        """All outputs of a dense block: as many vectors at a time as there are registers for."""
        data, size, first_input = self.weight.data, self.block, self.weight.first_input(block)
        lanes = gcd(self.simd.lanes, size)
        vectors = size // lanes
        at_once = max(
            d
            for d in range(1, vectors + 1)
            if vectors % d == 0 and d * self.m <= max(self.simd.accumulators, self.m)
        )
        chains = max(1, CHAINS // (at_once * self.m))
        per_line = at_once * lanes >= data.per_line
        for first in range(0, vectors, at_once):
            sums = Sums(chains * at_once * self.m, lanes)

            def step(k: Expr, chain: int, first: int = first, sums: Sums = sums) -> None:
                if per_line or first == 0:
                    self.ask(data.buffer, (block, k + data.ahead // size, 0))
                for vector in range(at_once):
                    w = data[block, k, span((first + vector) * lanes, lanes)]
                    for row in range(self.m):
                        place = (chain * at_once + vector) * self.m + row
                        sums.add(place, w, broadcast(self.x(first_input + k, row), lanes))

            unrolled(self.weight.depth, chains, step)
            for vector in range(at_once):
                for row in range(self.m):
                    total = sums.total(vector * self.m + row, at_once * self.m)
                    output = block * size + (first + vector) * lanes
                    T.buffer_store(self.ys, total, [self.at(output, row, lanes)])

    def _block_row(self, part: Expr, segment: Expr, block_row: Expr) -> None:
        """One part's product for a block row of a sparse weight."""
        first = scalar(self.weight.indptr[segment])
        count = scalar(self.weight.indptr[segment + 1] - first)
        if four_together(self.weight.layout, self.m, self.simd.lanes):
            totals = self._four_together(first, count)
        else:
            totals = self._one_by_one(first, count)
        for offset, total in totals:
            lanes = lanes_of(total)
            if self.outputs:
                at = self.at(block_row * self.block, offset, lanes)
            else:
                at = span(block_row * self.block * self.m + offset, lanes)
            self._save(part, at, total)

    def _save(self, part: Expr, at: Expr, total: Expr) -> None:
        """Keep a sum, of one part or added to those before it."""
        if self.weight.parts == 1:
            T.buffer_store(self.ys, total, [at])
            return
        with T.If(part == 0):
            with T.Then():
                T.buffer_store(self.ys, total, [at])
            with T.Else():
                T.buffer_store(self.ys, self.ys[at] + total, [at])

    def _one_by_one(self, first: Expr, count: Expr) -> list[tuple[int, Expr]]:
        """Sums of a block row: with each its row, or with rows in lanes its place."""
        weight, m, size = self.weight, self.m, self.block
        lanes, many = (size, m) if self.outputs else (m, size)
        chains = max(1, min(4, CHAINS // many))
        sums = Sums(chains * many, lanes)
        if weight.asks(m, self.simd):
            weight.ask_for_row(first, count)

        def step(i: Expr, chain: int) -> None:
            at = first + i
            if weight.asks(m, self.simd):
                weight.ask_for_block(at)
            column = scalar(weight.indices[at])
            for c in range(weight.layout.block[1]):
                scales = [] if self.outputs else weight.data.elements((at, c, 0), many)
                for one in range(many):
                    if self.outputs:
                        w = weight.data[at, c, span(0, size)]
                        sums.add(chain * many + one, w, broadcast(self.x(column + c, one), size))
                    else:
                        w = broadcast(scales[one], m)
                        sums.add(chain * many + one, w, self.x(column + c, 0, m))

        unrolled(count, chains, step)
        step_of = 1 if self.outputs else m
        return [(one * step_of, sums.total(one, many)) for one in range(many)]

    def _four_together(self, first: Expr, count: Expr) -> list[tuple[int, Expr]]:
        """The same from four weights at a time, of a block or of several: with each its place.

        Lanes hold products of weights with rows, all rows of a weight beside each other.
        """
        weight, m, size = self.weight, self.m, self.block
        blocks = 4 // size
        lanes = min(4 * m, self.simd.lanes)
        vectors = 4 * m // lanes
        chains = max(2, min(size, CHAINS // vectors))
        sums = Sums(chains * vectors, lanes)
        rest = Sums(size, m) if blocks > 1 else None
        data = weight.data.flat(weight.data.buffer.shape[0] * size)
        ahead = data.ahead
        for line in range(2):
            self.ask(weight.indices, (first + ahead // size + line * 32,))

        def step(i: Expr, chain: int) -> None:
            at = scalar(first + i * blocks, "int64")
            if chain % 4 == 0:
                self.ask(data.buffer, (at * size + ahead,))
            four = data[span(at * size, 4)]
            if m > 1:
                four = four_repeated(four, self.simd)
            columns = (
                small_integers(weight.indices, at)
                if blocks == 4
                else [scalar(weight.indices[at + block], "int64") for block in range(blocks)]
            )
            self._add_four(sums, chain, four, columns, size)

        unrolled(count // blocks, chains, step)
        totals = [(v * lanes, sums.total(v, vectors)) for v in range(vectors)]
        if rest is None:
            return totals
        with T.serial(0, count % blocks) as i:
            at = scalar(first + count // blocks * blocks + i, "int64")
            column = scalar(weight.indices[at], "int64")
            for one in range(size):
                rest.add(one, broadcast(data[at * size + one], m), self.x(column, 0, m))
        kept = local(4 * m)
        for at, total in totals:
            T.buffer_store(kept, total, [span(at, lanes)])
        return [
            (
                one * m,
                reduce(
                    add,
                    (kept[span((block * size + one) * m, m)] for block in range(blocks)),
                    rest.get(one),
                ),
            )
            for one in range(size)
        ]

    def _add_four(
        self, sums: Sums, group: int, four: Expr, columns: Sequence[Expr], size: int = 1
    ) -> None:
        """Add four weights' products with all rows to a group of sums, one for each vector.

        ``columns`` has one index for each ``size`` of them.
        """
        m, lanes = self.m, sums.lanes
        vectors = 4 * m // lanes
        for vector in range(vectors):
            places = range(vector * lanes, (vector + 1) * lanes)
            # Shuffles stay within quads, of which each has all four.
            w = [place // m + 4 * (place % lanes // 4) for place in places]
            sums.add(
                group * vectors + vector,
                four if m == 1 else tirx.Shuffle([four], w),
                self._rows_of(columns, [place // m // size for place in places[::m]]),
            )

    def _rows_abreast(self, part: Expr, segment: Expr) -> None:
        """One part's product for rows of single weights, all equally long.

        They are stored one after the other, in whole fours, and summed up side by side.
        """
        weight, m, abreast = self.weight, self.m, self.abreast
        first = scalar(weight.indptr[segment], "int64")
        count = scalar(weight.indptr[segment + 1] - first, "int64")
        lanes = min(4 * m, self.simd.lanes)
        vectors = 4 * m // lanes
        sums = Sums(abreast * vectors, lanes)
        data = weight.data.flat(weight.data.buffer.shape[0])
        ahead = data.ahead
        with T.serial(0, count // 4) as i:
            self.ask(data.buffer, (first + i * 4 * abreast + ahead,))
            self.ask(weight.indices, (first + i * 4 * abreast + ahead,))
            for row in range(abreast):
                at = scalar(first + count * row + i * 4, "int64")
                four = data[span(at, 4)]
                if m > 1:
                    four = four_repeated(four, self.simd)
                columns = small_integers(weight.indices, at)
                self._add_four(sums, row, four, columns)
        for row, total in enumerate(self._totals_abreast(sums, vectors, lanes)):
            block_row = scalar(weight.order[segment + row])
            self._save(part, span(block_row * m, m), total)

    def _totals_abreast(self, sums: Sums, vectors: int, lanes: int) -> list[Expr]:
        """Of each row, what its four weights' lanes have, added up."""
        m, abreast = self.m, self.abreast
        if m == 1:
            every = [sums.get(row) for row in range(abreast)]
            four = [tirx.Shuffle(every, list(range(i, 4 * abreast, 4))) for i in range(4)]
            kept = local(abreast)
            T.buffer_store(kept, reduce(add, four), [span(0, abreast)])
            return [kept[row] for row in range(abreast)]
        kept = local(4 * m * abreast)
        for i in range(abreast * vectors):
            T.buffer_store(kept, sums.get(i), [span(i * lanes, lanes)])
        return [
            reduce(add, [kept[span((row * 4 + weight) * m, m)] for weight in range(4)])
            for row in range(abreast)
        ]

    def _rows_of(self, columns: Sequence[Expr], which: Sequence[int]) -> Expr:
        """The rows' values of some of the input columns, one after the other, in one vector."""
        values = [self.x(columns[one], 0, self.m) for one in which]
        if self.m == 1 and len(set(which)) == 1:
            return T.broadcast(values[0], len(which))
        return tirx.Shuffle(values, list(range(len(which) * self.m)))
