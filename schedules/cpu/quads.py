"""Squares of four by four elements, turned over in registers by shuffles within quads."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import Expr, local, span
from sparse_tvm.schedules.cpu.vector_math import lanes_of

QUAD = 4
"""Elements of 128 bits, within which every CPU's shuffles are fastest."""


def joined(parts: Sequence[Expr]) -> Expr:
    """Vectors, one after the other in one."""
    return tirx.Shuffle(parts, list(range(sum(map(lanes_of, parts)))))


def turned(lines: Sequence[Expr]) -> list[Expr]:
    """Turn each quad of four vectors over: of result ``i``, quad ``q`` has what is at ``4 q + i``.

    It has one element of each of the four, in their order.
    """
    turned_over = []
    for first in (0, 2):
        pairs = [
            _picked(lines[i : i + 2], (first, QUAD + first, first + 1, QUAD + first + 1))
            for i in (0, 2)
        ]
        turned_over += [_picked(pairs, (0, 1, 4, 5)), _picked(pairs, (2, 3, 6, 7))]
    return turned_over


def _picked(pair: Sequence[Expr], places: Sequence[int]) -> Expr:
    """In each quad the elements at these places, which from 4 on are the second vector's."""
    lanes = lanes_of(pair[0])
    chosen = [
        quad + place if place < QUAD else lanes + quad + place - QUAD
        for quad in range(0, lanes, QUAD)
        for place in places
    ]
    kept = local(lanes)
    T.buffer_store(kept, tirx.Shuffle(pair, chosen), [span(0, lanes)])
    return kept[span(0, lanes)]
