"""Y = epilogue(W X) on lane tiles, for W dense, CSR or BSR: one family of kernels.

For each block row of W, a block of accumulators (rows of W by vectors of tokens, up to four tiles
of them) stays in registers while the stored blocks stream past once, linearly; each block
multiplies the vectors of X at its column. A dense W is the same loop with every block present and
no indices; its blocks have as many rows as a vector has lanes, for few tokens' sake, and are
computed in passes of as many rows as there are registers for. Rows are split over jobs by the
number of stored blocks, so that threads finish together.

A sparse W with few rows per block does little with each vector of X, so what counts is where X
comes from. Such a W is stored in parts of columns (K-splitting): the part of X that one part
multiplies stays in the first cache while all rows of a thread pass over it, and the sums wait in Y
from part to part. The layout's parameter ``packed`` (1) has each thread copy that part first, so
that it comes as a stream, and no tiles lie a multiple of a page apart. Within a part and a job,
block rows are sorted by their number of blocks, for the CPU to foresee where the inner loop ends.

Where there are no more than eight tokens in all, which run time tells, :mod:`row_matmul` takes
over.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from math import prod

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Gate, Layout, Residual, Step
from sparse_tvm.schedules.cpu.lane_tiles import (
    Expr,
    Registers,
    Tiles,
    TileVectors,
    argument,
    for_group_sizes,
    groups_of,
    prefetch,
    prim_func,
    ramp,
    scalar,
    scratch,
    share_jobs,
    small_integers,
    span,
    splat,
    splats,
    symbol,
    unrolled,
    zero,
)
from sparse_tvm.schedules.cpu.row_matmul import few_rows
from sparse_tvm.schedules.cpu.simd import LANES, ROW_COUNTS, Simd, group_of
from sparse_tvm.schedules.cpu.stored_weight import Epilogue, StoredWeight

_ROWS_AHEAD = 4

_WIDENED_BLOCKS = 32
"""Blocks that are widened at a time, into the first cache."""

_CHAINS, _LOADED_TOGETHER_CHAINS = 4, 8
"""Independent sums that a loop over blocks has at least, if it has the registers."""


def matmul(
    tiles: Tiles,
    rows: int | None,
    n_out: int,
    k_in: int,
    layout: Layout,
    epilogue: Sequence[Step],
    simd: Simd,
    groups: int = 1,
) -> tirx.PrimFunc:
    """Build the kernel for ``rows`` tokens of each leading index, None if run time tells.

    Arguments of the PrimFunc, in order:
    X ``[lead, tiles, k_in, LANES]``; the weight's arrays (see :class:`StoredWeight`); one argument
    per bias (``[n_out]``), residual or gate (like Y) step of the epilogue; the number of rows, an
    int64, if it is not known; last Y ``[lead, tiles, n_out, LANES]``.

    Epilogue steps apply in order.
    """
    with prim_func() as result:
        x = argument("x", tiles.shape(k_in))
        weight = StoredWeight.declare(layout, n_out, k_in, groups)
        after = Epilogue.declare(epilogue, tiles, n_out)
        per_lead = rows if rows is not None else T.arg("rows", symbol("rows"))
        y = argument("y", tiles.shape(n_out))

        x, y, after = tiles.flat(x, k_in), tiles.flat(y, n_out), after.flat(tiles, n_out)
        whole_tiles = _WholeTiles(tiles, weight, x, y, after, simd)

        def few(count: int) -> None:
            few_rows(count, tiles, per_lead, weight, x, y, after, simd)

        _by_count(tiles.lead * per_lead, few, whole_tiles.run)
    return result["func"]


def _by_count(total: Expr, few: Callable[[int], None], many: Callable[[], None]) -> None:
    """The kernel for so many rows: the smallest for few rows that is large enough, or tiles."""
    if isinstance(total, int):
        fitting = [count for count in ROW_COUNTS if count >= total]
        few(fitting[0]) if fitting else many()
        return
    total = scalar(total, "int64")
    below = 0
    for count in ROW_COUNTS:
        with T.If(tirx.all(total > below, total <= count)), T.Then():
            few(count)
        below = count
    with T.If(total > below), T.Then():
        many()


class _WholeTiles:
    """The kernel for any number of tiles."""

    def __init__(
        self,
        tiles: Tiles,
        weight: StoredWeight,
        x: Expr,
        y: Expr,
        epilogue: Epilogue,
        simd: Simd,
    ) -> None:
        self.tiles, self.weight, self.x, self.y = tiles, weight, x, y
        self.epilogue, self.simd = epilogue, simd
        self.block = weight.layout.block[0]
        self.limit = group_of(weight.layout, simd)
        self.together = simd.weights_together(weight.layout)
        self.panel: Expr = None
        self.wide: Expr = None

    def run(self) -> None:
        """Emit the kernel, on all threads."""
        # Each thread takes one range of the jobs of all groups. Group-major, so that it keeps the
        # same tokens through the whole model, in its own cache; and as one range, so that a part
        # of X serves all its rows.
        tiles, limit = self.tiles, self.limit
        threads = scalar(tirx.call_packed("runtime.NumThreads"))
        with T.parallel(0, threads) as thread:
            if self.weight.layout.get("packed", 0):
                columns = -(-self.weight.k_in // self.weight.parts) + self.weight.layout.block[1]
                self.panel = T.alloc_buffer((columns * limit * LANES,), "float32")
            if self.weight.data.value_bytes == 2 and not self.simd.by_element:
                self.wide = scratch(_WIDENED_BLOCKS * prod(self.weight.layout.block))

            def jobs(group: Expr, job: Expr, last_job: Expr) -> None:
                start, stop = self.weight.first_of(job), self.weight.first_of(last_job)

                def body(first: Expr, size: int) -> None:
                    self._rows(TileVectors(first, size, self.simd), start, stop)

                for_group_sizes(tiles.count, limit, group, body)

            share_jobs(thread, threads, groups_of(tiles.count, limit), jobs)

    def _rows(self, vectors: TileVectors, start: Expr, stop: Expr) -> None:
        """Compute a range of a part's block rows, part by part, for one group of tiles."""
        weight = self.weight
        remainder = weight.n_out % self.block
        with T.serial(0, weight.parts) as part:
            if self.panel is not None:
                self._pack(part, vectors)
            with T.serial(0, stop - start) as i:
                segment = scalar(part * weight.block_rows + start + i)
                block_row = scalar(weight.order[segment] if weight.layout.sparse else start + i)
                if remainder == 0:
                    self._block_row(part, segment, block_row, self.block, vectors)
                else:
                    with T.If(block_row < weight.block_rows - 1):
                        with T.Then():
                            self._block_row(part, segment, block_row, self.block, vectors)
                        with T.Else():
                            self._block_row(part, segment, block_row, remainder, vectors)

    def _block_row(
        self, part: Expr, segment: Expr, block_row: Expr, live: int, vectors: TileVectors
    ) -> None:
        """Add one part's product to the ``live`` rows of a block row, pass by pass."""
        size = self.block
        if not self.weight.layout.sparse:
            room = max(1, self.simd.accumulators // vectors.count)
            size = max(rows for rows in range(1, size + 1) if size % rows == 0 and rows <= room)
        for skipped in range(0, live, size):
            rows = min(size, live - skipped)
            self._pass(part, segment, block_row, skipped, rows, vectors)

    def _pass(
        self,
        part: Expr,
        segment: Expr,
        block_row: Expr,
        skipped: int,
        rows: int,
        vectors: TileVectors,
    ) -> None:
        parts, y = self.weight.parts, self.y

        def at(row: int, vector: int) -> list[Expr]:
            tile, lanes = vectors.at(vector)
            return [tile, block_row * self.block + skipped + row, lanes]

        # A short sum would wait for itself: it is kept in several, of every so many blocks.
        room = self.simd.accumulators // (rows * vectors.count)
        least = _LOADED_TOGETHER_CHAINS if self.together > 1 else _CHAINS
        chains = max(1, min(room, -(-least // (rows * vectors.count))))
        sums = [Registers(rows, vectors.count, self.simd) for _ in range(chains)]
        for other in sums[1:]:
            other.fill(lambda row, vector: zero(self.simd))
        if parts == 1:
            sums[0].fill(lambda row, vector: zero(self.simd))
        else:
            with T.If(part == 0):
                with T.Then():
                    sums[0].fill(lambda row, vector: zero(self.simd))
                with T.Else():
                    sums[0].fill(lambda row, vector: y[tuple(at(row, vector))])
        self._accumulate(sums, part, segment, block_row, skipped, vectors)
        if chains > 1:
            sums[0].fill(
                lambda row, vector: reduce(operator.add, [s.get(row, vector) for s in sums])
            )

        def save() -> None:
            for row in range(rows):
                for vector in range(vectors.count):
                    T.buffer_store(y, sums[0].get(row, vector), at(row, vector))

        def finish_one(row: int, vector: int) -> None:
            place = at(row, vector)
            value = self.epilogue.apply(
                sums[0].get(row, vector),
                lambda bias: splat(bias[place[1]], self.simd),
                lambda like_y: like_y[tuple(place)],
            )
            T.buffer_store(y, value, place)

        def finish() -> None:
            for row in range(rows):
                for vector in range(vectors.count):
                    finish_one(row, vector)

        if parts == 1:
            finish()
            return
        with T.If(part == parts - 1):
            with T.Then():
                finish()
            with T.Else():
                save()

    def _accumulate(
        self,
        sums: list[Registers],
        part: Expr,
        segment: Expr,
        block_row: Expr,
        skipped: int,
        vectors: TileVectors,
    ) -> None:
        """Stream the stored blocks of one block row of one part."""
        weight = self.weight

        def x(column: Expr, vector: int) -> Expr:
            tile, lanes = vectors.at(vector)
            return self.x[tile, column, lanes]

        if not weight.layout.sparse:
            first = scalar(part * weight.depth // weight.parts)
            count = scalar((part + 1) * weight.depth // weight.parts - first)
            first_input = weight.first_input(block_row)
            passes = -(-self.block // sums[0].rows)
            step = scalar(count // passes)
            begin = scalar(first + skipped // sums[0].rows * step)

            def column(i: Expr, chain: int, weights: Callable[[int], Expr]) -> None:
                if chain % passes == 0:
                    # A pass asks for its share of the next block row: a stream without pauses.
                    prefetch(weight.data.buffer, (block_row + 1, begin + i // passes, 0))
                sums[chain % len(sums)].multiply_add(
                    weights, lambda v: x(first_input + first + i, v)
                )

            def of_column(i: Expr) -> tuple[Expr, ...]:
                return block_row, first + i, skipped

            by = max(len(sums), passes)
            self._with_weights(count, by, of_column, (1, sums[0].rows), column)
            return
        first = scalar(weight.indptr[segment])
        count = scalar(weight.indptr[segment + 1] - first)
        weight.ask_for_row(first, count)
        if self.simd.few_registers:
            self._ask_for_sums(part, segment, vectors)
        if self.together > 1:
            self._accumulate_together(sums, part, first, count, vectors)
            return

        rows, columns = weight.layout.block

        def in_column(weights: Callable[[int], Expr], c: int, row: int) -> Expr:
            return weights(c * rows + row)

        def one_column(into: Registers, column: Expr, weights: Callable[[int], Expr]) -> None:
            into.multiply_add(weights, lambda v: self._x_at(part, column, v, vectors))

        def block(i: Expr, chain: int, weights: Callable[[int], Expr]) -> None:
            at = first + i
            weight.ask_for_block(at)
            column = scalar(weight.indices[at])
            for c in range(columns):
                one_column(sums[chain], column + c, partial(in_column, weights, c))

        def of_block(i: Expr) -> tuple[Expr, ...]:
            return first + i, 0, 0

        self._with_weights(count, len(sums), of_block, weight.layout.block[::-1], block)

    def _with_weights(
        self,
        count: Expr,
        by: int,
        first_of: Callable[[Expr], tuple[Expr, ...]],
        shape: tuple[int, int],
        body: Callable[[Expr, int, Callable[[int], Expr]], None],
    ) -> None:
        """Repeat ``body`` for so many blocks of ``shape`` (columns, rows), unrolled, with weights.

        ``first_of`` says where a block begins. Where a multiply-add takes a float32 from memory
        into all lanes, values of 16 bits become float32 in memory first, some blocks at a time.
        """
        columns, rows = shape
        data, size = self.weight.data, columns * rows

        def stored(i: Expr, chain: int) -> None:
            first, column, row = first_of(i)
            columns_of = (data.elements((first, column + c, row), rows) for c in range(columns))
            body(i, chain, list(itertools.chain.from_iterable(columns_of)).__getitem__)

        if self.wide is None:
            unrolled(count, by, stored)
            return

        def widened(i: Expr, element: int) -> Expr:
            return self.wide[i * size + element]

        with T.serial(0, (count + (_WIDENED_BLOCKS - 1)) // _WIDENED_BLOCKS) as run:
            begin = scalar(run * _WIDENED_BLOCKS)
            blocks = scalar(tirx.min(count - begin, _WIDENED_BLOCKS))
            self._widen(first_of(begin), blocks, size)
            unrolled(blocks, by, lambda i, chain: body(begin + i, chain, partial(widened, i)))

    def _widen(self, first: tuple[Expr, ...], blocks: Expr, size: int) -> None:
        """Make float32 of so many blocks, or of so much of each: all beside each other."""
        data = self.weight.data
        count, columns, rows = data.buffer.shape
        flat, layout = data.flat(count * columns * rows), self.weight.layout
        start = scalar((T.Cast("int64", first[0]) * columns + first[1]) * rows + first[2], "int64")
        # Sparse blocks lie side by side; the last vector may end behind them, as arrays do.
        lanes = apart = LANES
        if not layout.sparse:
            lanes, apart = size, layout.block[0]
        with T.serial(0, (blocks * size + (lanes - 1)) // lanes) as i:
            at = start + i * apart
            T.buffer_store(self.wide, flat[span(at, lanes)], [span(i * lanes, lanes)])

    def _accumulate_together(
        self, sums: list[Registers], part: Expr, first: Expr, count: Expr, vectors: TileVectors
    ) -> None:
        """The same for single weights, of which one load brings several."""
        weight, simd = self.weight, self.simd
        data = weight.data.flat(weight.data.buffer.shape[0])

        def add(into: Registers, column: Expr, value: Expr) -> None:
            for v in range(vectors.count):
                into.set(0, v, into.get(0, v) + value * self._x_at(part, column, v, vectors))

        # Rows are stored in whole fours: a loop over what is left would end unforeseen.
        with T.serial(0, count // self.together) as i:
            at = scalar(first + i * self.together)
            values = splats(data, at, simd)
            columns = small_integers(weight.indices, at)
            for step in range(self.together):
                add(sums[step % len(sums)], columns[step], values[step])

    def _ask_for_sums(self, part: Expr, segment: Expr, vectors: TileVectors) -> None:
        """Ask for what rows soon to come are added to: the CPU does not foresee their order.

        With AVX-512 models took up to 1.05 times as long for it.
        """
        weight = self.weight
        soon = tirx.min(segment + _ROWS_AHEAD, weight.parts * weight.block_rows - 1)
        first = scalar(weight.order[soon] * self.block)

        def ask(like_y: Expr) -> None:
            for v in range(0, vectors.count, self.simd.per_tile):
                for i in range(self.block):
                    prefetch(like_y, (vectors.at(v)[0], first + i, 0))

        ask(self.y)
        others = [extra for step, extra in self.epilogue.steps if isinstance(step, Residual | Gate)]
        if others:
            with T.If(part == weight.parts - 1), T.Then():
                for other in others:
                    ask(other)

    def _pack(self, part: Expr, vectors: TileVectors) -> None:
        """Copy the part's columns of a group of tiles, whose vectors then are neighbours.

        Tiles lie as far apart as they are large, which is often a multiple of a page: vectors of
        one column would want the same lines of the first cache.
        """
        begin, end = (scalar(self._first_column(p)) for p in (part, part + 1))
        wide = self.weight.layout.block[1] - 1  # the last blocks of a part may end in the next one
        end = scalar(tirx.min(end + wide, self.weight.k_in)) if wide else end
        with T.serial(0, end - begin) as i:
            for v in range(vectors.count):
                tile, lanes = vectors.at(v)
                value = self.x[tile, begin + i, lanes]
                T.buffer_store(self.panel, value, [self._panel_at(i, v, vectors)])

    def _first_column(self, part: Expr) -> Expr:
        """The first column of a part."""
        parts = self.weight.parts
        return (part * self.weight.k_in + (parts - 1)) // parts

    def _panel_at(self, column: Expr, vector: int, vectors: TileVectors) -> Expr:
        """Where a vector is in the packed part; ``column`` counts from the part's first."""
        return ramp((column * vectors.count + vector) * self.simd.lanes, self.simd)

    def _x_at(self, part: Expr, column: Expr, vector: int, vectors: TileVectors) -> Expr:
        """A vector of X for a column."""
        if self.panel is not None:
            return self.panel[self._panel_at(column - self._first_column(part), vector, vectors)]
        tile, lanes = vectors.at(vector)
        # In 64 bits, for only these leave the column alone to be added in the loop.
        return self.x[T.Cast("int64", tile), column, lanes]
