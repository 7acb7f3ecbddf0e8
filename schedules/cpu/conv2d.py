"""Convolutions as the lane matmul: pixels in SIMD lanes, the weight dense, CSR or BSR.

The output is cut into tiles: some rows, or a part of one. Each job first copies the input that
its tile needs, padding included, into planes of its own, one for each channel and phase of the
stride. Pixels are numbered along the rows of such a plane, gaps between output rows included.
Whatever tap of the kernel multiplies a vector of pixels, its operand then is a vector of
consecutive elements, at an offset that depends on channel and tap alone: an im2col without the
copies of every tap. A stored block of the weight carries that offset in place of its column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Activation, Bias, Clamp, Layout, Residual, Step
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    argument,
    prim_func,
    ramp,
    scalar,
    span,
    symbol,
    zero,
)
from sparse_tvm.schedules.cpu.simd import Simd, group_limit
from sparse_tvm.schedules.cpu.vector_math import ACTIVATIONS, constant, lanes_of

_ENOUGH_JOBS = 16
_MAX_PARTS = 8
_UNROLLED_PHASES = 4
_CHANNELS_TOGETHER = 16
_DEPTHWISE_VECTORS = 8


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
    def out_size(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        height, width = (
            (self.size[i] + self.pads[i] + self.pads[i + 2] - self._last_tap(i) - 1)
            // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return height, width

    def _last_tap(self, axis: int) -> int:
        return (self.kernel[axis] - 1) * self.dilation[axis]

    def taps(self, axis: int) -> list[tuple[int, int]]:
        """For each tap along an axis how many strides away it is, and its phase."""
        return [
            divmod(tap * self.dilation[axis], self.stride[axis]) for tap in range(self.kernel[axis])
        ]

    def reach(self, axis: int, phase: int | None = None) -> int:
        """Strides from the first tap to the last one (of a phase)."""
        return max(steps for steps, other in self.taps(axis) if phase in (None, other))

    @property
    def phases(self) -> list[tuple[int, int]]:
        """Which of every ``stride`` rows and columns the taps touch."""
        rows, columns = (sorted({phase for _, phase in self.taps(axis)}) for axis in (0, 1))
        return [(row, column) for row in rows for column in columns]


@dataclass(frozen=True)
class _Tile:
    """Output pixels that share a pass over the weight.

    ``first_column`` is None where it varies; all columns of the input then exist.
    """

    rows: int
    columns: int
    first_column: int | None = 0


class Tiling:
    """How an output is cut into tiles, and where a tile's copy of the input has what.

    Attributes
    ----------
    count : int
        Tiles of one image.
    jobs : int
        Parts into which the weight's rows are divided, so that there is work for some threads.
    pitch, plane, elements : int
        Elements from one row to the next, in one plane, and in all of a tile's input.
    """

    def __init__(self, conv: Conv2d, vectors: int, simd: Simd, channels: int) -> None:
        self.conv = conv
        height, width = conv.out_size
        reach_down, reach_right = conv.reach(0), conv.reach(1)
        most = vectors * simd.lanes
        rows, columns, self._parts = 1, width, 1
        if width > most:
            self._parts = -(-width // most)
            columns = -(-width // (simd.lanes * self._parts)) * simd.lanes
            self._parts = -(-width // columns)
        else:
            rows = min(height, 1 + (most - width) // (width + reach_right))
        self._full = _Tile(rows, columns)
        self.count = self._parts * -(-height // rows)
        self.jobs = min(_MAX_PARTS, -(-_ENOUGH_JOBS // self.count))
        self.pitch = columns + reach_right
        self.plane = (rows + reach_down) * self.pitch
        self.elements = channels * len(conv.phases) * self.plane + simd.lanes

    def vectors(self, tile: _Tile, simd: Simd) -> int:
        """Vectors from a tile's first pixel to its last, gaps included."""
        return -(-((tile.rows - 1) * self.pitch + tile.columns) // simd.lanes)

    def offsets(self) -> np.ndarray:
        """Where each ``(channel, tap)`` finds its operand for a tile's first pixel: int32."""
        phases = {phase: number for number, phase in enumerate(self.conv.phases)}
        taps = [
            phases[row_phase, column_phase] * self.plane + row * self.pitch + column
            for row, row_phase in self.conv.taps(0)
            for column, column_phase in self.conv.taps(1)
        ]
        channels = np.arange(self.conv.channels, dtype=np.int32) * (len(phases) * self.plane)
        return (channels[:, None] + np.array(taps, np.int32)).reshape(-1)

    def visit(self, index: Expr, body: Callable[[_Tile, Expr, Expr], None]) -> None:
        """Call ``body(tile, first row, first column)`` for a tile: code for each kind there is."""
        height, width = self.conv.out_size
        if self._parts > 1:
            row, part = scalar(index // self._parts), scalar(index % self._parts)
            step, last = self._full.columns, self._full.columns * (self._parts - 1)
            tiles = [(part == self._parts - 1, _Tile(1, width - last, last), row, last)]
            if any(self.conv.pads):
                tiles.append((part == 0, _Tile(1, step, 0), row, 0))
            _first_that_holds([*tiles, (None, _Tile(1, step, None), row, part * step)], body)
            return
        together, rest = self._full.rows, height % self._full.rows
        full = (None, self._full, index * together, 0)
        short = (index == self.count - 1, _Tile(rest, width), index * together, 0)
        _first_that_holds([short, full] if rest else [full], body)


def _first_that_holds(
    cases: Sequence[tuple[Expr, _Tile, Expr, Expr]], body: Callable[[_Tile, Expr, Expr], None]
) -> None:
    (condition, *case), *others = cases
    if condition is None:
        body(*case)
        return
    _either(condition, lambda: body(*case), lambda: _first_that_holds(others, body))


def _either(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def tiling_of(conv: Conv2d, rows: int, simd: Simd) -> Tiling:
    """The tiling of a convolution whose kernel computes ``rows`` output channels at a time."""
    return Tiling(conv, group_limit(rows, simd) * simd.per_tile, simd, conv.channels)


def _pieces(start: int, stop: int, simd: Simd) -> list[tuple[int, int]]:
    """First element and length of the vectors from ``start`` to ``stop``."""
    return [(at, min(simd.lanes, stop - at)) for at in range(start, stop, simd.lanes)]


class _Copy:
    """Copies of a tile's input into planes of its own."""

    def __init__(self, tiling: Tiling, x: Buffer, planes: Buffer, simd: Simd) -> None:
        self._tiling, self._conv = tiling, tiling.conv
        self._x, self._planes, self._simd = x, planes, simd

    def channel(
        self, tile: _Tile, source: Sequence[Expr], row: Expr, column: Expr, number: Expr
    ) -> None:
        """Copy the channel ``x[*source]`` as the tile's ``number``-th."""
        phases = self._conv.phases
        first = number * (len(phases) * self._tiling.plane)
        if len(phases) <= _UNROLLED_PHASES or any(self._conv.pads):
            for i, phase in enumerate(phases):
                self._phase(tile, source, row, column, first + i * self._tiling.plane, *phase)
            return
        across = len({column for _, column in phases})
        with T.serial(0, len(phases)) as i:
            at = first + i * self._tiling.plane
            self._phase(tile, source, row, column, at, i // across, i % across)

    def _phase(
        self,
        tile: _Tile,
        source: Sequence[Expr],
        row: Expr,
        column: Expr,
        at: Expr,
        row_phase: Expr,
        column_phase: Expr,
    ) -> None:
        conv = self._conv
        (height, width), (down, right) = conv.size, conv.stride
        top, left, bottom, _ = conv.pads
        known = isinstance(row_phase, int)
        rows = tile.rows + conv.reach(0, row_phase if known else None)
        columns = tile.columns + conv.reach(1, column_phase if known else None)
        low, high = 0, columns
        if known and tile.first_column is not None:
            low = max(0, -(-(left - column_phase) // right) - tile.first_column)
            high = (width - 1 + left - column_phase) // right + 1 - tile.first_column
            high = max(low, min(columns, high))
        with T.serial(0, rows) as i:
            start = scalar(at + i * self._tiling.pitch)
            from_row = scalar((row + i) * down + (row_phase - top))
            from_column = scalar(column * right + (column_phase - left))

            def move() -> None:
                self._zero(start, 0, low)
                for piece, lanes in _pieces(low, high, self._simd):
                    index = span(from_column + piece * right, lanes, right)
                    value = self._x[(*source, from_row, index)]
                    T.buffer_store(self._planes, value, [span(start + piece, lanes)])
                self._zero(start, high, columns)

            if top or bottom:
                inside = tirx.all(from_row >= 0, from_row < height)
                _either(inside, move, lambda: self._zero(start, 0, columns))
            else:
                move()

    def _zero(self, start: Expr, first: int, stop: int) -> None:
        for piece, lanes in _pieces(first, stop, self._simd):
            nothing = T.broadcast(T.float32(0), lanes) if lanes > 1 else T.float32(0)
            T.buffer_store(self._planes, nothing, [span(start + piece, lanes)])


class _Output:
    """The output, and the steps before storing it."""

    def __init__(
        self, conv: Conv2d, batch: Expr, shape: Sequence[Expr], epilogue: Sequence[Step], simd: Simd
    ) -> None:
        """Declare the arguments of the epilogue, and then that of the output."""
        height, self._width = conv.out_size
        self._simd = simd

        def flat(buffer: Buffer) -> Buffer:
            pixels = (batch, conv.out_channels, height * self._width)
            return T.decl_buffer(pixels, "float32", data=buffer.data)

        arguments = {
            i: argument(f"{step}_{i}", (conv.out_channels,) if isinstance(step, Bias) else shape)
            for i, step in enumerate(epilogue)
            if step.operand
        }
        self._y = flat(argument("y", shape))
        self._steps: list[tuple[Step, Buffer]] = [
            (step, flat(arguments[i]) if isinstance(step, Residual) else arguments.get(i))
            for i, step in enumerate(epilogue)
        ]

    def store(
        self, acc: Registers, image: Expr, channel: Expr, tile: _Tile, pitch: int, first: Expr
    ) -> None:
        """Store a block of sums, one output channel per row, from pixel ``first`` on."""
        if self.is_whole(tile):
            self.store_whole(acc, image, channel, first)
            return
        gathered = T.alloc_buffer((acc.vectors * self._simd.lanes,), "float32")
        for row in range(acc.rows):
            self.gather(acc, row, gathered, 0)
            self.scatter(gathered, 0, [image, channel + row], tile, pitch, first)

    def is_whole(self, tile: _Tile) -> bool:
        """Whether a tile's vectors hold nothing but pixels of one output row."""
        return tile.rows == 1 and tile.columns % self._simd.lanes == 0

    def store_whole(self, acc: Registers, image: Expr, channel: Expr, first: Expr) -> None:
        """Store the sums of such a tile."""
        for row in range(acc.rows):
            for vector in range(acc.vectors):
                at = ramp(first + vector * self._simd.lanes, self._simd)
                self._store(acc.get(row, vector), [image, channel + row, at])

    def gather(self, acc: Registers, row: int, buffer: Buffer, start: Expr) -> None:
        """Put one channel's sums into memory, gaps between output rows included."""
        for vector in range(acc.vectors):
            at = ramp(start + vector * self._simd.lanes, self._simd)
            T.buffer_store(buffer, acc.get(row, vector), [at])

    def scatter(
        self, buffer: Buffer, base: Expr, to: list[Expr], tile: _Tile, pitch: int, first: Expr
    ) -> None:
        """Store one channel's output rows from there."""
        with T.serial(0, tile.rows) as line:
            for start, lanes in _pieces(0, tile.columns, self._simd):
                value = buffer[span(base + line * pitch + start, lanes)]
                at = span(first + line * self._width + start, lanes)
                self._store(value, [*to, at])

    def _store(self, value: Expr, at: Sequence[Expr]) -> None:
        lanes = lanes_of(value)
        for step, extra in self._steps:
            if isinstance(step, Bias):
                value = value + (T.broadcast(extra[at[1]], lanes) if lanes > 1 else extra[at[1]])
            elif isinstance(step, Residual):
                value = value + extra[tuple(at)]
            elif isinstance(step, Clamp):
                if step.low is not None:
                    value = tirx.max(value, constant(step.low, value))
                if step.high is not None:
                    value = tirx.min(value, constant(step.high, value))
            else:
                assert isinstance(step, Activation), step
                value = ACTIVATIONS[step.function](value)
        T.buffer_store(self._y, value, at)


def conv2d(
    conv: Conv2d,
    batch: Expr,
    shapes: tuple[Sequence[Expr], Sequence[Expr]],
    layout: Layout,
    epilogue: Sequence[Step],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order: the image, of ``shapes[0]``; the weight (dense: ``data``
    ``[ceil(out_channels / r), K, r]`` and ``offsets`` int32 ``[K]``; sparse: ``data``
    ``[blocks, 1, r]``, ``indices`` int32 ``[blocks]`` (offsets, not columns), ``indptr`` and
    ``partition`` as for :func:`~sparse_tvm.schedules.cpu.matmul.matmul`, but into
    ``Tiling.jobs`` parts); one argument per ``bias`` or ``residual`` of the epilogue; the output,
    of ``shapes[1]``.
    """
    rows = layout.block[0]
    n_out, k_in = conv.out_channels, conv.channels * conv.kernel[0] * conv.kernel[1]
    block_rows = -(-n_out // rows)
    tiling = tiling_of(conv, rows, simd)
    jobs = tiling.jobs

    with prim_func() as result:
        x = argument("x", shapes[0])
        if layout.sparse:
            blocks = symbol("blocks")
            data = argument("data", (blocks, 1, rows))
            indices = argument("indices", (blocks,), "int32")
            indptr = argument("indptr", (block_rows + 1,), "int32")
            partition = argument("partition", (jobs + 1,), "int32")
        else:
            data = argument("data", (block_rows, k_in, rows))
            indices = argument("offsets", (k_in,), "int32")
        output = _Output(conv, batch, shapes[1], epilogue, simd)
        x = T.decl_buffer((batch, conv.channels, *conv.size), "float32", data=x.data)

        def accumulate(acc: Registers, block_row: Expr, planes: Buffer) -> None:
            def load(k: Expr) -> Callable[[int], Expr]:
                start = scalar(indices[k])
                return lambda vector: planes[ramp(start + vector * simd.lanes, simd)]

            if layout.sparse:
                first = scalar(indptr[block_row])
                with T.serial(0, scalar(indptr[block_row + 1]) - first) as p:
                    acc.multiply_add(lambda row: data[first + p, 0, row], load(first + p))
            else:
                with T.serial(0, k_in) as k:
                    acc.multiply_add(lambda row: data[block_row, k, row], load(k))

        with T.parallel(0, batch * (tiling.count * jobs)) as job:
            part = scalar(job % jobs)
            index = scalar(job // jobs % tiling.count)
            image = scalar(job // (jobs * tiling.count))
            if layout.sparse:
                start, stop = scalar(partition[part]), scalar(partition[part + 1])
            else:
                start = scalar(part * block_rows // jobs)
                stop = scalar((part + 1) * block_rows // jobs)
            planes = T.alloc_buffer((tiling.elements,), "float32")
            copy = _Copy(tiling, x, planes, simd)

            def body(tile: _Tile, row: Expr, column: Expr) -> None:
                with T.serial(0, conv.channels) as channel:
                    copy.channel(tile, (image, channel), row, column, channel)
                pixel = scalar(row * conv.out_size[1] + column)

                def kernel(block_row: Expr, live: int) -> None:
                    acc = Registers(live, tiling.vectors(tile, simd), simd)
                    acc.fill(lambda row, vector: zero(simd))
                    accumulate(acc, block_row, planes)
                    output.store(acc, image, block_row * rows, tile, tiling.pitch, pixel)

                with T.serial(0, stop - start) as i:
                    block_row = scalar(start + i)
                    if n_out % rows:
                        _either(
                            block_row < block_rows - 1,
                            lambda: kernel(block_row, rows),
                            lambda: kernel(block_row, n_out % rows),
                        )
                    else:
                        kernel(block_row, rows)

            tiling.visit(index, body)
    return result["func"]


def depthwise_conv2d(
    conv: Conv2d,
    batch: Expr,
    shapes: tuple[Sequence[Expr], Sequence[Expr]],
    epilogue: Sequence[Step],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel of a convolution in which each output channel reads one input channel.

    Arguments of the PrimFunc: x and y of ``shapes``, between them the weight
    ``[out_channels, taps]`` and one argument per ``bias`` or ``residual``.
    """
    multiplier = conv.out_channels // conv.channels
    together = next(g for g in range(_CHANNELS_TOGETHER, 0, -1) if conv.out_channels % g == 0)
    tiling = Tiling(conv, min(_DEPTHWISE_VECTORS, simd.accumulators), simd, together)
    taps = conv.kernel[0] * conv.kernel[1]
    offsets = [int(offset) for offset in tiling.offsets()[:taps]]
    per_channel = len(conv.phases) * tiling.plane

    with prim_func() as result:
        x = argument("x", shapes[0])
        w = argument("w", (conv.out_channels, taps))
        output = _Output(conv, batch, shapes[1], epilogue, simd)
        x = T.decl_buffer((batch, conv.channels, *conv.size), "float32", data=x.data)

        with T.parallel(0, batch * (conv.out_channels // together)) as job:
            image = scalar(job // (conv.out_channels // together))
            first = scalar(job % (conv.out_channels // together) * together)
            planes = T.alloc_buffer((tiling.elements,), "float32")
            copy = _Copy(tiling, x, planes, simd)

            def body(tile: _Tile, row: Expr, column: Expr) -> None:
                # Loads that overlap several recent stores wait for them to reach the cache:
                # hence each step for all channels before the next step.
                vectors = tiling.vectors(tile, simd)
                width = vectors * simd.lanes
                gathered = T.alloc_buffer((together * width,), "float32")
                pixel = scalar(row * conv.out_size[1] + column)
                with T.serial(0, together) as i:
                    source = (image, (first + i) // multiplier)
                    copy.channel(tile, source, row, column, i)
                with T.serial(0, together) as i:
                    acc = Registers(1, vectors, simd)
                    acc.fill(lambda row, vector: zero(simd))
                    for tap, offset in enumerate(offsets):

                        def load(vector: int, offset: int = offset) -> Expr:
                            start = i * per_channel + (offset + vector * simd.lanes)
                            return planes[ramp(start, simd)]

                        def weight(row: int, tap: int = tap) -> Expr:
                            return w[first + i, tap]

                        acc.multiply_add(weight, load)
                    if output.is_whole(tile):
                        output.store_whole(acc, image, first + i, pixel)
                    else:
                        output.gather(acc, 0, gathered, i * width)
                if not output.is_whole(tile):
                    with T.serial(0, together) as i:
                        to = [image, first + i]
                        output.scatter(gathered, i * width, to, tile, tiling.pitch, pixel)

            with T.serial(0, tiling.count) as index:
                tiling.visit(index, body)
    return result["func"]
