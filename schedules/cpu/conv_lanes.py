"""Dense convolutions of small images in planes, with output channels in lanes.

Rows of 14 or 7 pixels fill vectors badly: with the gaps between them, and at the plane's end, an
eighth to a quarter of all lanes computes nothing that is wanted. Here a vector has the weights of
as many rows, and is multiplied with single pixels, without gaps. They are where they are, whatever
the window's strides: the image is no other for this reader. The sums of a run of pixels
(:mod:`sparse_tvm.schedules.cpu.pixel_runs`) then are transposed in registers, and stored in planes
as all images are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Layout, Step
from sparse_tvm.schedules.cpu.block_arrays import JOBS_PER_GROUP
from sparse_tvm.schedules.cpu.conv_planes import ConvKernel
from sparse_tvm.schedules.cpu.image_output import ImageOutput
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    local,
    ramp,
    scalar,
    zero,
)
from sparse_tvm.schedules.cpu.pixel_runs import MOST_PIXELS, PixelRuns
from sparse_tvm.schedules.cpu.plane_code import one_of
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import LANES, Simd


def conv_lanes(
    images: Images,
    layout: Layout,
    epilogue: Sequence[Step],
    residuals: Sequence[Planes],
    simd: Simd,
    groups: int = 1,
) -> tirx.PrimFunc:
    """Build the kernel, for vectors of 16 lanes and images of known size.

    Its arguments are those of :func:`~sparse_tvm.schedules.cpu.conv_planes.conv_planes` for a
    dense weight, but x ``[batch, channels, source.size]`` is not by phases, and its pitch is its
    own; the layout's block has the rows of the weight that one, two or three vectors hold. Of
    ``groups``, the weight has the columns of one, and no block is of two.
    """
    out = (images.batch, images.out_channels, images.target)
    kernel = _Kernel(images, layout, simd, groups)
    return kernel.build(lambda: ImageOutput(*out, epilogue, residuals, simd))


class _Sums:
    """Sums of ``pixels`` by vectors of channels, of which those of a vector are transposed."""

    def __init__(self, pixels: int, vectors: int, simd: Simd) -> None:
        self._registers, self._simd = Registers(pixels, vectors, simd), simd
        self._registers.fill(lambda *_: zero(simd))

    def multiply_add(self, weight: Callable[[int], Expr], x: Callable[[int], Expr]) -> None:
        """Add the outer product of vectors of weights and single pixels."""
        self._registers.multiply_add(x, weight)

    def by_channel(self, vector: int, offsets: Sequence[int]) -> Registers:
        """Of each of a vector's channels the pixels as a vector, each as far in it as offset."""
        places = {offset: pixel for pixel, offset in enumerate(offsets)}
        turned = Registers(LANES, 1, self._simd)
        turned.fill(
            lambda lane, _: (
                self._registers.get(places[lane], vector) if lane in places else zero(self._simd)
            )
        )
        # Pairs of elements, of pairs, then of the fours that all of a vector's quads now are.
        for distance, (low, high) in ((1, _ELEMENTS), (2, _PAIRS), (4, _QUADS), (8, _QUADS)):
            turned = self._interleaved(turned, distance, low, high)
        found = Registers(LANES, 1, self._simd)
        found.fill(lambda channel, _: turned.get(_PLACES[channel], 0))
        return found

    def _interleaved(
        self, values: Registers, distance: int, low: Sequence[int], high: Sequence[int]
    ) -> Registers:
        """Of each two vectors so far apart, the lanes ``low`` and ``high`` of both in a row."""
        result = Registers(LANES, 1, self._simd)
        for i in range(LANES):
            if not i & distance:
                pair = [values.get(i, 0), values.get(i + distance, 0)]
                result.set(i, 0, tirx.Shuffle(pair, list(low)))
                result.set(i + distance, 0, tirx.Shuffle(pair, list(high)))
        return result


def _within_quads(picked: Sequence[int]) -> list[int]:
    """Lanes that a shuffle within quads takes: 4 and more are of the second vector."""
    return [
        quad + (lane if lane < 4 else LANES + lane - 4)
        for quad in range(0, LANES, 4)
        for lane in picked
    ]


def _of_quads(picked: Sequence[int]) -> list[int]:
    """Lanes that a shuffle of whole quads takes, of two vectors' eight."""
    return [4 * quad + lane for quad in picked for lane in range(4)]


_ELEMENTS = _within_quads((0, 4, 1, 5)), _within_quads((2, 6, 3, 7))
_PAIRS = _within_quads((0, 1, 4, 5)), _within_quads((2, 3, 6, 7))
_QUADS = _of_quads((0, 2, 4, 6)), _of_quads((1, 3, 5, 7))


def _place_of(channel: int) -> int:
    """Where the interleaving leaves a channel: its pair's bits swapped, then its quad's."""
    a, b, c, d = (channel >> bit & 1 for bit in range(4))
    return 2 * a + b + 4 * c + 8 * d


_PLACES = [_place_of(channel) for channel in range(LANES)]


class _Kernel(ConvKernel):
    """The loops over images, rows of the weight and runs of pixels."""

    def __init__(self, images: Images, layout: Layout, simd: Simd, groups: int) -> None:
        super().__init__(replace(images, channels=images.channels // groups), layout, simd)
        self._groups_of_channels = groups
        self._vectors = layout.block[0] // simd.lanes
        target = images.target
        most = MOST_PIXELS[self._vectors]
        self._runs = PixelRuns(target.height, target.width, target.pitch, most)

    @property
    def _units(self) -> Expr:
        return 1

    @property
    def _planes_read(self) -> int:
        return self._images.channels * self._groups_of_channels

    @property
    def _plane(self) -> Expr:
        return self._source.size

    def _table(self) -> Buffer:
        table, window = local(self._taps, "int32"), self._images.window
        for tap, (row, column) in enumerate(window.distances()):
            T.buffer_store(table, T.Cast("int32", row * self._source.pitch + column), [tap])
        return table

    def _jobs_of_unit(self, unit: Expr, job: Expr, last_job: Expr) -> None:
        runs = self._runs
        items = self._block_rows * runs.count
        start = scalar(job * items // JOBS_PER_GROUP)
        stop = scalar(last_job * items // JOBS_PER_GROUP)
        remainder = self._images.out_channels % self._rows
        with T.serial(0, stop - start) as i:
            row, run = scalar((start + i) // runs.count), scalar((start + i) % runs.count)

            def pixels(live: int) -> None:
                whole = partial(self._run_of, unit, row, run, live, runs.together)
                if runs.rest:
                    last = partial(self._run_of, unit, row, run, live, runs.rest)
                    one_of(run == runs.count - 1, last, whole)
                else:
                    whole()

            if remainder == 0:
                pixels(self._rows)
            else:
                is_whole = row < self._block_rows - 1
                one_of(is_whole, partial(pixels, self._rows), partial(pixels, remainder))

    def _run_of(self, image: Expr, row: Expr, run: Expr, live: int, lines: int) -> None:
        """Compute a run of so many lines for ``live`` rows of the weight."""
        images, runs, output, lanes = self._images, self._runs, self._output, self._simd.lanes
        pixels, (down, right) = runs.pixels(lines), images.window.stride
        start, channel = scalar(self._start(run, runs.pitch)), scalar(row * self._rows)
        plane = scalar(image * images.out_channels + channel)
        below = self._source.pitch * down
        source = scalar(
            self._source_of(image, 0)
            + self._first_channel(channel) * self._plane
            + self._start(run, below, right)
        )
        sums = _Sums(len(pixels), self._vectors, self._simd)
        output.ask_for(plane, live, start, 1)  # each plane's lines are far from others'

        def load(offset: Expr) -> Callable[[int], Expr]:
            at = scalar(source + offset)

            def pixel(i: int) -> Expr:
                down, across = pixels[i]
                return self._x[at + (down * below + across * right)]

            return pixel

        self._accumulate_dense(sums, 0, row, load, self._plane)
        written = self._count * lanes
        end = tirx.Select(run == runs.count - 1, written, self._start(run + 1, runs.pitch))
        stored = scalar(end - start)
        offsets = [down * runs.pitch + across for down, across in pixels]
        for vector in range(-(-live // lanes)):
            by_channel = sums.by_channel(vector, offsets)
            for lane in range(min(lanes, live - vector * lanes)):
                at = vector * lanes + lane
                if self._longest > lanes:
                    # What follows the vector up to the next run is a gap.
                    with T.If(stored > lanes), T.Then():
                        output.clear(plane + at, start + stored - lanes)
                value = by_channel.get(lane, 0)
                output.store(value, plane + at, channel + at, start, lanes=stored)
        self._clear(image, channel, channel + live, run)

    def _first_channel(self, out_channel: Expr) -> Expr:
        """The first channel of the group of an output channel."""
        if self._groups_of_channels == 1:
            return 0
        per_group = self._images.out_channels // self._groups_of_channels
        return scalar(out_channel // per_group * self._images.channels)

    def _start(self, run: Expr, below: Expr, right: int = 1) -> Expr:
        """How far a run's first pixel is from an image's, each row so far below the last one."""
        runs = self._runs
        row = run // runs.pieces * runs.together
        if runs.pieces == 1:
            return row * below
        column = tirx.min(run % runs.pieces * runs.length, runs.width - runs.length)
        return row * below + column * right

    @property
    def _longest(self) -> int:
        """Elements from a run to the next one, or to the end, at most."""
        runs, count = self._runs, self._runs.count
        written = -(-self._images.target.pixels // LANES) * LANES
        ends = [*map(runs.start, range(1, count)), written]
        return int(max(end - runs.start(run) for run, end in enumerate(ends)))

    def _weight_at(self, block_row: Expr, k: Expr, row: int) -> Expr:
        return self._data[block_row, k, ramp(row * self._simd.lanes, self._simd)]
