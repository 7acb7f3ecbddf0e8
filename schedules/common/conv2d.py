"""Convolutions as the lane matmul: pixels in SIMD lanes, the weight dense, CSR or BSR.

The image is first copied into planes with its padding around it (``pad_image``), one plane for
each phase of the stride. Output pixels then are numbered along the rows of such a plane, gaps
between output rows included, and whatever tap of the kernel multiplies a vector of pixels, its
operand is a vector of consecutive elements, at an offset that depends on channel and tap alone:
an im2col without the copies. A stored block of the weight carries that offset in place of its
column. A 1x1 convolution of stride 1 reads the image itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.common.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    Simd,
    argument,
    prim_func,
    ramp,
    scalar,
    symbol,
    zero,
)
from sparse_tvm.schedules.common.matmul import JOBS_PER_GROUP, WeightLayout, group_limit
from sparse_tvm.schedules.common.vector_math import ACTIVATIONS, constant, lanes_of

_SLACK = 64
"""Elements behind an image that vectors may read, for pixels that nobody stores."""


@dataclass(frozen=True)
class Conv2d:
    """The extents of a convolution of images ``[batch, channels, height, width]``.

    ``pads`` are top, left, bottom, right; all other pairs are vertical, horizontal.
    """

    channels: int
    size: tuple[int, int]
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def direct(self) -> bool:
        """Whether the image is read as it is, all of its rows as one."""
        return (
            self.kernel == (1, 1)
            and self.stride == (1, 1)
            and not any(self.pads)
            and self.size[0] * self.size[1] >= _SLACK
        )

    @property
    def out_size(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        height, width = (
            (self.size[i] + self.pads[i] + self.pads[i + 2] - reach - 1) // self.stride[i] + 1
            for i, reach in enumerate(self._reach)
        )
        return height, width

    @property
    def _reach(self) -> tuple[int, int]:
        """Distance from the first tap to the last."""
        height, width = ((self.kernel[i] - 1) * self.dilation[i] for i in (0, 1))
        return height, width

    @property
    def phases(self) -> list[tuple[int, int]]:
        """Which of every ``stride`` rows and columns the taps touch."""
        rows, columns = (
            dict.fromkeys(tap * self.dilation[i] % self.stride[i] for tap in range(self.kernel[i]))
            for i in (0, 1)
        )
        return [(row, column) for row in rows for column in columns]

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of one phase of one padded channel."""
        height, width = (self.out_size[i] + self._reach[i] // self.stride[i] for i in (0, 1))
        return height, width

    @property
    def channel_elements(self) -> int:
        """Elements from one channel of the image that is read to the next."""
        if self.direct:
            return self.size[0] * self.size[1]
        return len(self.phases) * self.plane[0] * self.plane[1]

    @property
    def image_elements(self) -> int:
        """Elements of the image that is read."""
        return self.channels * self.channel_elements + (0 if self.direct else _SLACK)

    @property
    def rows(self) -> tuple[int, int, int]:
        """Output rows, pixels in each, and pixels from one to the next, gaps included."""
        height, width = self.out_size
        return (
            (1, height * width, height * width) if self.direct else (height, width, self.plane[1])
        )

    def offsets(self) -> np.ndarray:
        """Where each ``(channel, tap)`` finds its operand for output pixel 0: int32 ``[K]``."""
        numbers = {phase: number for number, phase in enumerate(self.phases)}
        height, width = self.plane
        taps = []
        for i in range(self.kernel[0]):
            row, row_phase = divmod(i * self.dilation[0], self.stride[0])
            for j in range(self.kernel[1]):
                column, column_phase = divmod(j * self.dilation[1], self.stride[1])
                number = numbers[row_phase, column_phase]
                taps.append((number * height + row) * width + column)
        channels = np.arange(self.channels, dtype=np.int32) * self.channel_elements
        return (channels[:, None] + np.array(taps, np.int32)).reshape(-1)


@dataclass(frozen=True)
class _Tile:
    """Output pixels that share a pass over the weight: some rows, or a part of one."""

    rows: int
    columns: int

    def elements(self, pitch: int) -> int:
        """From the first pixel to the last, gaps included."""
        return (self.rows - 1) * pitch + self.columns


class _Tiling:
    """How a convolution's output rows are cut into tiles of at most ``vectors`` vectors."""

    def __init__(self, conv: Conv2d, vectors: int, simd: Simd) -> None:
        self._rows, self._width, self._pitch = conv.rows
        self._direct = conv.direct
        self._lanes = simd.lanes
        most = vectors * simd.lanes
        if self._width > most:
            self._parts = -(-self._width // most)
            in_vectors = -(-self._width // simd.lanes)
            self._full = _Tile(1, -(-in_vectors // self._parts) * simd.lanes)
            self.count = self._rows * self._parts
        else:
            self._parts = 1
            together = min(self._rows, 1 + (most - self._width) // self._pitch)
            self._full = _Tile(together, self._width)
            self.count = -(-self._rows // together)

    def visit(self, index: Expr, body: Callable[[_Tile, Expr, Expr], None]) -> None:
        """Call ``body(tile, first row, first column)`` for a tile: code for each shape it has."""
        if self._parts > 1:
            row, part = index // self._parts, index % self._parts
            start = self._full.columns * (self._parts - 1)
            last = self._width - start
            if self._direct:  # there is nothing to read behind the image: step back instead
                last = -(-last // self._lanes) * self._lanes
                start = self._width - last
            _either(
                part < self._parts - 1,
                lambda: body(self._full, row, part * self._full.columns),
                lambda: body(_Tile(1, last), row, start),
            )
            return
        together = self._full.rows
        rest = self._rows % together
        first = index * together
        if not rest:
            body(self._full, first, 0)
            return
        _either(
            index < self.count - 1,
            lambda: body(self._full, first, 0),
            lambda: body(_Tile(rest, self._width), first, 0),
        )


def _span(first: Expr, lanes: int) -> Expr:
    """Indices of some consecutive elements."""
    return T.ramp(first, 1, lanes) if lanes > 1 else first


def _either(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def _copy_channel(
    conv: Conv2d, x: Buffer, source: Sequence[Expr], target: Callable[[Expr], list[Expr]], y: Buffer
) -> None:
    """Copy one channel, ``x[*source, row, column]``, into its padded planes."""
    (height, width), (plane_rows, plane_columns) = conv.size, conv.plane
    with (
        T.serial(0, len(conv.phases) * plane_rows) as row,
        T.vectorized(0, plane_columns) as column,
    ):
        T.buffer_store(y, T.float32(0), target(row * plane_columns + column))
    for number, phase in enumerate(conv.phases):
        (first_row, rows), (first_column, columns) = (
            _inside(conv.pads[i] - phase[i], extent, conv.stride[i], conv.plane[i])
            for i, extent in enumerate((height, width))
        )
        if rows <= 0 or columns <= 0:
            continue
        with T.serial(0, rows) as i, T.vectorized(0, columns) as j:
            row, column = first_row + i, first_column + j
            from_row = row * conv.stride[0] + phase[0] - conv.pads[0]
            from_column = column * conv.stride[1] + phase[1] - conv.pads[1]
            at = (number * plane_rows + row) * plane_columns + column
            T.buffer_store(y, x[(*source, from_row, from_column)], target(at))


def _inside(before: int, extent: int, stride: int, plane: int) -> tuple[int, int]:
    """First index of a plane, and how many, that lie within the image and not in its padding."""
    first = max(0, -(-before // stride))
    last = min(plane - 1, (extent - 1 + before) // stride)
    return first, last - first + 1


def pad_image(conv: Conv2d, batch: Expr, shape: Sequence[Expr]) -> tirx.PrimFunc:
    """Build the kernel x of ``shape`` -> planes ``[batch, image_elements]``."""
    with prim_func() as result:
        x = argument("x", shape)
        y = argument("y", (batch, conv.image_elements))
        x = T.decl_buffer((batch, conv.channels, *conv.size), "float32", data=x.data)
        with T.parallel(0, batch * conv.channels) as job:
            image, channel = job // conv.channels, job % conv.channels
            start = channel * conv.channel_elements
            _copy_channel(conv, x, (image, channel), lambda at: [image, start + at], y)
    return result["func"]


class _Epilogue:
    """Steps behind a convolution: ``bias``, ``residual``, an activation, ``maximum:2.5``..."""

    def __init__(self, steps: Sequence[str], out_channels: int, shape: Sequence[Expr]) -> None:
        self._steps = [
            (step, argument(f"{step}_{i}", (out_channels,) if step == "bias" else shape))
            if step in ("bias", "residual")
            else (step, None)
            for i, step in enumerate(steps)
        ]

    def flatten(self, view: Callable[[Buffer], Buffer]) -> None:
        """See residuals as the output is seen."""
        self._steps = [
            (step, view(extra) if step == "residual" else extra) for step, extra in self._steps
        ]

    def apply(self, value: Expr, at: Sequence[Expr]) -> Expr:
        """All steps on a vector that goes to ``y[at]``."""
        for step, extra in self._steps:
            name, _, number = step.partition(":")
            if name == "bias":
                lanes = lanes_of(value)
                value = value + (T.broadcast(extra[at[1]], lanes) if lanes > 1 else extra[at[1]])
            elif name == "residual":
                value = value + extra[tuple(at)]
            elif number:
                value = getattr(tirx, name[:3])(value, constant(float(number), value))
            else:
                value = ACTIVATIONS[name](value)
        return value


def conv2d(
    conv: Conv2d,
    batch: Expr,
    shapes: tuple[Sequence[Expr], Sequence[Expr]],
    layout: WeightLayout,
    epilogue: Sequence[str],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order: the padded image ``[batch, image_elements]``, or, if
    ``conv.direct``, the image of ``shapes[0]``; the weight (dense: ``data``
    ``[ceil(out_channels / r), K, r]`` and ``offsets`` int32 ``[K]``; sparse: ``data``
    ``[blocks, 1, r]``, ``indices`` int32 ``[blocks]`` (offsets, not columns), ``indptr`` and
    ``partition`` as for :func:`~sparse_tvm.schedules.common.matmul.matmul`); one argument per
    ``bias`` or ``residual`` of the epilogue; the output, of ``shapes[1]``.
    """
    rows = layout.block[0]
    n_out, k_in = conv.out_channels, conv.channels * conv.kernel[0] * conv.kernel[1]
    block_rows = -(-n_out // rows)
    tiling = _Tiling(conv, group_limit(rows, simd) * simd.per_tile, simd)
    out_rows, width, pitch = conv.rows

    with prim_func() as result:
        image_shape = (batch, conv.image_elements)
        x = argument("x", shapes[0] if conv.direct else image_shape)
        if layout.sparse:
            blocks = symbol("blocks")
            data = argument("data", (blocks, 1, rows))
            indices = argument("indices", (blocks,), "int32")
            indptr = argument("indptr", (block_rows + 1,), "int32")
            partition = argument("partition", (JOBS_PER_GROUP + 1,), "int32")
        else:
            data = argument("data", (block_rows, k_in, rows))
            indices = argument("offsets", (k_in,), "int32")
        steps = _Epilogue(epilogue, n_out, shapes[1])
        y = argument("y", shapes[1])

        def flat(buffer: Buffer) -> Buffer:
            shape = (batch, n_out, out_rows * width)
            return T.decl_buffer(shape, "float32", data=buffer.data)

        x, y = T.decl_buffer(image_shape, "float32", data=x.data), flat(y)
        steps.flatten(flat)

        def accumulate(acc: Registers, block_row: Expr, image: Expr, pixel: Expr) -> None:
            def load(k: Expr) -> Callable[[int], Expr]:
                start = scalar(indices[k] + pixel)
                return lambda vector: x[image, ramp(start + vector * simd.lanes, simd)]

            if layout.sparse:
                first = scalar(indptr[block_row])
                with T.serial(0, scalar(indptr[block_row + 1]) - first) as p:
                    acc.multiply_add(lambda row: data[first + p, 0, row], load(first + p))
            else:
                with T.serial(0, k_in) as k:
                    acc.multiply_add(lambda row: data[block_row, k, row], load(k))

        def block_row_kernel(
            block_row: Expr, live: int, image: Expr, tile: _Tile, pixel: Expr, out: Expr
        ) -> None:
            """One block row for one tile whose first pixel is ``pixel``, stored from ``out`` on."""
            vectors = -(-tile.elements(pitch) // simd.lanes)
            acc = Registers(live, vectors, simd)
            acc.fill(lambda row, vector: zero(simd))
            accumulate(acc, block_row, image, pixel)

            def store(value: Expr, row: int, at: Expr) -> None:
                where = [image, block_row * rows + row, at]
                T.buffer_store(y, steps.apply(value, where), where)

            if tile.rows == 1 and tile.columns % simd.lanes == 0:
                for row in range(live):
                    for vector in range(vectors):
                        at = ramp(out + vector * simd.lanes, simd)
                        store(acc.get(row, vector), row, at)
                return
            gathered = T.alloc_buffer((vectors * simd.lanes,), "float32")
            for row in range(live):
                for vector in range(vectors):
                    at = ramp(vector * simd.lanes, simd)
                    T.buffer_store(gathered, acc.get(row, vector), [at])
                with T.serial(0, tile.rows) as line:
                    for start in range(0, tile.columns, simd.lanes):
                        lanes = min(simd.lanes, tile.columns - start)
                        value = gathered[_span(line * pitch + start, lanes)]
                        store(value, row, _span(out + line * width + start, lanes))

        with T.parallel(0, batch * tiling.count * JOBS_PER_GROUP) as job:
            part = scalar(job % JOBS_PER_GROUP)
            index = scalar(job // JOBS_PER_GROUP % tiling.count)
            image = scalar(job // (JOBS_PER_GROUP * tiling.count))
            if layout.sparse:
                start, stop = scalar(partition[part]), scalar(partition[part + 1])
            else:
                start = scalar(part * block_rows // JOBS_PER_GROUP)
                stop = scalar((part + 1) * block_rows // JOBS_PER_GROUP)

            def body(tile: _Tile, row: Expr, column: Expr) -> None:
                pixel, out = scalar(row * pitch + column), scalar(row * width + column)
                with T.serial(0, stop - start) as i:
                    block_row = scalar(start + i)

                    def kernel(live: int) -> None:
                        block_row_kernel(block_row, live, image, tile, pixel, out)

                    if n_out % rows:
                        _either(
                            block_row < block_rows - 1,
                            lambda: kernel(rows),
                            lambda: kernel(n_out % rows),
                        )
                    else:
                        kernel(rows)

            tiling.visit(index, body)
    return result["func"]


def depthwise_conv2d(
    conv: Conv2d,
    batch: Expr,
    shapes: tuple[Sequence[Expr], Sequence[Expr]],
    epilogue: Sequence[str],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel of a convolution in which each output channel reads one input channel.

    Arguments of the PrimFunc: x and y of ``shapes``, between them the weight
    ``[out_channels, taps]`` and one argument per ``bias`` or ``residual``. Each channel is padded
    in the cache of the core that computes it.
    """
    taps = conv.kernel[0] * conv.kernel[1]
    offsets = [int(offset) for offset in conv.offsets()[:taps]]
    multiplier = conv.out_channels // conv.channels
    tiling = _Tiling(conv, min(8, simd.accumulators), simd)
    out_rows, width, pitch = conv.rows

    with prim_func() as result:
        x = argument("x", shapes[0])
        w = argument("w", (conv.out_channels, taps))
        steps = _Epilogue(epilogue, conv.out_channels, shapes[1])
        y = argument("y", shapes[1])

        def flat(buffer: Buffer) -> Buffer:
            shape = (batch, conv.out_channels, out_rows * width)
            return T.decl_buffer(shape, "float32", data=buffer.data)

        x = T.decl_buffer((batch, conv.channels, *conv.size), "float32", data=x.data)
        y = flat(y)
        steps.flatten(flat)

        with T.parallel(0, batch * conv.out_channels) as job:
            image = scalar(job // conv.out_channels)
            channel = scalar(job % conv.out_channels)
            padded = T.alloc_buffer((conv.channel_elements + _SLACK,), "float32")
            _copy_channel(conv, x, (image, channel // multiplier), lambda at: [at], padded)

            def body(tile: _Tile, row: Expr, column: Expr) -> None:
                pixel, out = scalar(row * pitch + column), scalar(row * width + column)
                vectors = -(-tile.elements(pitch) // simd.lanes)
                acc = Registers(1, vectors, simd)
                acc.fill(lambda row, vector: zero(simd))
                for tap, offset in enumerate(offsets):

                    def load(vector: int, offset: int = offset) -> Expr:
                        return padded[ramp(pixel + (offset + vector * simd.lanes), simd)]

                    acc.multiply_add(lambda _, tap=tap: w[channel, tap], load)
                gathered = T.alloc_buffer((vectors * simd.lanes,), "float32")
                for vector in range(vectors):
                    at = ramp(vector * simd.lanes, simd)
                    T.buffer_store(gathered, acc.get(0, vector), [at])
                with T.serial(0, tile.rows) as line:
                    for start in range(0, tile.columns, simd.lanes):
                        lanes = min(simd.lanes, tile.columns - start)
                        value = gathered[_span(line * pitch + start, lanes)]
                        at = _span(out + line * width + start, lanes)
                        where = [image, channel, at]
                        T.buffer_store(y, steps.apply(value, where), where)

            with T.serial(0, tiling.count) as index:
                tiling.visit(index, body)
    return result["func"]
