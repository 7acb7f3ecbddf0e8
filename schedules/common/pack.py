"""Into and out of lane tiles: ``[lead, rows, features]`` <-> ``[lead, tiles, features, lanes]``.

Both move squares of ``lanes`` x one cache line of features, so that neither side is walked with a
stride longer than a tile.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.common.lane_tiles import (
    Expr,
    LaneTiles,
    Simd,
    argument,
    prim_func,
)

SQUARE = 16
"""Features moved at a time: one 64-byte cache line."""


def _over_squares(tiles: LaneTiles, features: int, move) -> None:  # type: ignore[no-untyped-def]
    """Call ``move(lead, tile, lane, feature)`` for every element, in parallel over squares."""
    full, rest = divmod(features, SQUARE)
    squares = full + (rest > 0)
    with T.parallel(0, tiles.count * squares) as job:
        tile_index, square = job // squares, job % squares
        lead, tile = tile_index // tiles.per_lead, tile_index % tiles.per_lead

        def body(width: int) -> None:
            with T.serial(0, tiles.lanes) as lane, T.serial(0, width) as f:
                move(lead, tile, lane, square * SQUARE + f)

        if rest and full:
            with T.If(square < full):
                with T.Then():
                    body(SQUARE)
                with T.Else():
                    body(rest)
        else:
            body(SQUARE if full else rest)


def pack(tiles: LaneTiles, features: int, simd: Simd) -> tirx.PrimFunc:
    """Build the kernel x ``[lead, rows, features]`` -> y lane-tiled; padding lanes are zero."""
    with prim_func() as (_, result):
        x = argument("x", (tiles.lead, tiles.rows, features))
        y = argument("y", tiles.shape(features))

        def move(lead: Expr, tile: Expr, lane: Expr, feature: Expr) -> None:
            row = tile * tiles.lanes + lane
            value = x[lead, row, feature]
            if tiles.rows % tiles.lanes:
                value = T.if_then_else(row < tiles.rows, value, T.float32(0))
            T.buffer_store(y, value, [lead, tile, feature, lane])

        _over_squares(tiles, features, move)
    return result["func"]


def unpack(tiles: LaneTiles, features: int, simd: Simd) -> tirx.PrimFunc:
    """Build the kernel x lane-tiled -> y ``[lead, rows, features]``."""
    with prim_func() as (_, result):
        x = argument("x", tiles.shape(features))
        y = argument("y", (tiles.lead, tiles.rows, features))

        def move(lead: Expr, tile: Expr, lane: Expr, feature: Expr) -> None:
            row = tile * tiles.lanes + lane
            if tiles.rows % tiles.lanes:
                with T.If(row < tiles.rows), T.Then():
                    T.buffer_store(y, x[lead, tile, feature, lane], [lead, row, feature])
            else:
                T.buffer_store(y, x[lead, tile, feature, lane], [lead, row, feature])

        _over_squares(tiles, features, move)
    return result["func"]
