"""Into and out of lane tiles: ``[lead, rows, features]`` <-> ``[lead, tiles, features, LANES]``.

Both move squares of one tile's rows by one cache line of features, so that neither side is walked
with long strides.
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
from sparse_tvm.schedules.cpu.simd import LANES, tiles_of

_SQUARE = 16
"""Features moved at a time: one 64-byte cache line."""


def _over_squares(
    lead: Expr,
    tiles: Expr,
    rows: Expr,
    features: Expr,
    move: Callable[[Expr, Expr, Expr, Expr], None],
    clear: Callable[[Expr, Expr, Expr], None] | None = None,
) -> None:
    """Call ``move(lead, tile, lane, feature)`` for every element, in parallel over squares.

    ``clear(lead, tile, feature)`` comes first where a tile has more lanes than there are rows.
    """
    squares = (features + (_SQUARE - 1)) // _SQUARE
    with T.parallel(0, lead * tiles * squares) as job:
        square, index = scalar(job % squares), scalar(job // squares)
        at, tile = scalar(index // tiles), scalar(index % tiles)
        first = scalar(square * _SQUARE)
        width = scalar(tirx.min(_SQUARE, features - first))
        lanes = scalar(tirx.min(rows - tile * LANES, LANES))
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

        _over_squares(lead, tiles, rows, features, move, clear)
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

        _over_squares(lead, tiles, rows, features, move)
    return result["func"]
