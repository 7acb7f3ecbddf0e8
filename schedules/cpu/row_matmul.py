"""Y = epilogue(W X) for few rows of activations: as fast as the weight can be read.

A tile of sixteen tokens is mostly padding where a model sees one to eight of them. Here the rows
that there are, of whatever tiles, are copied to ``[k_in, M]`` first; :mod:`row_product` multiplies
them by the weight, which is the one that :mod:`matmul` reads for whole tiles. Then the epilogue is
applied, and the rows go back into their tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Tiles,
    broadcast,
    fenced,
    scalar,
    span,
)
from sparse_tvm.schedules.cpu.quads import joined
from sparse_tvm.schedules.cpu.row_product import row_product
from sparse_tvm.schedules.cpu.row_sums import RowProduct
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.stored_weight import Epilogue, StoredWeight


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

    def copy(self, x: Buffer, product: RowProduct) -> None:
        """Copy the rows of a tiled X to where a product wants them."""
        xs, k_in = product.xs, product.weight.k_in

        def together() -> None:
            with T.serial(0, k_in) as k:
                # LLVM would gather what several lines have, which takes longer than one by one.
                lanes = fenced(x[0, k, span(0, self.count)])
                T.buffer_store(xs, lanes, [product.place_of_all(k)])

        def apart() -> None:
            with T.serial(0, k_in) as k:
                for i, (tile, lane) in enumerate(zip(self.tiles, self.lanes, strict=True)):
                    T.buffer_store(xs, x[tile, k, lane], [product.place(k, i, 1)])

        self._either(together, apart)

    def load(self, buffer: Buffer, output: Expr) -> Expr:
        """One output of every row, from lane tiles."""
        values = [buffer[t, output, lane] for t, lane in zip(self.tiles, self.lanes, strict=True)]
        return _vector(values)

    def store(self, y: Buffer, output: Expr, values: Sequence[Expr]) -> None:
        """Put one output of every row into its tile."""

        def together() -> None:
            # Nor is it to be scattered.
            T.buffer_store(y, fenced(_vector(values)), [0, output, span(0, self.count)])

        def apart() -> None:
            for value, tile, lane in zip(values, self.tiles, self.lanes, strict=True):
                T.buffer_store(y, value, [tile, output, lane])

        self._either(together, apart)


def _vector(parts: Sequence[Expr], times: int = 1) -> Expr:
    """Scalars or vectors, each so many times, one after the other in one vector."""
    parts = [part if times == 1 else broadcast(part, times) for part in parts]
    return joined(parts) if len(parts) > 1 else parts[0]


class _FewRows:
    """The kernel for ``rows.count`` rows, on one thread's share of the weight."""

    def __init__(
        self, product: RowProduct, rows: _Rows, x: Buffer, y: Buffer, epilogue: Epilogue
    ) -> None:
        self.product, self.rows, self.y, self.epilogue = product, rows, y, epilogue
        self.m, self.simd = product.m, product.simd
        self.ys, self.at = product.ys, product.at
        rows.copy(x, product)

    def run(self, start: Expr, stop: Expr) -> None:
        """Compute a range of the product's blocks."""
        self.product.run(start, stop)
        block, n_out = self.product.block, self.product.weight.n_out
        first = scalar(start * block)
        count = scalar(tirx.max(tirx.min(stop * block, n_out) - first, 0))
        self._finish(first, count)

    def _finish(self, first: Expr, count: Expr) -> None:
        """Apply the epilogue to a range of outputs, and put them into their tiles."""
        lanes = self.simd.lanes
        if self.product.outputs:
            finish, together = self._finish_outputs, lanes
        else:
            finish, together = self._finish_rows, max(1, lanes // self.m)
        with T.serial(0, count // together) as i:
            finish(scalar(first + i * together), together)
        if together > 1:
            with T.serial(0, count % together) as i:
                finish(scalar(first + count // together * together + i), 1)

    def _finish_rows(self, output: Expr, count: int) -> None:
        """Some outputs of all rows, which lie side by side."""
        m, outputs = self.m, [output + i for i in range(count)]
        place = span(output * m, count * m)
        value = self.epilogue.apply(
            self.ys[place],
            lambda bias: _vector([bias[each] for each in outputs], m),
            lambda like_y: _vector([self.rows.load(like_y, each) for each in outputs]),
        )
        T.buffer_store(self.ys, value, [place])
        self._put_all(output, count)

    def _finish_outputs(self, output: Expr, count: int) -> None:
        """Some outputs of each row, then of all."""
        for row, (tile, lane) in enumerate(zip(self.rows.tiles, self.rows.lanes, strict=True)):

            def like_y(extra: Buffer, tile: Expr = tile, lane: Expr = lane) -> Expr:
                return _vector([extra[tile, output + i, lane] for i in range(count)])

            value = self.epilogue.apply(
                self.ys[self.at(output, row, count)],
                lambda bias: bias[span(output, count)],
                like_y,
            )
            T.buffer_store(self.ys, value, [self.at(output, row, count)])
        self._put_all(output, count)

    def _put_all(self, output: Expr, count: int) -> None:
        """Put some outputs of all rows into their tiles."""
        with T.serial(0, count) as i:  # in a row they would take LLVM seconds
            self._put(output + i)

    def _put(self, output: Expr) -> None:
        """Put one output of all rows into their tiles."""
        values = [self.ys[self.at(output, row, 1)] for row in range(self.m)]
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
        product = row_product(weight, count, simd)
        start, stop = product.share(thread, threads)
        with T.If(start < stop), T.Then():
            rows = _Rows.find(count, tiles, per_lead)
            _FewRows(product, rows, x, y, epilogue).run(start, stop)
