"""Matrices of a few vectors turned over in registers, of four lines by shuffles within quads."""

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


def parted(vectors: Sequence[Expr], count: int) -> list[Expr]:
    """Of vectors that hold elements of ``count`` rows by turns, a power of two, each row's."""
    vectors, lanes = list(vectors), lanes_of(vectors[0])
    for _ in range(count.bit_length() - 1):
        pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
        vectors = [_shuffled(p, range(odd, 2 * lanes, 2)) for odd in (0, 1) for p in pairs]
    return vectors


def interleaved(rows: Sequence[Expr]) -> list[Expr]:
    """Vectors of the elements of rows, a power of two, by turns."""
    vectors, lanes = list(rows), lanes_of(rows[0])
    by_turns = [i // 2 + i % 2 * lanes for i in range(2 * lanes)]
    for _ in range(len(rows).bit_length() - 1):
        pairs = zip(vectors[: len(rows) // 2], vectors[len(rows) // 2 :], strict=True)
        vectors = [_shuffled(p, h) for p in pairs for h in (by_turns[:lanes], by_turns[lanes:])]
    return vectors


def _picked(pair: Sequence[Expr], places: Sequence[int]) -> Expr:
    """In each quad the elements at these places, which from 4 on are the second vector's."""
    lanes = lanes_of(pair[0])
    chosen = [
        quad + place if place < QUAD else lanes + quad + place - QUAD
        for quad in range(0, lanes, QUAD)
        for place in places
    ]
    return _shuffled(pair, chosen)


def _shuffled(pair: Sequence[Expr], chosen: Sequence[int]) -> Expr:
    """A vector of the elements at these places of two."""
    lanes = len(chosen)
    kept = local(lanes)
    T.buffer_store(kept, tirx.Shuffle(pair, list(chosen)), [span(0, lanes)])
    return kept[span(0, lanes)]
