"""Epilogues beside products: vector arithmetic, for which a matrix unit leaves the time."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import Expr, local, scalar, scratch
from sparse_tvm.schedules.cpu.low_matmul import Rows
from sparse_tvm.schedules.cpu.simd import LANES
from sparse_tvm.schedules.x86.instructions import TILE_WORDS, TileUnit
from sparse_tvm.schedules.x86.units import TILE_ROWS


class TileResults:
    """Complete sums that wait for their epilogue, which runs beside the products that follow.

    The rows of a block row, of ``height`` tiles, lie below each other, for one tile of tokens after
    the other, of which there are up to ``width``. ``register(row, column)`` is where a tile of sums
    is until it is held.
    """

    def __init__(
        self,
        outputs: Rows,
        unit: TileUnit,
        height: int,
        width: int,
        register: Callable[[int, int], int],
    ) -> None:
        self._outputs, self._unit, self._height, self._width = outputs, unit, height, width
        self._register, self._rows = register, height * TILE_ROWS
        self._sums = scratch(self._rows * width * LANES, "int32")
        names = ("row", "live", "column", "columns", "first_row", "place", "first_tile")
        self._state = {name: local(1, "int32") for name in names}
        self._set(row=0, live=0, column=0, columns=0, first_row=0, place=0, first_tile=0)

    def _set(self, **values: Expr) -> None:
        for name, value in values.items():
            T.buffer_store(self._state[name], value, [0])

    def _get(self, name: str) -> Expr:
        return self._state[name][0]

    def hold(self, block_row: Expr, first_tile: Expr, place: Expr, width: int) -> None:
        """Take the sums of some tiles of tokens over from the registers."""
        self.flush()
        for row in range(self._height):
            for column in range(width):
                spot = T.int32((column * self._height + row) * TILE_WORDS)
                self._unit.store(self._register(row, column), self._sums, spot)
        first_row = scalar(block_row * self._rows)
        live = tirx.max(tirx.min(self._rows, self._outputs.problem.n_out - first_row), 0)
        self._set(first_row=first_row, live=live, row=T.int32(0), column=T.int32(0))
        self._set(columns=T.int32(width), place=place, first_tile=first_tile)

    def share(self, steps: Expr) -> Expr:
        """How many rows go beside each of so many products, for all to be finished by then."""
        return scalar((self._rows * self._width // 2 + steps - 1) // steps * 2)

    def finish(self, count: Expr) -> None:
        """Scale, epilogue and store of a tile's next rows, up to ``count``, an even number."""
        outputs, precision = self._outputs, self._outputs.problem.precision
        lanes, output = outputs.simd.lanes, outputs.output
        column, row, first_row = (scalar(self._get(n)) for n in ("column", "row", "first_row"))
        left = tirx.Select(column < self._get("columns"), self._get("live") - row, 0)
        count = scalar(tirx.min(count, left))
        place = scalar(self._get("place") + column)
        tile = scalar(self._get("first_tile") + place)

        def load(r: Expr, first: int) -> Expr:
            at = (column * self._rows + r) * LANES + first
            value = self._sums[T.ramp(at, 1, lanes)]
            return value if precision.scaled else T.reinterpret(f"float32x{lanes}", value)

        # A loop, whose end LLVM cannot foresee: unrolled, an epilogue exceeds the cache of code.
        for first in range(0, LANES, lanes):
            if not output.in_pairs:
                with output.peak(place, first, lanes) as peak, T.serial(0, count) as i:
                    r = scalar(row + i)
                    outputs.finish(load(r, first), first_row + r, tile, first, peak)
                continue
            with T.serial(0, count // 2) as pair:
                r = scalar(row + pair * 2)
                low, high = load(r, first), load(r + 1, first)
                outputs.finish_pair(low, high, first_row + r, tile, first)
            if self._outputs.problem.n_out % 2:
                with T.If(count % 2 == 1), T.Then():
                    r = scalar(row + count - 1)
                    outputs.finish_pair(load(r, first), None, first_row + r, tile, first)
        done = scalar(T.Cast("int32", row + count >= self._get("live")))
        self._set(row=(row + count) * (1 - done), column=column + done)

    def flush(self) -> None:
        """Finish all that waits."""
        with T.serial(0, scalar(self._get("columns") - self._get("column"))):
            self.finish(T.int32(self._rows))
