"""Into and out of lane tiles: ``[lead, rows, features]`` <-> ``[lead, tiles, features, LANES]``.

Both move squares of one tile's rows by one cache line of features, so that neither side is walked
with long strides. Whole squares are turned over in registers, four by four, and every cache line is
written at once: rows that are a multiple of 4 KiB apart share few places in the first cache.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import (
    Expr,
    argument,
    broadcast,
    prim_func,
    scalar,
    span,
    symbol,
)
from sparse_tvm.schedules.cpu.quads import QUAD, joined, turned
from sparse_tvm.schedules.cpu.simd import LANES, tiles_of

_SQUARE = 16
"""Features moved at a time: one 64-byte cache line."""

_FOURTHS = [range(i, _SQUARE, QUAD) for i in range(QUAD)]
"""Which lines of a square are read side by side, to be turned over."""


def _over_squares(
    lead: Expr,
    tiles: Expr,
    rows: Expr,
    features: Expr,
    move: Callable[[Expr, Expr, Expr, Expr], None],
    move_four: Callable[[Expr, Expr, Expr, Expr], None],
    clear: Callable[[Expr, Expr, Expr], None] | None = None,
) -> None:
    """Move every element, in parallel over squares.

    Where a square is whole, ``move_four(lead, tile, feature, i)`` writes four lines of it, from the
    ``i``-th on; its first feature is given. Else ``move(lead, tile, lane, feature)`` does one, and
    ``clear(lead, tile, feature)`` comes first where a tile has more lanes than there are rows.
    """
    squares = (features + (_SQUARE - 1)) // _SQUARE
    with T.parallel(0, lead * tiles * squares) as job:
        square, index = scalar(job % squares), scalar(job // squares)
        at, tile = scalar(index // tiles), scalar(index % tiles)
        first = scalar(square * _SQUARE)
        width = scalar(tirx.min(_SQUARE, features - first))
        lanes = scalar(tirx.min(rows - tile * LANES, LANES))
        with T.If(tirx.all(lanes == LANES, width == _SQUARE)):
            with T.Then(), T.serial(0, _SQUARE // QUAD) as i:
                move_four(at, tile, first, scalar(i * QUAD))
            with T.Else():
                if clear is not None:
                    with T.If(lanes < LANES), T.Then(), T.serial(0, width) as f:
                        clear(at, tile, first + f)
                with T.serial(0, lanes) as lane, T.serial(0, width) as f:
                    move(at, tile, lane, first + f)


def pack(lead: Expr, rows: Expr, features: Expr) -> tirx.PrimFunc:
    """Build the kernel x ``[lead, rows, features]`` -> y lane-tiled; padding lanes are zero."""
    tiles = tiles_of(rows)
    with prim_func() as result:
        x = argument("x", (lead, rows, features))
        y = argument("y", (lead, tiles, features, LANES))

        def clear(at: Expr, tile: Expr, feature: Expr) -> None:
            T.buffer_store(y, broadcast(T.float32(0), LANES), [at, tile, feature, span(0, LANES)])

        def move(at: Expr, tile: Expr, lane: Expr, feature: Expr) -> None:
            row = tile * LANES + lane
            T.buffer_store(y, x[at, row, feature], [at, tile, feature, lane])

        def move_four(at: Expr, tile: Expr, first: Expr, four: Expr) -> None:
            lines = [
                joined([x[at, tile * LANES + row, span(first + four, QUAD)] for row in some])
                for some in _FOURTHS
            ]
            for i, line in enumerate(turned(lines)):
                T.buffer_store(y, line, [at, tile, first + four + i, span(0, LANES)])

        _over_squares(lead, tiles, rows, features, move, move_four, clear)
    return result["func"]


def unpack(lead: Expr, rows: Expr, features: Expr) -> tirx.PrimFunc:
    """Build the kernel x lane-tiled -> y ``[lead, rows, features]``."""
    tiles = tiles_of(rows) if isinstance(rows, int) else symbol("tiles")
    with prim_func() as result:
        x = argument("x", (lead, tiles, features, LANES))
        y = argument("y", (lead, rows, features))

        def move(at: Expr, tile: Expr, lane: Expr, feature: Expr) -> None:
            row = tile * LANES + lane
            T.buffer_store(y, x[at, tile, feature, lane], [at, row, feature])

        def move_four(at: Expr, tile: Expr, first: Expr, four: Expr) -> None:
            lines = [
                joined([x[at, tile, first + feature, span(four, QUAD)] for feature in some])
                for some in _FOURTHS
            ]
            for i, line in enumerate(turned(lines)):
                T.buffer_store(y, line, [at, tile * LANES + four + i, span(first, _SQUARE)])

        _over_squares(lead, tiles, rows, features, move, move_four)
    return result["func"]
