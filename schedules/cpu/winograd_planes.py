"""3x3 convolutions of images in planes by Winograd's filtering of columns, the weight dense.

Rows of the output are computed by bands of ``m`` (:mod:`sparse_tvm.schedules.cpu.winograd`). The
image is transformed first: a band's ``m + 2`` rows of each channel become as many others, its
points. In large images each thread transforms what it multiplies next, which stays in the second
cache; small ones all threads transform together. At each point the band then is a row that is
convolved with three taps, as :mod:`sparse_tvm.schedules.cpu.conv_planes` does it, by a weight of
that point's own; and a block of sums at all points becomes ``m`` rows of the output while it is in
the first cache.

A row is cut into whole vectors, of which the last may overlap the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Layout, Step
from sparse_tvm.schedules.cpu.block_arrays import JOBS_PER_GROUP
from sparse_tvm.schedules.cpu.image_output import ImageOutput
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    argument,
    for_group_sizes,
    groups_of,
    prim_func,
    ramp,
    scalar,
    scratch,
    share_jobs,
    splat,
    zero,
)
from sparse_tvm.schedules.cpu.plane_code import Extents, declare_sizes, flat, one_of
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.vector_math import constant
from sparse_tvm.schedules.cpu.winograd import TAPS, Bands, transforms

_UNITS = 4
"""Units of an image from which each thread transforms its own: where threads meet, two do it."""


def winograd_planes(
    images: Images,
    layout: Layout,
    epilogue: Sequence[Step],
    residuals: Sequence[Planes],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order: x ``[batch, channels, source.size]``; the weight
    ``[blocks of rows, m + 2, channels, 3, rows]``; the symbols that extents depend on; then as
    :class:`~sparse_tvm.schedules.cpu.image_output.ImageOutput` says.

    The layout's block has the rows of the weight that are computed together; its parameters are
    ``outputs``, which is m, ``vectors`` of pixels that they are multiplied with at a time, and
    ``bands`` that pass a block of rows before the next one comes, a divisor of all. Without these,
    which is for images of unknown size, it is one band, or all where vectors are wider than rows.
    """
    return _Kernel(images, layout, epilogue, residuals, simd).build()


class _Kernel:
    def __init__(
        self,
        images: Images,
        layout: Layout,
        epilogue: Sequence[Step],
        residuals: Sequence[Planes],
        simd: Simd,
    ) -> None:
        self._images, self._simd = images, simd
        self._epilogue, self._residuals = epilogue, residuals
        self._rows, self._group = layout.block[0], layout.get("vectors", 1)
        self._block_rows = -(-images.out_channels // self._rows)
        self._transforms = transforms(layout.get("outputs", 2))
        self._declared = Bands(
            images.target.height, images.target.width, layout.get("outputs", 2), simd.lanes
        )
        self._declared_unit: Expr = layout.get("bands", 0)
        if self._declared_unit:
            self._apart = self._declared.count // self._declared_unit >= _UNITS
        else:
            narrow = images.target.width < simd.lanes
            self._declared_unit = tirx.Select(narrow, self._declared.count, T.int64(1))
            self._apart = True

    def build(self) -> tirx.PrimFunc:
        """Build the kernel."""
        images, whole = self._images, self._declared
        of_points = (self._block_rows, whole.points, images.channels, TAPS, self._rows)
        with prim_func() as result:
            x = argument("x", (images.batch, images.channels, images.source.size))
            self._weight = argument("data", of_points)
            declare_sizes(images.sizes)
            self._output = ImageOutput(
                images.batch,
                images.out_channels,
                images.target,
                self._epilogue,
                self._residuals,
                self._simd,
            )
            self._x = flat(x)
            threads = scalar(tirx.call_packed("runtime.NumThreads"))
            height, width = scalar(whole.height), scalar(whole.width)
            self._bands = bands = replace(whole, height=height, width=width)
            self._per_unit = scalar(self._declared_unit)
            units = images.batch * (bands.count // self._per_unit)
            if not self._apart:
                self._points = self._room(images.batch * whole.count)
                with T.parallel(0, threads) as thread:
                    self._transform_share(thread, threads)
            with T.parallel(0, threads) as thread:
                self._output.open()
                if self._apart:
                    self._points = self._room(self._declared_unit)
                share_jobs(thread, threads, units, self._jobs_of_unit)
        return result["func"]

    def _room(self, bands: Expr) -> Buffer:
        """Memory for so many transformed bands."""
        rows = bands * self._declared.points * self._images.channels
        return T.alloc_buffer((rows * self._declared.pitch,), "float32")

    def _transform_share(self, thread: Expr, threads: Expr) -> None:
        """Transform a thread's share of the channels of all bands."""
        images, count = self._images, self._bands.count
        channels = scalar(images.batch * count * images.channels)
        begin = scalar(thread * channels // threads)
        with T.serial(0, scalar((thread + 1) * channels // threads - begin)) as i:
            band = scalar((begin + i) // images.channels)
            channel = scalar((begin + i) % images.channels)
            self._transform_channel(scalar(band // count), scalar(band % count), channel, band)

    def _transform_unit(self, image: Expr, first_band: Expr) -> None:
        """Transform all channels of a unit's bands."""
        with T.serial(0, self._per_unit) as i, T.serial(0, self._images.channels) as channel:
            self._transform_channel(image, scalar(first_band + i), channel, i)

    def _transform_channel(self, image: Expr, number: Expr, channel: Expr, place: Expr) -> None:
        """Transform a channel of an image's band with this number, which is stored at ``place``."""
        images, bands = self._images, self._bands
        source, (top, left) = Extents(images.source), images.window.pads[:2]
        plane = scalar(image * images.channels + channel)
        row = number * bands.outputs - top
        first = scalar(plane * source.size + source.first + row * source.pitch - left)
        point = scalar((place * bands.points * images.channels + channel) * bands.pitch)
        # The last band may end behind the image and its padding.
        there = source.height + top + images.window.pads[2]
        last = scalar(there - (bands.count - 1) * bands.outputs)

        def rows(live: Expr) -> None:
            with T.serial(0, bands.read_vectors) as vector:
                at = scalar(bands.start_of(vector, bands.read_span))
                self._transform(first + at, source.pitch, live, point + at)

        if isinstance(last, int) and last >= bands.points:
            rows(bands.points)
        else:
            one_of(number == bands.count - 1, lambda: rows(last), lambda: rows(bands.points))

    def _transform(self, first: Expr, pitch: Expr, live: Expr, point: Expr) -> None:
        """Transform a vector of columns, of which ``live`` rows are there and the rest are zero."""
        simd, bands = self._simd, self._bands
        rows = Registers(bands.points, 1, simd)

        def load(row: int) -> None:
            rows.set(row, 0, self._x[ramp(first + row * pitch, simd)])

        for row in range(bands.points):
            if isinstance(live, int) or row < TAPS:  # what one row of the output reads is there
                if not isinstance(live, int) or row < live:
                    load(row)
                continue
            one_of(row < live, partial(load, row), partial(rows.set, row, 0, zero(simd)))
        for i, factors in enumerate(self._transforms.input):
            known = factors[:live] if isinstance(live, int) else factors
            value = _combination(known, lambda row: rows.get(row, 0))
            start = point + i * self._images.channels * bands.pitch
            T.buffer_store(self._points, value, [ramp(start, simd)])

    def _jobs_of_unit(self, unit: Expr, job: Expr, last_job: Expr) -> None:
        """Compute the blocks of rows of a range of jobs in one unit of bands."""
        blocks, units = self._block_rows, self._bands.count // self._per_unit
        start = scalar(job * blocks // JOBS_PER_GROUP)
        image, first_band = scalar(unit // units), scalar(unit % units * self._per_unit)
        if self._apart:
            self._transform_unit(image, first_band)
        remainder = self._images.out_channels % self._rows
        with T.serial(0, scalar(last_job * blocks // JOBS_PER_GROUP - start)) as b:
            block = scalar(start + b)

            def rows(live: int) -> None:
                self._block_row(image, first_band, block, live)

            if remainder == 0:
                rows(self._rows)
            else:
                one_of(block < blocks - 1, lambda: rows(self._rows), lambda: rows(remainder))

    def _block_row(self, image: Expr, first_band: Expr, block: Expr, live: int) -> None:
        """Compute ``live`` channels of the output in one unit of bands."""
        channel = scalar(block * self._rows)
        plane = scalar(image * self._images.out_channels + channel)
        self._clear_padding(first_band, plane, live)
        count = self._per_unit * self._bands.vectors
        with T.serial(0, groups_of(count, self._group)) as group:
            for_group_sizes(
                count,
                self._group,
                group,
                lambda first, size: self._group_of_vectors(
                    image, first_band, block, channel, plane, live, first, size
                ),
            )

    def _clear_padding(self, first_band: Expr, plane: Expr, live: int) -> None:
        """Clear what lies around and between the rows, before they are written."""
        target, bands, output = self._images.target, self._bands, self._output
        if not target.border.padded:
            return
        last_unit = first_band == bands.count - self._per_unit
        pitch = output.extents.pitch
        written = scalar(bands.height * pitch // self._simd.lanes * self._simd.lanes)
        with T.If(last_unit), T.Then(), T.serial(0, live) as row:
            output.clear_border(plane + row, written)
        gap = scalar(tirx.max(pitch - bands.span, 0))
        row_count = tirx.min(
            self._per_unit * bands.outputs, bands.height - first_band * bands.outputs
        )
        with (
            T.serial(0, live) as channel,
            T.serial(0, row_count) as row,
            T.serial(0, gap) as column,
        ):
            pixel = (first_band * bands.outputs + row) * pitch + bands.span + column
            at = (plane + channel) * output.extents.size + output.extents.first + pixel
            T.buffer_store(output.y, T.float32(0), [at])

    def _group_of_vectors(
        self,
        image: Expr,
        first_band: Expr,
        block: Expr,
        channel: Expr,
        plane: Expr,
        live: int,
        first: Expr,
        size: int,
    ) -> None:
        """Compute ``live`` channels in some vectors of all rows of their bands."""
        bands, simd, images = self._bands, self._simd, self._images
        per_row = bands.vectors
        band = [scalar(first_band + (first + v) // per_row) for v in range(size)]
        column = [scalar(bands.start_of((first + v) % per_row, bands.span)) for v in range(size)]
        band_size = bands.points * images.channels * bands.pitch
        stored = -first_band if self._apart else image * bands.count
        sources = [scalar((stored + band[v]) * band_size + column[v]) for v in range(size)]
        sums = scratch(bands.points * live * size * simd.lanes)

        def at(point: Expr, row: Expr, vector: int) -> list[Expr]:
            return [ramp(((point * live + row) * size + vector) * simd.lanes, simd)]

        with T.serial(0, bands.points) as point:
            acc = Registers(live, size, simd)
            acc.fill(lambda *_: splat(T.float32(0), simd))
            self._multiply_point(acc, point, block, sources)
            for row in range(live):
                for v in range(size):
                    T.buffer_store(sums, acc.get(row, v), at(point, row, v))
        with T.serial(0, live) as row:
            for v in range(size):
                self._finish(
                    [sums[at(point, row, v)[0]] for point in range(bands.points)],
                    plane + row,
                    channel + row,
                    band[v],
                    column[v],
                )

    def _multiply_point(
        self, acc: Registers, point: Expr, block: Expr, sources: Sequence[Expr]
    ) -> None:
        """Add the products of all channels and taps at one point."""
        channels, pitch = self._images.channels, self._bands.pitch
        with T.serial(0, channels) as channel:
            row = scalar((point * channels + channel) * pitch)
            for tap in range(TAPS):
                acc.multiply_add(
                    self._weights_of(block, point, channel, tap), self._vectors(sources, row + tap)
                )

    def _weights_of(
        self, block: Expr, point: Expr, channel: Expr, tap: int
    ) -> Callable[[int], Expr]:
        return lambda row: self._weight[block, point, channel, tap, row]

    def _vectors(self, sources: Sequence[Expr], offset: Expr) -> Callable[[int], Expr]:
        return lambda v: self._points[ramp(sources[v] + offset, self._simd)]

    def _finish(
        self, sums: Sequence[Expr], plane: Expr, channel: Expr, band: Expr, column: Expr
    ) -> None:
        """Turn a vector's sums at all points into its rows of the output."""
        bands, output, simd = self._bands, self._output, self._simd
        kept = Registers(bands.points, 1, simd)
        kept.fill(lambda point, _: sums[point])
        certain = 1
        if isinstance(bands.height, int):
            certain = bands.height % bands.outputs or bands.outputs
        for i, factors in enumerate(self._transforms.output):

            def store(i: int = i, factors: Sequence[float] = factors) -> None:
                value = _combination(factors, lambda point: kept.get(point, 0))
                pixel = (band * bands.outputs + i) * output.extents.pitch + column
                output.finish(value + output.start(channel), plane, channel, pixel)

            if i < certain:
                store()
                continue
            with T.If(band * bands.outputs + i < bands.height), T.Then():
                store()


def _combination(factors: Sequence[float], vector: Callable[[int], Expr]) -> Expr:
    """The sum of vectors by these factors."""
    total: Expr = None
    for i, factor in enumerate(factors):
        if factor == 0:
            continue
        term = vector(i)
        if total is None:
            total = term if factor == 1 else term * constant(factor, term)
        elif abs(factor) == 1:
            total = total + term if factor > 0 else total - term
        else:
            total = total + term * constant(factor, term)
    assert total is not None
    return total
