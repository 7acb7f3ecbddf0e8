"""Attention by dot products of bf16: keys are read as they lie, features in pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.attention_blocks import (
    MOST_DOT_TILES,
    Blocks,
    check_blocks,
    usual_dot_blocks,
)
from sparse_tvm.schedules.cpu.bf16_attention import Bf16Attention, Head, Span, bf16_attention
from sparse_tvm.schedules.cpu.dot_products import MultiplyAdd
from sparse_tvm.schedules.cpu.lane_tiles import Expr, Registers, loaded_together, scalar, zero
from sparse_tvm.schedules.cpu.precision import LINES
from sparse_tvm.schedules.cpu.simd import LANES, Simd


def dot_attention(
    problem: Bf16Attention, simd: Simd, multiply_add: MultiplyAdd, blocks: Blocks | None = None
) -> tirx.PrimFunc:
    """Build the kernel of :func:`bf16_attention` for a dot product of float32 sums.

    ``blocks`` are keys, or features of the result, and tiles of queries that are summed up
    together; None for as many as usual.

    Raises
    ------
    ValueError
        When the target has too few registers for the blocks, or they do not divide a tile.
    """
    if blocks is None:
        blocks = usual_dot_blocks(simd)
    else:
        check_blocks(blocks, simd)
        if LANES % blocks[0] or blocks[1] > MOST_DOT_TILES:
            raise ValueError(f"blocks of {blocks[0]} keys x {blocks[1]} tiles do not divide tiles")
    return bf16_attention(problem, simd, partial(_DotHead, multiply_add, blocks))


class _DotHead(Head):
    def __init__(
        self, multiply_add: MultiplyAdd, blocks: Blocks, problem: Bf16Attention, *others: Any
    ) -> None:
        self._block, self.width = blocks
        super().__init__(problem, *others)
        self._multiply_add = multiply_add

    def begin(self) -> None:
        """Nothing to do."""

    def end(self) -> None:
        """Nothing to do."""

    def _pack_keys(self, lead: Expr, head: Expr, pair: Expr) -> None:
        """Nothing to do: a word is broadcast from where it lies."""

    def _vectors(self, width: int) -> list[tuple[int, int]]:
        """Vectors of some tiles of queries: the tile of each, and its first query there."""
        lanes = self._simd.lanes
        return [divmod(vector * lanes, LANES) for vector in range(width * self._simd.per_tile)]

    def _add_products(
        self,
        sums: Registers,
        steps: Expr,
        word: Callable[[int, Expr], Expr],
        vector: Callable[[int, Expr], Expr],
        together: int = 1,
    ) -> None:
        """Add, some steps together, every row's word times every vector."""
        rows, simd = range(sums.rows), self._simd
        with T.serial(0, steps // together) as i:
            places = [i * together + step for step in range(together)]
            words = [word(row, place) for row in rows for place in places]
            if simd.by_element:
                words = loaded_together(words, simd)
            for step, place in enumerate(places):
                operands = [vector(i, place) for i in range(sums.vectors)]
                for row in rows:
                    weight = T.broadcast(words[row * together + step], simd.lanes)
                    for i, operand in enumerate(operands):
                        sums.set(row, i, self._multiply_add(sums.get(row, i), operand, weight))

    def _score(self, lead: Expr, head: Expr, tile: Expr, width: int, span: Span) -> None:
        """Scores of a span of keys for some tiles of queries."""
        problem, lanes = self._problem, self._simd.lanes
        vectors, depth = self._vectors(width), problem.head_size // 2
        queries = scalar(lead * problem.queries.per_lead + tile)
        per_block = LANES // self._block
        first_block = span[0] * (2 * per_block)
        last_block = tirx.min(span[1] * 2, problem.keys.per_lead) * per_block
        with T.serial(0, last_block - first_block) as i:
            block = scalar(first_block + i)
            keys = scalar(self._tile(lead, block // per_block))
            first = scalar(block % per_block * self._block)
            sums = Registers(self._block, len(vectors), self._simd)
            sums.fill(lambda row, vector: zero(self._simd))

            def key(row: int, step: Expr) -> Expr:
                return self._k.words[self._k.at(keys, head * depth + step) + first + row]

            def query(vector: int, step: Expr) -> Expr:
                column, lane = vectors[vector]
                return self._q.get(queries + column, head * depth + step, lane, lanes)

            self._add_products(sums, depth, key, query)
            for row in range(self._block):
                for i, (column, lane) in enumerate(vectors):
                    at = self._score_at(block * self._block + row, column) + lane
                    words = T.reinterpret(f"int32x{lanes}", sums.get(row, i))
                    T.buffer_store(self._scores, words, [T.ramp(at, 1, lanes)])

    def _value(self, lead: Expr, head: Expr, tile: Expr, width: int, span: Span) -> None:
        """Weighted sums of the values, divided by the weights' sums."""
        lanes, vectors = self._simd.lanes, self._vectors(width)
        size = self._problem.value_size
        with T.serial(0, size // self._block) as block:
            sums = Registers(self._block, len(vectors), self._simd)
            sums.fill(lambda row, vector: zero(self._simd))
            with T.serial(0, span[1] - span[0]) as i:
                pair = span[0] + i

                def value(row: int, step: Expr) -> Expr:
                    return self._values[(pair * size + block * self._block + row) * LINES + step]

                def weight(vector: int, step: Expr) -> Expr:
                    column, lane = vectors[vector]
                    at = self._weight_at(pair * LINES + step, column) + lane
                    return self._weights[T.ramp(at, 1, lanes)]

                # A feature's words lie together, of which one load brings a vector's elements.
                together = lanes if self._simd.by_element else 1
                self._add_products(sums, LINES, value, weight, together)
            for i, (column, lane) in enumerate(vectors):
                factor = self._inverse(column, lane)
                for row in range(self._block):
                    place = self._place(lead, head, tile + column, block * self._block + row, lane)
                    T.buffer_store(self._out, sums.get(row, i) * factor.get(0, 0), place)
