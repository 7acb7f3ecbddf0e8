"""Images into planes, between planes, and out of them: all conversions of the layout of images.

One kernel serves them all: rows move from where the source has them to where the target wants
them, one phase of the window after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    argument,
    prim_func,
    ramp,
    scalar,
    span,
    splat,
    zero,
)
from sparse_tvm.schedules.cpu.plane_code import Extents, declare_sizes, deinterleaved, flat
from sparse_tvm.schedules.cpu.planes import Border, Image, Planes, Window
from sparse_tvm.schedules.cpu.simd import LANES, Simd

_VECTOR_STEP = 2
"""The largest step along a row for which there are vectors."""

READ_BEYOND = Border(tail=(0, 2 * LANES))
"""What a conversion touches around planes so as to move whole vectors, of every other column."""


def image_pack(
    batch: Expr,
    channels: int,
    source: Image,
    target: Image,
    window: Window,
    sizes: Sequence[Any],
    simd: Simd,
    words: bool = False,
) -> tirx.PrimFunc:
    """Build the kernel x ``[batch, channels, source.size]`` -> y, the phases that `window` reads.

    ``y`` is ``[batch, channels * phases, target.size]``. ``sizes`` are the symbols that extents
    depend on: arguments between x and y. Planes of words move as those of float32 do; what pads
    them is ``fill`` int32 ``[1]``, an argument in front of y.
    """
    phases, (down, right) = window.phases, window.stride
    dtype = "int32" if words else "float32"
    with prim_func() as result:
        x = argument("x", (batch, channels, source.size), dtype)
        declare_sizes(sizes)
        filled = argument("fill", (1,), "int32") if words else None
        y = argument("y", (batch, channels * len(phases), target.size), dtype)
        x, y = flat(x), flat(y)
        with T.parallel(0, batch * channels) as job:
            here, there = Extents(source), Extents(target)
            fill = zero(simd) if filled is None else splat(filled[0], simd)
            mover = _Rows(x, y, source, target, window, fill, simd)

            def move(number: Expr, row_phase: Expr, column_phase: Expr) -> None:
                plane = scalar((job * len(phases) + number) * there.size)
                if isinstance(target, Planes):
                    _clear(y, plane, there.size, fill, simd)
                with T.serial(0, there.height) as row:
                    from_row = scalar(row * down + row_phase)
                    with T.If(from_row < here.height), T.Then():
                        begin = scalar(job * here.size + here.first + from_row * here.pitch)
                        start = scalar(plane + there.first + row * there.pitch)
                        mover.move(begin, column_phase, start)

            _each_phase(phases, right <= _VECTOR_STEP, move)
    return result["func"]


def _clear(y: Buffer, plane: Expr, size: Expr, fill: Expr, simd: Simd) -> None:
    with T.serial(0, size // simd.lanes) as i:
        T.buffer_store(y, fill, [ramp(plane + i * simd.lanes, simd)])


def _each_phase(
    phases: Sequence[tuple[int, int]], unrolled: bool, move: Callable[[Expr, Expr, Expr], None]
) -> None:
    """Call ``move(number, row phase, column phase)`` in a loop, or with code for each."""
    across = len({column for _, column in phases})
    regular = all(phase == divmod(number, across) for number, phase in enumerate(phases))
    if regular and not unrolled:
        with T.serial(0, len(phases)) as number:
            move(number, scalar(number // across), scalar(number % across))
        return
    for number, phase in enumerate(phases):
        move(number, *phase)


class _Rows:
    """Moves single rows, every ``step``-th of their columns."""

    def __init__(
        self,
        x: Buffer,
        y: Buffer,
        source: Image,
        target: Image,
        window: Window,
        fill: Expr,
        simd: Simd,
    ) -> None:
        step, self._apart = window.stride[1], window.apart
        self._x, self._y, self._step, self._simd, self._fill = x, y, step, simd, fill
        self._width, self._target_width = source.width, target.width
        self._beyond = (
            isinstance(source, Planes)
            and isinstance(target, Planes)
            and step <= _VECTOR_STEP
            and source.border.merged(READ_BEYOND) == source.border
        )

    def move(self, begin: Expr, phase: Expr, start: Expr) -> None:
        """Move the row at ``x[begin]``, its columns of one phase, to ``y[start]``."""
        lanes, step = self._simd.lanes, self._step
        if self._apart:
            shift = int(phase)
            room = smaller(self._width - max(0, shift), self._target_width - max(0, -shift))
            self._copy(begin + max(0, shift), start + max(0, -shift), room)
            return
        count = smaller((self._width - phase + step - 1) // step, self._target_width)
        if self._beyond:
            with T.serial(0, (count + lanes - 1) // lanes) as i:
                left = T.Cast("int32", count - i * lanes)
                inside = T.ramp(tirx.const(0, "int32"), 1, lanes) < T.broadcast(left, lanes)
                value = tirx.Select(inside, self._vector(begin, phase, i), self._fill)
                T.buffer_store(self._y, value, [ramp(start + i * lanes, self._simd)])
            return
        whole = (
            smaller(self._width // (step * lanes), count // lanes) if step <= _VECTOR_STEP else 0
        )
        if step <= _VECTOR_STEP:
            with T.serial(0, whole) as i:
                value = self._vector(begin, phase, i)
                T.buffer_store(self._y, value, [ramp(start + i * lanes, self._simd)])
        rest = count - whole * lanes
        from_here, to = begin + phase + whole * lanes * step, start + whole * lanes
        if isinstance(rest, int) and rest <= LANES:
            if rest:
                T.buffer_store(self._y, self._x[span(from_here, rest, step)], [span(to, rest)])
            return
        with T.serial(0, rest) as i:
            T.buffer_store(self._y, self._x[from_here + i * step], [to + i])

    def _copy(self, begin: Expr, start: Expr, count: Expr) -> None:
        """Copy consecutive elements, if there are any."""
        lanes = self._simd.lanes
        whole = scalar(tirx.max(count, 0) // lanes)
        with T.serial(0, whole) as i:
            value = self._x[ramp(begin + i * lanes, self._simd)]
            T.buffer_store(self._y, value, [ramp(start + i * lanes, self._simd)])
        with T.serial(0, tirx.max(count, 0) - whole * lanes) as i:
            at = whole * lanes + i
            T.buffer_store(self._y, self._x[begin + at], [start + at])

    def _vector(self, begin: Expr, phase: Expr, i: Expr) -> Expr:
        at = begin + i * (self._simd.lanes * self._step)
        if self._step == 1:
            return self._x[ramp(at, self._simd)]
        return deinterleaved(self._x, at, self._simd)[phase]


def smaller(a: Expr, b: Expr) -> Expr:
    """The smaller of two extents."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.min(a, b)
