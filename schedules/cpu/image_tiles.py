"""Images in planes to tokens in lane tiles, and back: pixels stay in vectors, nothing is turned.

To both layouts a channel is stripes of pixels: rows in planes, sixteen tokens in tiles. A vector
of one lies in one stripe of the other, or in the end of one and the start of the next, whose
elements are a fixed distance from where they would be if there were nothing between stripes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Tiles,
    argument,
    prim_func,
    ramp,
    scalar,
    splat,
    zero,
)
from sparse_tvm.schedules.cpu.plane_code import Extents, clear_border, declare_sizes, flat, one_of
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import LANES, Simd, tiles_of

_TILES, _TILE_CHANNELS = 4, 32
"""Tiles of a job, whose pixels are neighbours, and the most channels of them."""

_PLANES = 8
"""The most planes that a job writes side by side: it reads them from neighbouring lines."""


def image_to_tiles(
    batch: Expr, channels: int, source: Planes, sizes: Sequence[Any], simd: Simd
) -> tirx.PrimFunc:
    """Build the kernel x ``[batch, channels, source.size]`` -> y in tiles, of as many features.

    Pixels are tokens, row by row; lanes behind the last are zero. ``sizes`` are the symbols that
    extents depend on: arguments between x and y.
    """
    pixels = source.height * source.width
    tiles = Tiles(batch, tiles_of(pixels))
    abreast = _divisor(channels, _TILE_CHANNELS)
    with prim_func() as result:
        x = argument("x", (batch, channels, source.size))
        declare_sizes(sizes)
        y = flat(argument("y", tiles.shape(channels)))
        x = flat(x)
        blocks = channels // abreast
        groups = (tiles.per_lead + (_TILES - 1)) // _TILES
        with T.parallel(0, batch * groups * blocks) as job:
            here, per_lead = Extents(source), scalar(tiles.per_lead)
            count = scalar(pixels)
            first = scalar(job % blocks * abreast)
            image = scalar(job // blocks // scalar(groups))
            group = scalar(job // blocks % scalar(groups))
            gap = scalar(here.pitch - here.width)
            begin = scalar((image * channels + first) * here.size + here.first)
            stripes = _Stripes(x, here.width, gap, simd)
            with T.serial(0, scalar(tirx.min(_TILES, per_lead - group * _TILES))) as i:
                tile = scalar(group * _TILES + i)
                for lane in range(0, LANES, simd.lanes):
                    pixel = scalar(tile * LANES + lane)
                    column = scalar(pixel % here.width)
                    at = scalar(begin + pixel // here.width * here.pitch + column)
                    to = scalar(((image * per_lead + tile) * channels + first) * LANES + lane)

                    def move(read: Callable[[Expr], Expr], to: Expr = to) -> None:
                        with T.serial(0, abreast) as channel:
                            value = read(channel * here.size)
                            T.buffer_store(y, value, [ramp(to + channel * LANES, simd)])

                    stripes.read(pixel, count, column, at, move)
    return result["func"]


def tiles_to_image(
    batch: Expr, channels: int, target: Planes, sizes: Sequence[Any], simd: Simd
) -> tirx.PrimFunc:
    """Build the kernel x in tiles, of so many features -> y ``[batch, channels, target.size]``.

    Tokens are pixels, row by row; whatever surrounds the rows is zero. ``sizes`` are the symbols
    that extents depend on: arguments between x and y.
    """
    tiles = Tiles(batch, tiles_of(target.height * target.width))
    abreast = _divisor(channels, _PLANES)
    with prim_func() as result:
        x = argument("x", tiles.shape(channels))
        declare_sizes(sizes)
        y = flat(argument("y", (batch, channels, target.size)))
        x = flat(x)
        blocks = channels // abreast
        with T.parallel(0, batch * blocks) as job:
            there, per_lead = Extents(target), scalar(tiles.per_lead)
            lanes = scalar(per_lead * LANES)
            first, image = scalar(job % blocks * abreast), scalar(job // blocks)
            plane = scalar((image * channels + first) * there.size)
            vectors = scalar((there.pitch + (simd.lanes - 1)) // simd.lanes)
            written = scalar((there.height - 1) * there.pitch // simd.lanes * simd.lanes)
            stripes = _Stripes(x, LANES, (channels - 1) * LANES, simd)
            with T.serial(0, abreast) as channel:
                clear_border(y, plane + channel * there.size, there, written, simd)
            with T.serial(0, there.height) as row, T.serial(0, vectors) as i:
                left = scalar(there.width - i * simd.lanes)
                pixel = scalar(row * there.width + i * simd.lanes)
                lane, tile = scalar(pixel % LANES), scalar(pixel // LANES)
                at = scalar(((image * per_lead + tile) * channels + first) * LANES + lane)
                to = scalar(plane + there.first + row * there.pitch + i * simd.lanes)

                def move(read: Callable[[Expr], Expr], to: Expr = to, left: Expr = left) -> None:
                    with T.serial(0, abreast) as channel:
                        inside = _numbers(simd) < splat(left, simd)
                        value = tirx.Select(inside, read(channel * LANES), zero(simd))
                        T.buffer_store(y, value, [ramp(to + channel * there.size, simd)])

                stripes.read(pixel, lanes, lane, at, move)
    return result["func"]


def _divisor(channels: int, most: int) -> int:
    return next(n for n in range(min(channels, most), 0, -1) if channels % n == 0)


def _numbers(simd: Simd) -> Expr:
    """The number of each lane."""
    return T.ramp(tirx.const(0, "int32"), 1, simd.lanes)


class _Stripes:
    """Pixels of channels that lie alike, in stripes of ``width`` with ``gap`` elements between."""

    def __init__(self, x: Buffer, width: Expr, gap: Expr, simd: Simd) -> None:
        self._x, self._width, self._gap, self._simd = x, width, gap, simd

    def read(
        self,
        pixel: Expr,
        count: Expr,
        column: Expr,
        at: Expr,
        move: Callable[[Callable[[Expr], Expr]], None],
    ) -> None:
        """Call ``move(vector)`` where code for pixels from ``pixel`` on is wanted.

        ``vector(distance)`` has those of the channel that many elements behind the one at ``at``,
        which is in this ``column`` of its stripe. From the pixel ``count`` on it is zero.
        """
        end = scalar(column + self._simd.lanes)

        def whole(distance: Expr) -> Expr:
            return self._x[ramp(at + distance, self._simd)]

        def joined(distance: Expr) -> Expr:
            behind = _numbers(self._simd) >= splat(self._width - column, self._simd)
            return tirx.Select(behind, whole(distance + self._gap), whole(distance))

        def single(distance: Expr) -> Expr:
            elements = []
            for i in range(self._simd.lanes):
                place = column + i
                skipped = place // self._width * self._gap
                element = self._x[at + distance + i + skipped]
                elements.append(T.if_then_else(pixel + i < count, element, T.float32(0)))
            return tirx.Shuffle(elements, list(range(self._simd.lanes)))

        def several() -> None:
            one_of(end <= self._width * 2, lambda: move(joined), lambda: move(single))

        one_of(
            pixel + self._simd.lanes <= count,
            lambda: one_of(end <= self._width, lambda: move(whole), several),
            lambda: move(single),
        )
