"""Convolutions of images in planes, the weight dense, CSR or BSR: the dense layers' kernel.

Pixels are numbered along the planes, gaps between rows included, and the output's plane has the
pitch of the input's. Whatever tap of the kernel multiplies a vector of pixels, its operand then is
a vector of consecutive elements, at a distance that depends on channel and tap alone: an im2col
without copies. A block of rows of the weight is multiplied with a few vectors of pixels, which
stay in registers; a weight that is sparse, or reads much, in parts of its columns, for the part of
the image that it reads to stay in the first cache, while the sums wait in the output.

Which of the loops over rows and over pixels is outermost decides what streams from where: few
pixels and many channels want each row's weights once, many pixels each pixel's channels once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Layout, Step
from sparse_tvm.schedules.cpu.block_arrays import JOBS_PER_GROUP, index_dtype
from sparse_tvm.schedules.cpu.image_output import ImageOutput
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.lane_tiles import (
    PREFETCH_BYTES,
    Buffer,
    Expr,
    Registers,
    argument,
    for_group_sizes,
    groups_of,
    local,
    prefetch,
    prim_func,
    ramp,
    scalar,
    share_jobs,
    small_integers,
    splat,
    splats,
    symbol,
    zero,
)
from sparse_tvm.schedules.cpu.plane_code import (
    Extents,
    declare_sizes,
    flat,
    one_of,
    vectors_of,
)
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import LANES, Simd

_RUN, _SHORT_SUM = 4, 32
"""Groups of pixels that a block row goes on with, where sums are as short: lines of the output
follow each other then, of each plane. With many registers, only if there are more outputs."""

_COLUMNS_TOGETHER = 64
"""Columns that a part has at least for its weights to be loaded together: rows have a tenth."""

_CHAINS = 8
"""Independent sums that a loop over single weights has, if it has the registers."""

_NEAR_OUTPUT = 512 << 10
"""Bytes of an image that the second cache still has when it is computed again, beside others."""

_FAR_ROWS = 4
"""Rows of taps are apart that are so far as this share of an image's rows."""


def conv_planes(
    images: Images,
    layout: Layout,
    epilogue: Sequence[Step],
    residuals: Sequence[Planes],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order: x ``[sources, channels * phases, source.size]``; the weight
    ``[out_channels, channels * taps]``, as for :func:`~sparse_tvm.schedules.cpu.matmul.matmul`;
    ``sizes``; then as :class:`~sparse_tvm.schedules.cpu.image_output.ImageOutput` says.

    The layout's parameters: ``vectors`` of pixels that a block row of the weight is multiplied
    with at a time, ``parts`` of its columns, ``rows_outermost`` (1: all pixels of an image pass a
    block row before the next one comes), ``prefetch`` (1: weights are asked for ahead of use),
    ``packed`` (1: what a part of the columns multiplies with vectors of pixels is copied before
    block rows pass it, each column's vectors to lines of their own), and ``filled`` (1: rows of
    single weights are filled up to fours with zeros, and one load brings four of them).
    """
    out = (images.batch, images.out_channels, images.target)
    kernel = ConvKernel(images, layout, simd)
    return kernel.build(lambda: ImageOutput(*out, epilogue, residuals, simd))


class Sums(Protocol):
    """Sums of some rows by some vectors in registers."""

    def multiply_add(self, weight: Callable[[int], Any], x: Callable[[int], Expr]) -> None:
        """Add the outer product of ``weight(row)`` and ``x(vector)``."""


class ConvKernel:
    """The loops over images, rows of the weight and pixels, and what they do in float32."""

    element = "float32"
    """Of images and weights."""

    def __init__(self, images: Images, layout: Layout, simd: Simd) -> None:
        self._images, self._layout, self._simd = images, layout, simd
        self._parts, self._group = layout.get("parts", 1), layout.get("vectors", 1)
        self._rows_outermost = bool(layout.get("rows_outermost", 0))
        self._rows = self._rows_of(layout)
        self._block_rows = -(-images.out_channels // self._rows)
        self._taps = images.frames.kernel * images.window.taps
        self._k = images.channels * self._taps
        few_registers = simd.few_registers
        in_turns = self.element == "float32" and not self._rows_outermost
        self._asks_for_weights = bool(layout.get("prefetch", 0))
        # With AVX-512 sparse weights lose 1 to 3 % by it, but for long rows of single ones whose
        # outputs are far. On Arm nobody measured what it is worth.
        self._filled = bool(layout.get("filled", 0))
        size = images.target.size
        far = isinstance(size, int) and 4 * images.out_channels * size > _NEAR_OUTPUT
        long_and_far = far and self._rows == 1 and self._k >= _COLUMNS_TOGETHER
        dense_or_far = (not layout.sparse or long_and_far) and not simd.by_element
        gains = few_registers or self._filled or dense_or_far
        self._asks_for_outputs = in_turns and gains
        grows = few_registers or images.out_channels > self._k
        short = in_turns and not layout.sparse and self._k <= _SHORT_SUM and grows
        self._run = _RUN if short else 1
        self._moves = self._taps > 1 or images.window.pads[:2] != (0, 0)
        one_pass = not self._rows_outermost and self._run == 1
        # Copied, all taps count.
        skips = self._rows_apart and not layout.sparse
        self._packs = bool(layout.get("packed", 0)) and one_pass and not skips
        long = self._k >= self._parts * _COLUMNS_TOGETHER
        # With AVX-512 ResNet-50 took 3 % longer for them, unless rows are filled.
        comes_together = self._filled or (long and few_registers)
        self._together = simd.weights_together(layout) if comes_together else 1

    def _rows_of(self, layout: Layout) -> int:
        """Rows of the weight that are computed together."""
        return layout.block[0]

    def build(self, declare_output: Callable[[], Any]) -> tirx.PrimFunc:
        """Build the kernel, whose last arguments ``declare_output`` declares."""
        images = self._images
        with prim_func() as result:
            shape = (images.sources, self._planes_read, images.source.size)
            x = argument("x", shape, self.element)
            self._declare_weight()
            declare_sizes(images.sizes)
            self._output = declare_output()
            self._x = flat(x)
            threads = scalar(tirx.call_packed("runtime.NumThreads"))
            with T.parallel(0, threads) as thread:
                self._source = Extents(images.source)
                self._output.open()
                self._count = vectors_of(images.target, self._simd)
                self._groups = scalar(groups_of(self._count, self._group))
                self._tap_offsets = self._table() if self._moves else None
                if self._packs:
                    elements = self._most_columns * self._group * self._simd.lanes
                    self._panel = T.alloc_buffer((elements,), self.element)
                self._begin()
                share_jobs(thread, threads, images.batch * self._units, self._jobs_of_unit)
                self._end()
        return result["func"]

    @property
    def _planes_read(self) -> int:
        """Planes of an image that is read."""
        return self._images.channels * len(self._images.window.phases)

    @property
    def _units(self) -> Expr:
        """How many shares an image's pixels have, each for itself."""
        if self._rows_outermost:
            return 1
        groups = groups_of(vectors_of(self._images.target, self._simd), self._group)
        return groups_of(groups, self._run)

    def _jobs_of_unit(self, unit: Expr, job: Expr, last_job: Expr) -> None:
        """Compute the block rows of a range of jobs."""
        if self._sorted:
            start, stop = scalar(self._partition[job]), scalar(self._partition[last_job])
        else:
            start = scalar(job * self._block_rows // JOBS_PER_GROUP)
            stop = scalar(last_job * self._block_rows // JOBS_PER_GROUP)
        if self._rows_outermost:
            self._rows_then_pixels(unit, start, stop, 0, self._groups)
        else:
            self._pixels_then_rows(unit, start, stop)

    @property
    def _sorted(self) -> bool:
        """Whether block rows are stored in an order of their own, and shared out by it."""
        return self._layout.sparse

    def _declare_weight(self) -> None:
        layout, segments = self._layout, self._parts * self._block_rows
        if not layout.sparse:
            self._data = argument("data", (self._block_rows, self._k, self._rows))
            return
        blocks = symbol("blocks")
        self._data = argument("data", (blocks, 1, self._rows))
        self._indices = argument("indices", (blocks,), index_dtype(self._k))
        self._indptr = argument("indptr", (segments + 1,), "int32")
        self._order = argument("rows", (segments,), "int32")
        self._partition = argument("partition", (JOBS_PER_GROUP + 1,), "int32")

    def _table(self) -> Buffer:
        """The taps' distances from a pixel."""
        table = local(self._taps, "int32")
        for tap, offset in enumerate(self._images.offsets(self._source)):
            T.buffer_store(table, T.Cast("int32", offset), [tap])
        return table

    def _begin(self) -> None:
        """Generate what each thread does first."""

    def _end(self) -> None:
        """Generate what each thread does last."""

    def _rows_then_pixels(
        self, image: Expr, start: Expr, stop: Expr, first_group: Expr, stop_group: Expr
    ) -> None:
        """All of some block rows' products with groups of pixels, row by row."""

        def block_row(part: Expr, segment: Expr, row: Expr, live: int) -> None:
            with T.serial(0, stop_group - first_group) as i:
                group = scalar(first_group + i)
                for_group_sizes(
                    self._count,
                    self._group,
                    group,
                    lambda first, size: self._block(image, part, segment, row, live, first, size),
                )

        self._each_block_row(start, stop, block_row)
        self._clear_borders(image, start, stop, first_group)

    @property
    def _knows_borders(self) -> bool:
        """Whether padding is a few lines that code can name."""
        return isinstance(self._images.target.size, int)

    def _clear_borders(self, image: Expr, start: Expr, stop: Expr, first: Expr) -> None:
        """Clear the padding of the planes of some block rows, with the ``first`` of their pixels.

        Of unknown size not within the loop over rows, which `_clear_with_row` is for: it is a call
        then, before which all registers go to memory.
        """
        if not self._knows_borders:
            self._clear(image, start * self._rows, stop * self._rows, first)

    def _clear_with_row(self, image: Expr, channel: Expr, live: int, first: Expr) -> None:
        """The same for a block row, beside its products: other cores may have the lines."""
        if self._knows_borders:
            self._clear(image, channel, channel + live, first)

    def _clear(self, image: Expr, channel: Expr, stop: Expr, first: Expr) -> None:
        with T.If(first == 0), T.Then():
            written = self._count * self._simd.lanes
            self._output.clear_borders(image, scalar(channel), scalar(stop), written)

    def _pixels_then_rows(self, unit: Expr, start: Expr, stop: Expr) -> None:
        if self._run > 1:
            runs = scalar(groups_of(self._groups, self._run))
            image, group = scalar(unit // runs), scalar(unit % runs * self._run)
            last = scalar(tirx.min(group + self._run, self._groups))
            self._rows_then_pixels(image, start, stop, group, last)
            return
        image, group = scalar(unit // self._groups), scalar(unit % self._groups)

        def body(first: Expr, size: int) -> None:
            self._each_block_row(
                start,
                stop,
                lambda part, segment, row, live: self._block(
                    image, part, segment, row, live, first, size
                ),
                lambda part: self._pack(image, part, first, size) if self._packs else None,
            )
            self._clear_borders(image, start, stop, first)

        for_group_sizes(self._count, self._group, group, body)

    def _first_column(self, part: Expr) -> Expr:
        """The first column of a part of the weight."""
        if self._parts == 1:
            return 0
        if self._layout.sparse:
            return scalar((part * self._k + (self._parts - 1)) // self._parts)
        return scalar(part * self._images.channels // self._parts * self._taps)

    @property
    def _most_columns(self) -> int:
        """Columns that a part of the weight has at most."""
        if self._layout.sparse:
            return -(-self._k // self._parts)
        return -(-self._images.channels // self._parts) * self._taps

    def _columns_of(self, part: Expr) -> tuple[Expr, Expr]:
        """The first column of a part of the weight, and how many it has."""
        first = self._first_column(part)
        return first, self._k if self._parts == 1 else self._first_column(part + 1) - first

    def _pack(self, image: Expr, part: Expr, first: Expr, size: int) -> None:
        """Copy ``size`` vectors of all columns of a part: neighbours in time, and in memory."""
        lanes = self._simd.lanes
        source, (column, count) = self._source_of(image, first), self._columns_of(part)
        with T.serial(0, count) as i:
            start = scalar(source + self._offset_of(scalar(column + i), self._plane))
            for v in range(size):
                value = self._x[ramp(start + v * lanes, self._simd)]
                T.buffer_store(self._panel, value, [ramp((i * size + v) * lanes, self._simd)])

    @property
    def _plane(self) -> Expr:
        """Elements of a channel of the images that are read, all of its phases."""
        return self._source.size * len(self._images.window.phases)

    def _offset_of(self, column: Expr, plane: Expr) -> Expr:
        """How far it is from a pixel to what a column of the weight multiplies."""
        if self._tap_offsets is None:
            return column * plane
        channel = scalar(column // self._taps)
        return channel * plane + self._tap_offsets[column - channel * self._taps]

    def _source_of(self, image: Expr, first: Expr) -> Expr:
        """Where the vector ``first`` of pixels is in the first plane."""
        return (
            self._images.first_source(image) * self._planes_read * self._source.size
            + self._source.first
            + first * self._simd.lanes
        )

    def _each_block_row(
        self,
        start: Expr,
        stop: Expr,
        body: Callable[..., None],
        before: Callable[[Expr], None] = lambda part: None,
    ) -> None:
        """Call ``body(part, segment, block row, rows in it)`` for all parts of a range of rows.

        And ``before(part)`` before those of a part.
        """
        with T.serial(0, self._parts) as part:
            before(part)
            self._rows_of_part(part, start, stop, body)

    def _rows_of_part(self, part: Expr, start: Expr, stop: Expr, body: Callable[..., None]) -> None:
        remainder = self._images.out_channels % self._rows
        with T.serial(0, stop - start) as i:
            segment = scalar(part * self._block_rows + start + i)
            row = scalar(self._order[segment] if self._sorted else start + i)
            if remainder == 0:
                body(part, segment, row, self._rows)
            else:
                one_of(
                    row < self._block_rows - 1,
                    lambda: body(part, segment, row, self._rows),
                    lambda: body(part, segment, row, remainder),
                )

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
        """Add one part's product to ``live`` rows of the output, for ``size`` vectors of pixels."""
        lanes, output, parts = self._simd.lanes, self._output, self._parts
        acc = Registers(live, size, self._simd)
        pixel = scalar(first * lanes)
        channel = scalar(block_row * self._rows)
        plane = scalar(image * self._images.out_channels + channel)
        source = 0 if self._packs else scalar(self._source_of(image, first))

        if self._asks_for_outputs:
            following = block_row + 1
            if self._sorted:
                last = self._parts * self._block_rows - 1
                following = scalar(self._order[tirx.min(segment + 1, last)])
            next_plane = image * self._images.out_channels + following * self._rows
            output.ask_for(scalar(next_plane), self._rows, pixel, size)

        def each(body: Callable[[int, int], None]) -> None:
            for row in range(live):
                for vector in range(size):
                    body(row, vector)

        def fresh() -> None:
            acc.fill(lambda row, _: output.start(channel + row))

        def finish() -> None:
            each(
                lambda row, vector: output.finish(
                    acc.get(row, vector), plane + row, channel + row, pixel + vector * lanes
                )
            )
            self._clear_with_row(image, channel, live, first)

        def wait() -> None:
            each(
                lambda row, vector: T.buffer_store(
                    output.y, acc.get(row, vector), output.at(plane + row, pixel + vector * lanes)
                )
            )

        def resume() -> None:
            acc.fill(
                lambda row, vector: output.y[tuple(output.at(plane + row, pixel + vector * lanes))]
            )

        if parts == 1:
            fresh()
            self._accumulate(acc, part, segment, block_row, source, pixel)
            finish()
            return
        one_of(self._is_first(part), fresh, resume)
        self._accumulate(acc, part, segment, block_row, source, pixel)
        one_of(self._is_last(part), finish, wait)

    def _is_first(self, part: Expr) -> Any:
        """Whether sums begin with a part."""
        return part == 0

    def _is_last(self, part: Expr) -> Any:
        """Whether sums are complete after a part."""
        return part == self._parts - 1

    def _accumulate(
        self,
        acc: Registers,
        part: Expr,
        segment: Expr,
        block_row: Expr,
        source: Expr,
        pixel: Expr,
    ) -> None:
        """Stream the stored blocks of one block row of one part."""
        plane, x = self._plane, self._x
        if self._packs:
            plane, x = acc.vectors * self._simd.lanes, self._panel
            source = -self._first_column(part) * plane

        def load(offset: Expr) -> Callable[[int], Expr]:
            start = scalar(source + offset, str(getattr(offset, "dtype", "int32")))
            return lambda v: x[ramp(start + v * self._simd.lanes, self._simd)]

        if not self._layout.sparse and self._packs:
            column, count = self._columns_of(part)
            with T.serial(0, count) as i:
                k = column + i
                acc.multiply_add(lambda row: self._data[block_row, k, row], load(k * plane))
            return
        if not self._layout.sparse:
            seen = self._taps_seen(pixel, acc.vectors) if self._rows_apart else None
            self._accumulate_dense(acc, part, block_row, load, plane, seen)
            return
        first = scalar(self._indptr[segment])
        count = scalar(self._indptr[segment + 1] - first)
        if self._asks_for_weights:
            self._ask_for_row(first, count)

        def offset_of(column: Expr) -> Expr:
            return column * plane if self._packs else self._offset_of(column, plane)

        if self._together > 1:
            self._accumulate_together(acc, first, count, lambda column: load(offset_of(column)))
            return
        with T.serial(0, count) as p:
            at = first + p
            if self._asks_for_weights and self._rows > 1:
                self._ask_for_block(at)
            offset = offset_of(scalar(self._indices[at]))
            acc.multiply_add(lambda row: self._data[at, 0, row], load(offset))

    def _accumulate_together(
        self, acc: Registers, first: Expr, count: Expr, x: Callable[[Expr], Callable[[int], Expr]]
    ) -> None:
        """The same for single weights, of which one load brings several."""
        together, data = self._together, flat(self._data)
        room = self._simd.accumulators // acc.vectors
        chains = max(1, min(room, -(-_CHAINS // acc.vectors)))
        sums = [acc, *(Registers(1, acc.vectors, self._simd) for _ in range(chains - 1))]
        for other in sums[1:]:
            other.fill(lambda *_: zero(self._simd))

        def add(into: Registers, column: Expr, value: Expr) -> None:
            vectors = x(column)
            for v in range(acc.vectors):
                into.set(0, v, into.get(0, v) + value * vectors(v))

        with T.serial(0, count // together) as i:
            at = scalar(first + i * together)
            values, columns = splats(data, at, self._simd), small_integers(self._indices, at)
            for step in range(together):
                add(sums[step % chains], columns[step], values[step])
        if not self._filled:
            with T.serial(0, count % together) as i:
                at = scalar(first + count // together * together + i)
                value = splat(data[at], self._simd)
                add(acc, scalar(self._indices[at], "int64"), value)
        if chains > 1:
            acc.fill(lambda row, v: reduce(operator.add, [s.get(row, v) for s in sums]))

    def _accumulate_dense(
        self,
        acc: Sums,
        part: Expr,
        block_row: Expr,
        load: Callable[[Expr], Any],
        plane: Expr,
        seen: tuple[Expr, Expr] | None = None,
    ) -> None:
        """All channels of a part, of which every tap counts, or those that are ``seen``."""
        first, channels = 0, self._images.channels
        if self._parts > 1:
            first = scalar(part * self._images.channels // self._parts)
            channels = scalar((part + 1) * self._images.channels // self._parts) - first
        with T.serial(0, channels) as i:
            channel = first + i
            if self._tap_offsets is None:
                acc.multiply_add(
                    partial(self._weight_at, block_row, channel), load(channel * plane)
                )
                return
            frames, taps = self._images.frames.kernel, self._images.window.taps
            offsets = self._tap_offsets

            def multiply(frame: Expr, tap: Expr) -> None:
                k = scalar((channel * frames + frame) * taps + tap)
                offset = channel * plane + offsets[tap]
                if frames > 1:
                    offset = offset + frame * self._images.frame(self._source)
                acc.multiply_add(partial(self._weight_at, block_row, k), load(offset))

            if seen is not None:
                start, stop = seen
                with T.serial(0, frames) as frame, T.serial(0, stop - start) as i:
                    multiply(frame, start + i)
                return
            # The window's taps are few enough for LLVM to unroll them, those of all images are not.
            with T.serial(0, frames) as frame, T.serial(0, taps) as tap:
                multiply(frame, tap)

    def _weight_at(self, block_row: Expr, k: Expr, row: int) -> Any:
        """What of a dense weight's row of a block meets column ``k``."""
        return self._data[block_row, k, row]

    @property
    def _rows_apart(self) -> bool:
        """Whether rows of taps are so far apart that many see nothing but padding."""
        window, height = self._images.window, self._images.source.height
        reach = max(abs(step) for step, _ in window.steps(0))
        return window.kernel[0] > 1 and isinstance(height, int) and reach * _FAR_ROWS > height

    def _taps_seen(self, pixel: Expr, size: int) -> tuple[Expr, Expr]:
        """The first tap that sees some pixel of the image, and the end of those that do.

        ``size`` vectors from ``pixel`` on are in rows ``top`` to ``bottom`` of the output.
        """
        window, image = self._images.window, self._images.source
        pitch, across = self._source.pitch, window.kernel[1]
        top = scalar(pixel // pitch)
        bottom = scalar((pixel + (size * self._simd.lanes - 1)) // pitch)
        above = below = tirx.const(0, "int32")
        for step, _ in window.steps(0):
            above = above + T.Cast("int32", bottom + step < 0)
            below = below + T.Cast("int32", top + step < image.height)
        return scalar(above * across), scalar(below * across)

    def _ask_for_row(self, first: Expr, count: Expr) -> None:
        """Ask for the indices, a little further on, that the next blocks will use, and for the
        weights if they are single ones: they are many in a line."""
        ahead = first + PREFETCH_BYTES // (4 * self._rows)
        if self._rows == 1:
            with T.serial(0, (count + (LANES - 1)) // LANES) as line:
                prefetch(self._data, (ahead + line * LANES, 0, 0))
        with T.serial(0, (count + 2 * LANES - 1) // (2 * LANES)) as line:
            prefetch(self._indices, (ahead + line * 2 * LANES,))

    def _ask_for_block(self, at: Expr) -> None:
        """Ask for the block that comes as much further on, one with the work of each: see
        :meth:`~sparse_tvm.schedules.cpu.stored_weight.StoredWeight.ask_for_block`."""
        prefetch(self._data, (at + PREFETCH_BYTES // (4 * self._rows), 0, 0))
