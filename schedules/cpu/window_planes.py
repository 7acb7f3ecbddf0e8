"""Depthwise convolutions and pooling of images in planes: each channel on its own.

With a stride of one, a window moves along a plane as along one long row; with another, along each
row. A row is read once, in whole vectors: the taps of one column of the window share a sum, and
sums of neighbouring columns are shifted against each other at the end, by lanes that come from
the vector before or behind. Where rows are few and short, a window is wider than a vector, or its
weights do not fit into registers, each tap loads its operand itself, for several vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

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
)
from sparse_tvm.schedules.cpu.plane_code import (
    Extents,
    declare_sizes,
    deinterleaved,
    flat,
    in_groups,
    vectors_of,
)
from sparse_tvm.schedules.cpu.planes import Planes, Window
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.windows import DIRECT_VECTORS, MEAN, Operation, rolls

_TAPS_IN_REGISTERS = 9


def window_planes(
    images: Images,
    operation: Operation,
    epilogue: Sequence[Step],
    residuals: Sequence[Planes],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order: x ``[batch, channels, source.size]``, not by phases; for
    a depthwise convolution the weight ``[out_channels, taps]``; ``sizes``; then as
    :class:`~sparse_tvm.schedules.cpu.image_output.ImageOutput` says.
    """
    window, target = images.window, images.target
    multiplier = images.out_channels // images.channels
    along_plane = not window.strided
    with prim_func() as result:
        x = argument("x", (images.batch, images.channels, images.source.size))
        w = None
        if operation.weighted:
            w = argument("w", (images.out_channels, window.taps))
        declare_sizes(images.sizes)
        outputs = (images.batch, images.out_channels, target)
        output = ImageOutput(*outputs, epilogue, residuals, simd)
        x = flat(x)
        with T.parallel(0, images.batch * images.out_channels) as plane:
            output.open()
            source, there = Extents(images.source), output.extents
            channel = scalar(plane % images.out_channels)
            start = scalar(plane // multiplier * source.size + source.first)
            row = _Row(x, w, source, window, operation, output, plane, channel, simd)
            output.clear_border(plane, scalar(target.pixels) // simd.lanes * simd.lanes)
            if along_plane:
                count = vectors_of(target, simd)
                row.compute(start, 0, count, wraps=True)
            else:
                count = scalar((there.width + (simd.lanes - 1)) // simd.lanes)
                whole = scalar((there.pitch + (simd.lanes - 1)) // simd.lanes)
                with T.serial(0, there.height) as line:
                    begin = scalar(start + line * (window.stride[0] * source.pitch))
                    pixel = scalar(line * there.pitch)
                    row.compute(begin, pixel, count, wraps=False)
                    if target.border.padded:
                        with T.serial(0, whole - count) as i:
                            output.clear(plane, pixel + (count + i) * simd.lanes)
    return result["func"]


class _Row:
    """Code for a run of output pixels that are consecutive, as what they read is."""

    def __init__(
        self,
        x: Buffer,
        w: Buffer | None,
        source: Extents,
        window: Window,
        operation: Operation,
        output: ImageOutput,
        plane: Expr,
        channel: Expr,
        simd: Simd,
    ) -> None:
        self._x, self._source, self._window, self._operation = x, source, window, operation
        self._output, self._plane, self._channel, self._simd = output, plane, channel, simd
        self._weights = self._load_weights(w) if w is not None else None

    def _load_weights(self, w: Buffer) -> Callable[[int], Expr]:
        taps = self._window.taps
        if taps > _TAPS_IN_REGISTERS or self._simd.few_registers:
            return lambda tap: splat(w[self._channel, tap], self._simd)
        kept = Registers(1, taps, self._simd)
        kept.fill(lambda _, tap: splat(w[self._channel, tap], self._simd))
        return lambda tap: kept.get(0, tap)

    def compute(self, start: Expr, pixel: Expr, count: Expr, *, wraps: bool) -> None:
        """Compute ``count`` vectors of pixels from ``pixel`` on, whose first is ``x[start]``.

        ``wraps`` tells whether what lies in front of the first vector is read as any other.
        """
        if rolls(self._window, count, self._operation, self._simd):
            self._roll(start, pixel, count, wraps)
            return
        in_groups(count, DIRECT_VECTORS, partial(self._direct, start, pixel))

    def _direct(self, start: Expr, pixel: Expr, first: Expr, size: int) -> None:
        lanes, step = self._simd.lanes, self._window.stride[1]
        acc = Registers(1, size, self._simd)
        acc.fill(lambda *_: self._fresh())
        for tap, (row, column) in enumerate(self._window.distances()):
            at = scalar(start + row * self._source.pitch + column + first * (lanes * step))
            for v in range(size):
                value = self._x[span(at + v * lanes * step, lanes, step)]
                acc.set(0, v, self._add(acc.get(0, v), tap, value))
        for v in range(size):
            self._store(acc.get(0, v), pixel + (first + v) * lanes)

    def _fresh(self) -> Expr:
        if self._operation.weighted:
            return self._output.start(self._channel)
        return self._identity()

    def _identity(self) -> Expr:
        return splat(T.float32(self._operation.identity), self._simd)

    def _add(self, total: Expr, tap: int, value: Expr) -> Expr:
        weighted = self._weights(tap) * value if self._weights is not None else value
        return self._combine(total, weighted)

    def _combine(self, total: Expr, value: Expr) -> Expr:
        return tirx.max(total, value) if self._operation.name == "max" else total + value

    def _store(self, value: Expr, pixel: Expr) -> None:
        if self._operation is MEAN:
            value = value * splat(T.float32(1 / self._window.taps), self._simd)
        store = self._output.finish if self._operation.weighted else self._output.store
        store(value, self._plane, self._channel, pixel)

    def _roll(self, start: Expr, pixel: Expr, count: Expr, wraps: bool) -> None:
        lanes = self._simd.lanes
        steps = sorted({step for step, _ in self._window.steps(1)})
        before = [step for step in steps if step < 0]
        behind = [step for step in steps if step > 0]
        last = {step: Registers(1, 1, self._simd) for step in (*before, *behind)}
        ready = Registers(1, 1, self._simd)  # the last vector's sums but for those behind it

        def keep(sums: dict[int, Registers]) -> None:
            for step, kept in last.items():
                kept.set(0, 0, sums[step].get(0, 0))

        def advance(sums: dict[int, Registers]) -> None:
            parts = [sums[0].get(0, 0)] if 0 in sums else [self._fresh()]
            for step in before:
                pair = [last[step].get(0, 0), sums[step].get(0, 0)]
                parts.append(_lanes(pair, lanes + step, lanes))
            ready.set(0, 0, reduce(self._combine, parts))
            keep(sums)

        def finish(vector: Expr, sums: dict[int, Registers]) -> None:
            parts = [ready.get(0, 0)]
            for step in behind:
                pair = [last[step].get(0, 0), sums[step].get(0, 0)]
                parts.append(_lanes(pair, step, lanes))
            self._store(reduce(self._combine, parts), pixel + vector * lanes)

        if before and wraps:
            sums = self._sums(start, -1, before)
            for step in before:
                last[step].set(0, 0, sums[step].get(0, 0))
        else:
            for step in before:
                last[step].set(0, 0, self._identity())
        advance(self._sums(start, 0, steps))
        with T.serial(0, count - 1) as i:
            sums = self._sums(start, i + 1, steps)
            finish(i, sums)
            advance(sums)
        finish(count - 1, self._sums(start, count, behind))

    def _sums(self, start: Expr, vector: Expr, steps: Sequence[int]) -> dict[int, Registers]:
        """For each step, the sum over its columns of the window, of one vector of pixels."""
        window, lanes = self._window, self._simd.lanes
        sums = {step: Registers(1, 1, self._simd) for step in steps}
        columns = list(enumerate(window.steps(1)))
        empty = set(steps)
        for row in range(window.kernel[0]):
            down = row * window.dilation[0] - window.pads[0]
            at = scalar(start + down * self._source.pitch + vector * (lanes * window.stride[1]))
            phases = self._phases(at, {phase for _, (step, phase) in columns if step in sums})
            for column, (step, phase) in columns:
                if step not in sums:
                    continue
                total = sums[step].get(0, 0)
                if step in empty:
                    empty.remove(step)
                    total = self._fresh() if step == 0 else self._identity()
                tap = row * window.kernel[1] + column
                sums[step].set(0, 0, self._add(total, tap, phases[phase].get(0, 0)))
        return sums

    def _phases(self, at: Expr, wanted: set[int]) -> dict[int, Registers]:
        """Vectors of the columns of each phase."""
        values: Any = [self._x[ramp(at, self._simd)]]
        loaded = {phase: Registers(1, 1, self._simd) for phase in wanted}
        if self._window.stride[1] == 2:
            values = deinterleaved(self._x, at, self._simd)
        for phase, register in loaded.items():
            register.set(0, 0, values[phase])
        return loaded


def _lanes(pair: Sequence[Expr], first: int, lanes: int) -> Expr:
    """The lanes from ``first`` on of two vectors side by side."""
    return tirx.Shuffle(pair, [tirx.const(i, "int32") for i in range(first, first + lanes)])
