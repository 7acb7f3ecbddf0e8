"""Depthwise convolutions with few taps: each channel adds up what its non-zero taps see.

Pixels move along the plane as in :mod:`~sparse_tvm.schedules.cpu.window_planes`, row by row where
the window has strides. A few vectors of sums stay in registers while the channel's taps pass, each
of which loads its operands from where it finds them; of rows that are short, as many are computed
together as there are registers for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Step
from sparse_tvm.schedules.cpu.image_output import ImageOutput
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    argument,
    prim_func,
    ramp,
    scalar,
    span,
    splat,
    symbol,
)
from sparse_tvm.schedules.cpu.plane_code import (
    Extents,
    declare_sizes,
    deinterleaved,
    flat,
    in_groups,
    vectors_of,
)
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.windows import COLUMN_MASK, DIRECT_VECTORS, ROW_BITS


def sparse_window_planes(
    images: Images, epilogue: Sequence[Step], residuals: Sequence[Planes], simd: Simd
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order: x ``[batch, channels, source.size]``, not by phases; what
    :func:`~sparse_tvm.schedules.cpu.windows.stored_taps` returns; ``sizes``; then as
    :class:`~sparse_tvm.schedules.cpu.image_output.ImageOutput` says.
    """
    channels = images.out_channels
    multiplier = channels // images.channels
    with prim_func() as result:
        x = argument("x", (images.batch, images.channels, images.source.size))
        stored = symbol("stored")
        data, taps = argument("data", (stored,)), argument("taps", (stored,), "int32")
        indptr = argument("indptr", (channels + 1,), "int32")
        declare_sizes(images.sizes)
        output = ImageOutput(images.batch, channels, images.target, epilogue, residuals, simd)
        x = flat(x)
        with T.parallel(0, images.batch * channels) as plane:
            output.open()
            source = Extents(images.source)
            channel = scalar(plane % channels)
            first = scalar(indptr[channel])
            own = _Taps(data, taps, first, scalar(indptr[channel + 1] - first), channel)
            start = scalar(plane // multiplier * source.size + source.first)
            _Plane(x, start, source, images, own, output, plane, simd).compute()
    return result["func"]


@dataclass(frozen=True)
class _Taps:
    """The taps of a channel: ``count`` from ``first`` on."""

    data: Buffer
    places: Buffer
    first: Expr
    count: Expr
    channel: Expr


class _Plane:
    """Code for one plane of the output."""

    def __init__(
        self,
        x: Buffer,
        start: Expr,
        source: Extents,
        images: Images,
        taps: _Taps,
        output: ImageOutput,
        plane: Expr,
        simd: Simd,
    ) -> None:
        """``x[start]`` is the first pixel of the plane that is read."""
        self._x, self._source, self._window = x, source, images.window
        self._target, self._there = images.target, output.extents
        self._taps, self._output, self._plane, self._simd = taps, output, plane, simd
        top, left = images.window.pads[:2]
        self._corner = scalar(start - top * source.pitch - left)

    def compute(self) -> None:
        """Compute all of its pixels."""
        lanes, there = self._simd.lanes, self._there
        written = scalar(self._target.pixels) // lanes * lanes
        self._output.clear_border(self._plane, written)
        if not self._window.strided:
            count = vectors_of(self._target, self._simd)
            in_groups(count, DIRECT_VECTORS, lambda first, size: self._sums(0, 1, first, size))
            return
        count = scalar((there.width + (lanes - 1)) // lanes)
        if isinstance(count, int) and count <= DIRECT_VECTORS:
            together = DIRECT_VECTORS // count
            in_groups(
                there.height,
                together,
                lambda row, rows: self._sums(row, rows, 0, count, ends=True),
            )
            return
        with T.serial(0, there.height) as row:
            in_groups(count, DIRECT_VECTORS, lambda first, size: self._sums(row, 1, first, size))
            self._clear_behind(row, count)

    def _sums(self, row: Expr, rows: int, first: Expr, vectors: int, ends: bool = False) -> None:
        """Compute some vectors, from ``first`` on, of each of some rows from ``row`` on.

        ``ends`` tells that there are no more in these rows.
        """
        taps, source, (down, right) = self._taps, self._source, self._window.stride
        acc = Registers(rows, vectors, self._simd)
        acc.fill(lambda *_: self._output.start(taps.channel))
        run = self._simd.lanes * right
        begin = scalar(self._corner + row * (down * source.pitch) + first * run)
        with T.serial(0, taps.count) as i:
            place = scalar(taps.places[taps.first + i])
            weight = splat(taps.data[taps.first + i], self._simd)
            at = scalar(begin + (place >> ROW_BITS) * source.pitch + (place & COLUMN_MASK))
            for r in range(rows):
                for v in range(vectors):
                    value = self._pixels(at + r * (down * source.pitch) + v * run)
                    acc.set(r, v, acc.get(r, v) + weight * value)
        for r in range(rows):
            pixel = scalar((row + r) * self._there.pitch + first * self._simd.lanes)
            for v in range(vectors):
                to = pixel + v * self._simd.lanes
                self._output.finish(acc.get(r, v), self._plane, taps.channel, to)
            if ends:
                self._clear_behind(row + r, first + vectors)

    def _pixels(self, at: Expr) -> Expr:
        """A vector of what neighbouring pixels of the output see, from ``x[at]`` on."""
        step = self._window.stride[1]
        if step == 1:
            return self._x[ramp(at, self._simd)]
        if step == 2:
            return deinterleaved(self._x, at, self._simd)[0]
        return self._x[span(at, self._simd.lanes, step)]

    def _clear_behind(self, row: Expr, written: Expr) -> None:
        """Clear what of a padded row is behind the vectors that were ``written``."""
        if not self._target.border.padded:
            return
        lanes, pitch = self._simd.lanes, self._there.pitch
        whole = scalar((pitch + (lanes - 1)) // lanes)
        with T.serial(0, whole - written) as i:
            self._output.clear(self._plane, row * pitch + (written + i) * lanes)
