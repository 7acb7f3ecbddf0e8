"""Attention by dot products of bf16: keys are read as they lie, features in pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.dot_matmul import MultiplyAdd
from sparse_tvm.schedules.cpu.lane_tiles import Expr, Registers, scalar, zero
from sparse_tvm.schedules.cpu.precision import LINES
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.x86.bf16_attention import Bf16Attention, Head, bf16_attention

_BLOCK = 8
"""Keys, or features of the result, that are summed up together."""


def dot_attention(problem: Bf16Attention, simd: Simd, multiply_add: MultiplyAdd) -> tirx.PrimFunc:
    """Build the kernel of :func:`bf16_attention` for a dot product of float32 sums."""
    return bf16_attention(problem, simd, partial(_DotHead, multiply_add))


class _DotHead(Head):
    def __init__(self, multiply_add: MultiplyAdd, problem: Bf16Attention, *others: Any) -> None:
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
    ) -> None:
        """Add, step by step, every row's word times every vector."""
        with T.serial(0, steps) as step:
            operands = [vector(i, step) for i in range(sums.vectors)]
            for row in range(sums.rows):
                weight = T.broadcast(word(row, step), self._simd.lanes)
                for i, operand in enumerate(operands):
                    sums.set(row, i, self._multiply_add(sums.get(row, i), operand, weight))

    def _score(self, lead: Expr, head: Expr, tile: Expr, width: int) -> None:
        """Scores of all keys for some tiles of queries."""
        problem, lanes = self._problem, self._simd.lanes
        vectors, depth = self._vectors(width), problem.head_size // 2
        queries = scalar(lead * problem.queries.per_lead + tile)
        per_block = LANES // _BLOCK
        with T.serial(0, problem.keys.per_lead * per_block) as block:
            keys = scalar(self._tile(lead, block // per_block))
            first = scalar(block % per_block * _BLOCK)
            sums = Registers(_BLOCK, len(vectors), self._simd)
            sums.fill(lambda row, vector: zero(self._simd))

            def key(row: int, step: Expr) -> Expr:
                return self._k.words[self._k.at(keys, head * depth + step) + first + row]

            def query(vector: int, step: Expr) -> Expr:
                column, lane = vectors[vector]
                return self._q.get(queries + column, head * depth + step, lane, lanes)

            self._add_products(sums, depth, key, query)
            for row in range(_BLOCK):
                for i, (column, lane) in enumerate(vectors):
                    at = self._score_at(block * _BLOCK + row, column) + lane
                    words = T.reinterpret(f"int32x{lanes}", sums.get(row, i))
                    T.buffer_store(self._scores, words, [T.ramp(at, 1, lanes)])

    def _value(self, lead: Expr, head: Expr, tile: Expr, width: int) -> None:
        """Weighted sums of the values, divided by the weights' sums."""
        lanes, vectors = self._simd.lanes, self._vectors(width)
        size = self._problem.value_size
        with T.serial(0, size // _BLOCK) as block:
            sums = Registers(_BLOCK, len(vectors), self._simd)
            sums.fill(lambda row, vector: zero(self._simd))
            with T.serial(0, self._pairs) as pair:

                def value(row: int, step: Expr) -> Expr:
                    return self._values[(pair * size + block * _BLOCK + row) * LINES + step]

                def weight(vector: int, step: Expr) -> Expr:
                    column, lane = vectors[vector]
                    at = self._weight_at(pair * LINES + step, column) + lane
                    return self._weights[T.ramp(at, 1, lanes)]

                self._add_products(sums, LINES, value, weight)
            for i, (column, lane) in enumerate(vectors):
                factor = self._inverse(column, lane)
                for row in range(_BLOCK):
                    place = self._place(lead, head, tile + column, block * _BLOCK + row, lane)
                    T.buffer_store(self._out, sums.get(row, i) * factor.get(0, 0), place)
