"""Y = epilogue(W X) for few rows of activations: as fast as the weight can be read.

A tile of sixteen tokens is mostly padding where a model sees one to eight of them. Here the rows
that there are, of whatever tiles, are copied to ``[k_in, M]`` first, and

- outputs fill the vector lanes where a block of the weight has enough of them: each vector of
  weights multiplies one broadcast value per row;
- else the M rows fill the lanes, and each weight is broadcast.

The weight is the one that :mod:`matmul` reads for whole tiles. Sums wait in a buffer until the
last part of columns; then the epilogue is applied, and the rows go back into their tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.block_arrays import JOBS_PER_GROUP
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Tiles,
    local,
    prefetch,
    scalar,
    span,
    unrolled,
)
from sparse_tvm.schedules.cpu.row_cost import outputs_in_lanes
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.stored_weight import PREFETCH_BYTES, Epilogue, StoredWeight

_CHAINS = 8
"""Independent sums that keep the multiply-adds busy."""


def _splat(value: Expr, lanes: int) -> Expr:
    return T.broadcast(value, lanes) if lanes > 1 else value


@dataclass(frozen=True)
class _Rows:
    """Where the few rows lie in their tiles.

    ``together`` tells, as far as it is known (None: at run time), that they are the first lanes of
    one tile.
    """

    count: int
    tiles: list[Expr]
    lanes: list[Expr]
    together: bool | Expr

    @classmethod
    def find(cls, count: int, tiles: Tiles, per_lead: Expr) -> _Rows:
        """``count`` rows, of which the last ones repeat the last that there is."""
        lead = tiles.lead
        if isinstance(lead, int) and lead == 1:
            return cls(count, [0] * count, list(range(count)), True)
        last = scalar(lead * per_lead - 1)
        rows = [scalar(tirx.min(row, last)) for row in range(count)]
        each = scalar(per_lead)
        return cls(
            count,
            [scalar(row // each) for row in rows],
            [scalar(row % each) for row in rows],
            False if isinstance(lead, int) else lead == 1,
        )

    def _either(self, together: Callable[[], None], apart: Callable[[], None]) -> None:
        if isinstance(self.together, bool):
            (together if self.together else apart)()
            return
        with T.If(self.together):
            with T.Then():
                together()
            with T.Else():
                apart()

    def copy(self, x: Buffer, xs: Buffer, k_in: int) -> None:
        """Copy the rows of a tiled X to ``[k_in, count]``."""

        def together() -> None:
            with T.serial(0, k_in) as k:
                lanes = x[0, k, span(0, self.count)]
                T.buffer_store(xs, lanes, [span(k * self.count, self.count)])

        def apart() -> None:
            with T.serial(0, k_in) as k:
                for i, (tile, lane) in enumerate(zip(self.tiles, self.lanes, strict=True)):
                    T.buffer_store(xs, x[tile, k, lane], [k * self.count + i])

        self._either(together, apart)

    def load(self, buffer: Buffer, output: Expr) -> Expr:
        """One output of every row, from lane tiles."""
        values = [buffer[t, output, lane] for t, lane in zip(self.tiles, self.lanes, strict=True)]
        return _vector(values)

    def store(self, y: Buffer, output: Expr, values: Sequence[Expr]) -> None:
        """Put one output of every row into its tile."""

        def together() -> None:
            T.buffer_store(y, _vector(values), [0, output, span(0, self.count)])

        def apart() -> None:
            for value, tile, lane in zip(values, self.tiles, self.lanes, strict=True):
                T.buffer_store(y, value, [tile, output, lane])

        self._either(together, apart)


def _vector(scalars: Sequence[Expr]) -> Expr:
    return (
        tirx.Shuffle(list(scalars), list(range(len(scalars)))) if len(scalars) > 1 else scalars[0]
    )


class _Sums:
    """Sums in registers, a buffer each, of so many lanes."""

    def __init__(self, count: int, lanes: int) -> None:
        self.lanes, self._buffers = lanes, [local(lanes) for _ in range(count)]
        for i in range(count):
            self._set(i, _splat(T.float32(0), lanes))

    def _set(self, i: int, value: Expr) -> None:
        T.buffer_store(self._buffers[i], value, [span(0, self.lanes)])

    def get(self, i: int) -> Expr:
        return self._buffers[i][span(0, self.lanes)]

    def add(self, i: int, weight: Expr, x: Expr) -> None:
        self._set(i, self.get(i) + weight * x)

    def total(self, i: int, step: int) -> Expr:
        """Every ``step``-th sum from ``i`` on, added up."""
        total = self.get(i)
        for other in range(i + step, len(self._buffers), step):
            total = total + self.get(other)
        return total


class _FewRows:
    """The kernel for ``rows.count`` rows, on one thread's share of the weight."""

    def __init__(
        self,
        weight: StoredWeight,
        rows: _Rows,
        x: Buffer,
        y: Buffer,
        epilogue: Epilogue,
        simd: Simd,
    ) -> None:
        self.weight, self.rows, self.y, self.epilogue, self.simd = weight, rows, y, epilogue, simd
        self.m = rows.count
        self.block = weight.layout.block[0]
        self.outputs = outputs_in_lanes(weight.layout, self.m)
        self.width = weight.block_rows * self.block
        self.xs = T.alloc_buffer((weight.k_in * self.m,), "float32")
        self.ys = T.alloc_buffer((self.width * self.m,), "float32")
        rows.copy(x, self.xs, weight.k_in)

    def x(self, column: Expr, row: int = 0, lanes: int = 1) -> Expr:
        """Some rows' values of an input column."""
        return self.xs[span(column * self.m + row, lanes)]

    def at(self, output: Expr, row: int, lanes: int) -> list[Expr]:
        """Where sums wait: of some outputs of a row, or of all rows for an output."""
        if self.outputs:
            return [span(row * self.width + output, lanes)]
        return [span(output * self.m + row, lanes)]

    def run(self, start: Expr, stop: Expr) -> None:
        """Compute a range of each part's block rows."""
        weight = self.weight
        if weight.layout.sparse:
            with T.serial(0, weight.parts) as part, T.serial(0, stop - start) as i:
                segment = scalar(part * weight.block_rows + start + i)
                self._block_row(part, segment, scalar(weight.order[segment]))
        else:
            with T.serial(0, stop - start) as i:
                self._dense_block(scalar(start + i))
        first = scalar(start * self.block)
        count = scalar(tirx.max(tirx.min(stop * self.block, weight.n_out) - first, 0))
        self._finish(first, count)

    def _dense_block(self, block: Expr) -> None:
        """All outputs of a dense block: as many vectors at a time as there are registers for."""
        data, k_in, size = self.weight.data, self.weight.k_in, self.block
        lanes = gcd(self.simd.lanes, size)
        vectors = size // lanes
        at_once = max(
            d
            for d in range(1, vectors + 1)
            if vectors % d == 0 and d * self.m <= max(self.simd.accumulators, self.m)
        )
        chains = max(1, _CHAINS // (at_once * self.m))
        per_line = at_once * lanes * 4 >= 64
        for first in range(0, vectors, at_once):
            sums = _Sums(chains * at_once * self.m, lanes)

            def step(k: Expr, chain: int, first: int = first, sums: _Sums = sums) -> None:
                if per_line or first == 0:
                    prefetch(data, (block, k + PREFETCH_BYTES // (4 * size), 0))
                for vector in range(at_once):
                    w = data[block, k, span((first + vector) * lanes, lanes)]
                    for row in range(self.m):
                        place = (chain * at_once + vector) * self.m + row
                        sums.add(place, w, _splat(self.x(k, row), lanes))

            unrolled(k_in, chains, step)
            for vector in range(at_once):
                for row in range(self.m):
                    total = sums.total(vector * self.m + row, at_once * self.m)
                    output = block * size + (first + vector) * lanes
                    T.buffer_store(self.ys, total, self.at(output, row, lanes))

    def _block_row(self, part: Expr, segment: Expr, block_row: Expr) -> None:
        """One part's product for a block row of a sparse weight."""
        weight, m, size = self.weight, self.m, self.block
        lanes, many = (size, m) if self.outputs else (m, size)
        chains = max(1, min(4, _CHAINS // many))
        sums = _Sums(chains * many, lanes)
        first = scalar(weight.indptr[segment])
        count = scalar(weight.indptr[segment + 1] - first)
        weight.prefetch(first, count)

        def step(i: Expr, chain: int) -> None:
            at = first + i
            column = scalar(weight.indices[at])
            for c in range(weight.layout.block[1]):
                for one in range(many):
                    if self.outputs:
                        w = weight.data[at, c, span(0, size)]
                        sums.add(chain * many + one, w, _splat(self.x(column + c, one), size))
                    else:
                        w = _splat(weight.data[at, c, one], m)
                        sums.add(chain * many + one, w, self.x(column + c, 0, m))

        unrolled(count, chains, step)
        for one in range(many):
            total = sums.total(one, many)
            at = (
                self.at(block_row * size, one, lanes)
                if self.outputs
                else self.at(block_row * size + one, 0, lanes)
            )
            if weight.parts == 1:
                T.buffer_store(self.ys, total, at)
                continue
            with T.If(part == 0):
                with T.Then():
                    T.buffer_store(self.ys, total, at)
                with T.Else():
                    T.buffer_store(self.ys, self.ys[tuple(at)] + total, at)

    def _finish(self, first: Expr, count: Expr) -> None:
        """Apply the epilogue to a range of outputs, and put them into their tiles."""
        if not self.outputs:
            with T.serial(0, count) as i:
                self._finish_rows(first + i)
            return
        lanes = self.simd.lanes
        with T.serial(0, count // lanes) as i:
            self._finish_outputs(scalar(first + i * lanes), lanes)
        with T.serial(0, count % lanes) as i:
            self._finish_outputs(scalar(first + count // lanes * lanes + i), 1)

    def _finish_rows(self, output: Expr) -> None:
        """One output of all rows."""
        value = self.epilogue.apply(
            self.ys[tuple(self.at(output, 0, self.m))],
            lambda bias: _splat(bias[output], self.m),
            lambda residual: self.rows.load(residual, output),
        )
        T.buffer_store(self.ys, value, self.at(output, 0, self.m))
        self._put(output)

    def _finish_outputs(self, output: Expr, lanes: int) -> None:
        """Some outputs of each row, then of all."""
        for row, (tile, lane) in enumerate(zip(self.rows.tiles, self.rows.lanes, strict=True)):

            def residual(extra: Buffer, tile: Expr = tile, lane: Expr = lane) -> Expr:
                return _vector([extra[tile, output + i, lane] for i in range(lanes)])

            value = self.epilogue.apply(
                self.ys[tuple(self.at(output, row, lanes))],
                lambda bias: bias[span(output, lanes)],
                residual,
            )
            T.buffer_store(self.ys, value, self.at(output, row, lanes))
        for i in range(lanes):
            self._put(output + i)

    def _put(self, output: Expr) -> None:
        """Put one output of all rows into their tiles."""
        values = [self.ys[tuple(self.at(output, row, 1))] for row in range(self.m)]
        self.rows.store(self.y, output, values)


def few_rows(
    count: int,
    tiles: Tiles,
    per_lead: Expr,
    weight: StoredWeight,
    x: Buffer,
    y: Buffer,
    epilogue: Epilogue,
    simd: Simd,
) -> None:
    """Emit the product of a weight and at most ``count`` rows, on all threads.

    X, Y and residuals are flat lane tiles, of ``per_lead`` rows in each of ``tiles.lead``.
    """
    threads = scalar(tirx.call_packed("runtime.NumThreads"))
    with T.parallel(0, threads) as thread:
        start = weight.first_of(scalar(thread * JOBS_PER_GROUP // threads))
        stop = weight.first_of(scalar((thread + 1) * JOBS_PER_GROUP // threads))
        with T.If(start < stop), T.Then():
            rows = _Rows.find(count, tiles, per_lead)
            _FewRows(weight, rows, x, y, epilogue, simd).run(start, stop)
