"""How a block of W multiplies lines of X, in words: by dot products, or by products of pairs.

A dot product takes a word of W and a vector of tokens' words. A product of pairs takes two rows of
W and two tokens, two lines deep, to their four sums. For that, lines of X are first woven in pairs,
each token's two words beside each other, in scratch memory that all rows then read.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    TileVectors,
    loaded_together,
    span,
)
from sparse_tvm.schedules.cpu.low_precision import Lines
from sparse_tvm.schedules.cpu.simd import LANES, Simd

MultiplyAdd = Callable[[Expr, Expr, Expr], Expr]
"""A dot product instruction: sums, words of x and words of weights to new sums. One of pairs takes
words ``[token, line]`` and ``[row, line]``, and sums ``[row, token]``, two of each."""

WordsAt = Callable[[Expr], Expr]
"""A block's words at an index, or at a vector of indices."""


class DotProducts:
    """Products of one line of X with the words of a block's rows."""

    depth = 1
    """Lines that a block has."""

    def __init__(self, x: Lines, simd: Simd, multiply_add: MultiplyAdd) -> None:
        self._x, self._simd, self._multiply_add = x, simd, multiply_add

    def open(self, limit: int) -> None:
        """Take memory for up to ``limit`` tiles, once on each thread."""

    def begin(self, vectors: TileVectors) -> None:
        """Before a group of tiles meets its rows."""

    def rows(self, live: int) -> int:
        """Rows of registers for so many rows of W."""
        return live

    def add(
        self, sums: Registers, live: int, vectors: TileVectors, line: Expr, words: WordsAt
    ) -> None:
        """Add a block's products to the sums of its rows."""
        operands = []
        for vector in range(vectors.count):
            tile, lanes = vectors.at(vector)
            operands.append(self._x.get(tile, line, lanes.base, self._simd.lanes))
        of_rows = [words(row) for row in range(live)]
        if self._simd.by_element:
            of_rows = loaded_together(of_rows, self._simd)
        for row, word in enumerate(of_rows):
            w = T.broadcast(word, self._simd.lanes)
            for vector, operand in enumerate(operands):
                total = self._multiply_add(sums.get(row, vector), operand, w)
                sums.set(row, vector, total)

    def total(self, sums: Registers, row: int, vector: int) -> Expr:
        """The sums of a row for a vector of tokens."""
        return sums.get(row, vector)


class PairProducts(DotProducts):
    """Products of two lines of X, in vectors of four words, with pairs of a block's rows.

    The registers of rows ``2 p`` and ``2 p + 1`` hold the sums of both rows, those of a vector's
    first two tokens and those of its last two.
    """

    depth = 2
    _woven: Buffer

    def open(self, limit: int) -> None:
        """Memory for woven lines."""
        self._steps = -(-self._x.features // (self._x.precision.unit * self.depth))
        self._woven = T.alloc_buffer((limit * self._steps * LANES * self.depth,), "int32")

    def begin(self, vectors: TileVectors) -> None:
        """Weave the lines of a group."""
        lanes = self._simd.lanes
        with T.serial(0, self._steps) as step:
            for vector in range(vectors.count):
                tile, of_tokens = vectors.at(vector)
                pair = [
                    self._x.get(tile, step * self.depth + line, of_tokens.base, lanes)
                    for line in range(self.depth)
                ]
                for half, order in enumerate(((0, 4, 1, 5), (2, 6, 3, 7))):
                    woven = tirx.Shuffle(pair, [tirx.const(i, "int32") for i in order])
                    T.buffer_store(self._woven, woven, [self._at(vectors, vector, step, half)])

    def _at(self, vectors: TileVectors, vector: int, step: Expr, half: int) -> Expr:
        """Where two tokens of a vector are."""
        lanes = self._simd.lanes
        place, part = divmod(vector, vectors.used)
        line = place * self._steps + step
        return T.ramp(line * (LANES * self.depth) + (part * 2 + half) * lanes, 1, lanes)

    def rows(self, live: int) -> int:
        """An even number."""
        return live + live % 2

    def add(
        self, sums: Registers, live: int, vectors: TileVectors, line: Expr, words: WordsAt
    ) -> None:
        """Two rows by two tokens at a time."""
        lanes = self._simd.lanes
        pairs = [words(span(first * self.depth, lanes)) for first in range(0, live, 2)]
        for vector in range(vectors.count):
            for half in range(2):
                tokens = self._woven[self._at(vectors, vector, line, half)]
                for i, pair in enumerate(pairs):
                    row = 2 * i + half
                    total = self._multiply_add(sums.get(row, vector), tokens, pair)
                    sums.set(row, vector, total)

    def total(self, sums: Registers, row: int, vector: int) -> Expr:
        """One half of two registers."""
        first = row % 2 * 2
        order = [first, first + 1, first + 4, first + 5]
        halves = [sums.get(row // 2 * 2 + half, vector) for half in range(2)]
        return tirx.Shuffle(halves, [tirx.const(i, "int32") for i in order])
