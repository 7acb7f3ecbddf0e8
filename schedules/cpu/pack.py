"""Into and out of lane tiles: ``[lead, rows, features]`` <-> ``[lead, tiles, features, LANES]``.

Both move squares of one tile's rows by one cache line of features, so that neither side is walked
with long strides.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import Expr, argument, prim_func, scalar, symbol
from sparse_tvm.schedules.cpu.simd import LANES, tiles_of

_SQUARE = 16
"""Features moved at a time: one 64-byte cache line."""


def _over_squares(
    lead: Expr, tiles: Expr, features: Expr, move: Callable[[Expr, Expr, Expr, Expr], None]
) -> None:
    """Call ``move(lead, tile, lane, feature)`` for every element, in parallel over squares."""
    squares = (features + (_SQUARE - 1)) // _SQUARE
    with T.parallel(0, lead * tiles * squares) as job:
        square, index = scalar(job % squares), scalar(job // squares)
        at, tile = scalar(index // tiles), scalar(index % tiles)
        width = tirx.min(_SQUARE, features - square * _SQUARE)
        with T.serial(0, LANES) as lane, T.serial(0, width) as f:
            move(at, tile, lane, square * _SQUARE + f)


def pack(lead: Expr, rows: Expr, features: Expr) -> tirx.PrimFunc:
    """Build the kernel x ``[lead, rows, features]`` -> y lane-tiled; padding lanes are zero."""
    tiles = tiles_of(rows)
    with prim_func() as result:
        x = argument("x", (lead, rows, features))
        y = argument("y", (lead, tiles, features, LANES))

        def move(at: Expr, tile: Expr, lane: Expr, feature: Expr) -> None:
            row = tile * LANES + lane
            value = T.if_then_else(row < rows, x[at, row, feature], T.float32(0))
            T.buffer_store(y, value, [at, tile, feature, lane])

        _over_squares(lead, tiles, features, move)
    return result["func"]


def unpack(lead: Expr, rows: Expr, features: Expr) -> tirx.PrimFunc:
    """Build the kernel x lane-tiled -> y ``[lead, rows, features]``."""
    tiles = tiles_of(rows) if isinstance(rows, int) else symbol("tiles")
    with prim_func() as result:
        x = argument("x", (lead, tiles, features, LANES))
        y = argument("y", (lead, rows, features))

        def move(at: Expr, tile: Expr, lane: Expr, feature: Expr) -> None:
            row = tile * LANES + lane
            with T.If(row < rows), T.Then():
                T.buffer_store(y, x[at, tile, feature, lane], [at, row, feature])

        _over_squares(lead, tiles, features, move)
    return result["func"]
