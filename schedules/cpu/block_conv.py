"""Convolutions of images in blocks: for each block, a convolution of one pixel per tap it sees.

See :mod:`sparse_tvm.schedules.cpu.blocks`. The weight's columns are in the order of taps, so that
what a tap multiplies with a block is a product as that of any kernel of one pixel, from another
block of the image; the sums wait in the output from tap to tap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Layout, Step
from sparse_tvm.schedules.cpu.blocks import Blocks
from sparse_tvm.schedules.cpu.conv_planes import ConvKernel
from sparse_tvm.schedules.cpu.image_output import ImageOutput
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.lane_tiles import Buffer, Expr, groups_of, local, scalar
from sparse_tvm.schedules.cpu.planes import IN_PLACE
from sparse_tvm.schedules.cpu.simd import Simd


def block_conv(
    batch: Expr,
    channels: int,
    out_channels: int,
    blocks: Blocks,
    layout: Layout,
    epilogue: Sequence[Step],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order: x ``[batch, channels, blocks.planes.size]``; the weight
    ``[out_channels, taps * channels]``, as for
    :func:`~sparse_tvm.schedules.cpu.conv_planes.conv_planes`, whose layout's ``parts`` are a
    multiple of the taps; then as :class:`~sparse_tvm.schedules.cpu.image_output.ImageOutput` says,
    ``y`` in blocks, too.
    """
    planes = blocks.planes
    kernel = _BlockKernel(
        Images(batch, channels * blocks.window.taps, out_channels, planes, planes, IN_PLACE),
        blocks,
        layout,
        simd,
    )
    return kernel.build(lambda: ImageOutput(batch, out_channels, planes, epilogue, (), simd))


class _BlockKernel(ConvKernel):
    """The same loops with another order: block by block, and there tap by tap.

    To its parent, each tap of each channel is a channel of its own.
    """

    def __init__(self, images: Images, blocks: Blocks, layout: Layout, simd: Simd) -> None:
        super().__init__(images, layout, simd)
        self._channels = images.channels // blocks.window.taps
        self._parts_per_tap = self._parts // blocks.window.taps
        self._tiles: list[tuple[int, int, int, int]] = []
        """First vector, vectors, and first and end of what is seen, of each step over pixels."""
        self._seen: list[tuple[int, int]] = []
        """Number of a tap, and how far from a pixel its first channel's is."""
        for parts, block in blocks.blocks.items():
            begin = len(self._seen)
            for tap, other in blocks.seen(parts):
                moved = other.first - block.first - tap * self._channels * blocks.planes.size
                self._seen.append((tap, moved))
            count = -(-block.pixels // simd.lanes)
            steps = groups_of(count, self._group)
            cuts = [step * count // steps for step in range(steps + 1)]
            for first, stop in pairwise(cuts):
                at = block.first // simd.lanes + first
                self._tiles.append((at, stop - first, begin, len(self._seen)))

    @property
    def _planes_read(self) -> int:
        return self._channels

    @property
    def _units(self) -> int:
        return 1

    def _begin(self) -> None:
        self._tile_columns = [_table(column) for column in zip(*self._tiles, strict=True)]
        self._taps_seen_at, self._moved = (
            _table(column) for column in zip(*self._seen, strict=True)
        )

    def _pixels_then_rows(self, unit: Expr, start: Expr, stop: Expr) -> None:
        with T.serial(0, len(self._tiles)) as tile:
            first, size, self._first_seen, self._stop_seen = (
                scalar(column[tile]) for column in self._tile_columns
            )
            for vectors in sorted({vectors for _, vectors, *_ in self._tiles}):
                with T.If(size == vectors), T.Then():
                    self._one_tile(unit, start, stop, first, vectors)

    def _one_tile(self, image: Expr, start: Expr, stop: Expr, first: Expr, vectors: int) -> None:
        """A range of rows' products with some vectors of pixels."""

        def block_row(part: Expr, segment: Expr, row: Expr, live: int) -> None:
            self._block(image, part, segment, row, live, first, vectors)

        def before(part: Expr) -> None:
            if self._packs:
                self._pack(image, part, first, vectors)

        self._each_block_row(start, stop, block_row, before)

    def _each_block_row(
        self,
        start: Expr,
        stop: Expr,
        body: Callable[..., None],
        before: Callable[[Expr], None] = lambda part: None,
    ) -> None:
        """Call ``body`` for the parts of the weight whose taps the pixels at hand see."""
        each = self._parts_per_tap
        with T.serial(0, self._stop_seen - self._first_seen) as i:
            seen = scalar(self._first_seen + i)
            tap, self._distance = scalar(self._taps_seen_at[seen]), scalar(self._moved[seen])
            with T.serial(0, each) as j:
                part = scalar(tap * each + j)
                before(part)
                self._rows_of_part(part, start, stop, body)

    def _is_first(self, part: Expr) -> Any:
        return part == self._taps_seen_at[self._first_seen] * self._parts_per_tap

    def _is_last(self, part: Expr) -> Any:
        return part == (self._taps_seen_at[self._stop_seen - 1] + 1) * self._parts_per_tap - 1

    def _source_of(self, image: Expr, first: Expr) -> Expr:
        return super()._source_of(image, first) + self._distance


def _table(values: Sequence[int]) -> Buffer:
    """Numbers where code finds them by number."""
    table = local(len(values), "int32")
    for i, value in enumerate(values):
        T.buffer_store(table, tirx.const(value, "int32"), [i])
    return table
