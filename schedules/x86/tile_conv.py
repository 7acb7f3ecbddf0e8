"""Convolutions of int8 images in planes of words on a matrix unit, the weight dense.

Sixteen planes of words below each other are the unit's right operand as they lie, at whatever
distance from the pixel a tap finds them: an im2col without copies. Up to two tiles of the weight,
sixteen output channels each, meet two vectors of pixels. Channels come in chunks of sixteen planes;
the last chunk begins earlier where they do not divide, and its weights are zero for planes that
the one before has seen. An image of fewer planes has tiles of fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cpu.conv_planes import ConvKernel
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.lane_tiles import Buffer, Expr, argument, scalar, scratch
from sparse_tvm.schedules.cpu.plane_code import flat
from sparse_tvm.schedules.cpu.precision import INT8
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.word_output import Output
from sparse_tvm.schedules.cpu.word_planes import BYTES
from sparse_tvm.schedules.x86.instructions import FULL, TILE_WORDS, TileUnit
from sparse_tvm.schedules.x86.tile_weights import chunks_of
from sparse_tvm.schedules.x86.units import TILE_ROWS

VECTORS = 2
"""Vectors of pixels whose sums are in tiles together."""

MOST_TILES = 2
"""Tiles of output channels beside each other."""


def tile_conv(
    images: Images,
    layout: Layout,
    declare_output: Callable[[], Output],
    simd: Simd,
    unit: TileUnit,
) -> tirx.PrimFunc:
    """Build the kernel.

    ``images`` counts channels in word-planes, and rows of the weight in whole words; the layout's
    blocks have 16 rows or 32.

    Arguments of the PrimFunc, in order: x int32 ``[batch, planes * phases, source.size]``;
    ``data`` int32 ``[block rows, taps, chunks, tiles, 16, planes of a chunk]``; ``sizes``; then
    those of the output.
    """
    return _TileKernel(images, layout, simd, unit).build(declare_output)


class _TileKernel(ConvKernel):
    element = "int32"

    def __init__(self, images: Images, layout: Layout, simd: Simd, unit: TileUnit) -> None:
        super().__init__(images, layout, simd)
        self._unit, self._tiles = unit, self._rows // TILE_ROWS
        self._chunks, self._lines = chunks_of(images.channels)

    def _declare_weight(self) -> None:
        shape = (self._chunks, self._tiles, TILE_ROWS, self._lines)
        self._data = argument("data", (self._block_rows, self._taps, *shape), "int32")

    # Registers: the sums, then the weight's tiles, then the pixels'.

    def _sums(self, tile: int, vector: int) -> int:
        return tile * VECTORS + vector

    def _weights(self, tile: int) -> int:
        return MOST_TILES * VECTORS + tile

    def _pixels(self, vector: int) -> int:
        return MOST_TILES * VECTORS + MOST_TILES + vector

    def _begin(self) -> None:
        shapes = list(FULL)
        for i in range(MOST_TILES):
            shapes[self._weights(i)] = (TILE_ROWS, self._lines)
        for i in range(VECTORS):
            shapes[self._pixels(i)] = (self._lines, TILE_ROWS)
        self._unit.configure(shapes)
        self._results = scratch(MOST_TILES * VECTORS * TILE_WORDS, "int32")
        self._weight: Buffer = flat(self._data)

    def _end(self) -> None:
        self._unit.release()

    def _block(
        self,
        image: Expr,
        part: Expr,
        segment: Expr,
        block_row: Expr,
        live: int,
        first: Expr,
        size: int,
    ) -> None:
        """Compute ``live`` rows of the output for ``size`` vectors of pixels."""
        lanes, images = self._simd.lanes, self._images
        tiles = -(-live // TILE_ROWS)
        every = [(tile, vector) for tile in range(tiles) for vector in range(size)]
        pixel, channel = scalar(first * lanes), scalar(block_row * self._rows)
        plane = scalar(self._source.size * len(images.window.phases))
        source = scalar(image * images.channels * plane + self._source.first + pixel)
        for tile, vector in every:
            self._unit.zero(self._sums(tile, vector))
        with T.serial(0, self._taps) as tap, T.serial(0, self._chunks) as chunk:
            words = TILE_ROWS * self._lines
            step = (segment * self._taps + tap) * self._chunks + chunk
            weights = scalar(step * (self._tiles * words))
            line = tirx.min(chunk * self._lines, images.channels - self._lines)
            offset = line * plane
            if self._tap_offsets is not None:
                offset = offset + self._tap_offsets[tap]
            start = scalar(source + offset)
            for vector in range(size):
                self._unit.load(self._pixels(vector), self._x, start + vector * lanes, plane)
            for tile in range(tiles):
                at = weights + tile * words
                self._unit.load(self._weights(tile), self._weight, at, self._lines)
                for vector in range(size):
                    registers = self._sums(tile, vector), self._weights(tile), self._pixels(vector)
                    self._unit.multiply_add(INT8, *registers)
        for tile, vector in every:
            spot = self._sums(tile, vector)
            self._unit.store(spot, self._results, spot * TILE_WORDS)
        self._finish(image, channel, pixel, live, size)
        self._clear_with_row(image, channel, live, first)

    def _finish(self, image: Expr, channel: Expr, pixel: Expr, live: int, size: int) -> None:
        """Make the output of the sums in memory."""
        lanes = self._simd.lanes
        with T.serial(0, live // BYTES) as quad:
            row = scalar(quad * BYTES)
            tile, inside = scalar(row // TILE_ROWS), scalar(row % TILE_ROWS)
            for vector in range(size):
                at = (tile * VECTORS + vector) * TILE_WORDS + inside * lanes
                sums = [self._results[T.ramp(at + i * lanes, 1, lanes)] for i in range(BYTES)]
                self._output.finish(sums, image, channel + row, pixel + vector * lanes)
