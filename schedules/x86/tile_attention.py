"""Attention on a matrix unit: keys and values are tiles of weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.bf16_attention import Bf16Attention, Head, Span, bf16_attention
from sparse_tvm.schedules.cpu.lane_tiles import Buffer, Expr, local, scalar
from sparse_tvm.schedules.cpu.precision import BF16, HEAD_STEP, LINES
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.x86.instructions import TILE_WORDS, TileUnit


def tile_attention(problem: Bf16Attention, simd: Simd, unit: TileUnit) -> tirx.PrimFunc:
    """Build the kernel of :func:`bf16_attention` for a matrix unit."""
    return bf16_attention(problem, simd, partial(_TileHead, unit))


class _TileHead(Head):
    def __init__(self, unit: TileUnit, problem: Bf16Attention, *others: Any) -> None:
        super().__init__(problem, *others)
        self._unit = unit
        self._depth = problem.head_size // HEAD_STEP  # tiles of a head's features
        self._keys = self._memory(self._pairs * 2 * self._depth * TILE_WORDS)

    def begin(self) -> None:
        self._unit.configure()

    def end(self) -> None:
        self._unit.release()

    def _pack_keys(self, lead: Expr, head: Expr, pair: Expr) -> None:
        """Transpose two tiles of keys: rows of keys, columns of features."""
        for side in range(2):
            tile = scalar(self._tile(lead, pair * 2 + side))
            for depth in range(self._depth):
                line = scalar((head * self._depth + depth) * LINES)
                rows = [self._k.get(tile, line + i, 0, LANES) for i in range(LINES)]
                at = ((pair * 2 + side) * self._depth + depth) * TILE_WORDS
                _store_transposed(rows, self._keys, at)

    def _products(
        self,
        width: int,
        steps: Expr,
        a: Callable[[Expr, int], tuple[Buffer, Expr]],
        b: Callable[[Expr, int], tuple[Buffer, Expr]],
        into: Callable[[int, int], tuple[Buffer, Expr]],
    ) -> None:
        """Sums over ``steps`` of two tiles ``a`` times ``width`` tiles ``b``."""
        unit = self._unit
        for number in range(2 * self.width):
            unit.zero(number)
        with T.serial(0, steps) as step:
            for row in range(2):
                unit.load(4 + row, *a(step, row))
            for column in range(width):
                unit.load(6 + column, *b(step, column))
                for row in range(2):
                    unit.multiply_add(BF16, row * self.width + column, 4 + row, 6 + column)
        for row in range(2):
            for column in range(width):
                unit.store(row * self.width + column, *into(row, column))

    def _score(self, lead: Expr, head: Expr, tile: Expr, width: int, span: Span) -> None:
        """Scores of a span of keys for some tiles of queries."""
        per_lead = self._problem.queries.per_lead
        with T.serial(0, span[1] - span[0]) as i:
            pair = scalar(span[0] + i)

            def a(step: Expr, row: int) -> tuple[Buffer, Expr]:
                return self._keys, ((pair * 2 + row) * self._depth + step) * TILE_WORDS

            def b(step: Expr, column: int) -> tuple[Buffer, Expr]:
                line = (head * self._depth + step) * LINES
                return self._q.words, self._q.at(lead * per_lead + tile + column, line)

            def into(row: int, column: int) -> tuple[Buffer, Expr]:
                return self._scores, self._score_at((pair * 2 + row) * LANES, column)

            self._products(width, self._depth, a, b, into)

    def _value(self, lead: Expr, head: Expr, tile: Expr, width: int, span: Span) -> None:
        """Weighted sums of the values, divided by the weights' sums."""
        lanes = self._simd.lanes
        sums = local(2 * self.width * TILE_WORDS, "int32")
        sums = T.decl_buffer((2 * self.width * TILE_WORDS,), "int32", data=sums.data)
        with T.serial(0, self._height // 2) as block:

            def a(step: Expr, row: int) -> tuple[Buffer, Expr]:
                pair = span[0] + step
                return self._values, (pair * self._height + block * 2 + row) * TILE_WORDS

            def b(step: Expr, column: int) -> tuple[Buffer, Expr]:
                return self._weights, self._weight_at((span[0] + step) * LINES, column)

            def into(row: int, column: int) -> tuple[Buffer, Expr]:
                return sums, (row * self.width + column) * TILE_WORDS

            self._products(width, span[1] - span[0], a, b, into)
            for column in range(width):
                for part in range(self._simd.per_tile):
                    first = part * lanes
                    factor = self._inverse(column, first)
                    for row in range(2):
                        with T.serial(0, LANES) as r:
                            at = (row * self.width + column) * TILE_WORDS + r * LANES + first
                            value = T.reinterpret(f"float32x{lanes}", sums[T.ramp(at, 1, lanes)])
                            feature = (block * 2 + row) * LANES + r
                            place = self._place(lead, head, tile + column, feature, first)
                            T.buffer_store(self._out, value * factor.get(0, 0), place)


def _store_transposed(rows: list[Expr], out: Buffer, at: Expr) -> None:
    """Store a square of words with its rows and columns exchanged.

    In four rounds, rows ``distance`` apart exchange the halves of blocks of twice as many columns.
    """
    count = len(rows)
    current = local(count * count, "int32")

    def row_at(i: int) -> Expr:
        return T.ramp(i * count, 1, count)

    for i, row in enumerate(rows):
        T.buffer_store(current, row, [row_at(i)])
    distance = count // 2
    while distance:
        for i in range(count):
            if i & distance:
                continue
            pair = [current[row_at(i)], current[row_at(i + distance)]]
            low = [j if not j & distance else count + j - distance for j in range(count)]
            high = [j + distance if not j & distance else count + j for j in range(count)]
            mixed = local(2 * count, "int32")
            for half, indices in enumerate((low, high)):
                shuffled = tirx.Shuffle(pair, [tirx.const(j, "int32") for j in indices])
                T.buffer_store(mixed, shuffled, [row_at(half)])
            T.buffer_store(current, mixed[row_at(0)], [row_at(i)])
            T.buffer_store(current, mixed[row_at(1)], [row_at(i + distance)])
        distance //= 2
    for i in range(count):
        T.buffer_store(out, current[row_at(i)], [T.ramp(at + i * count, 1, count)])
