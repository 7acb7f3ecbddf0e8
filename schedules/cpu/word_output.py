"""What becomes of the integer sums of a convolution: bytes in planes of words, or float32.

One product and one sum for each output channel are all of the scales, zero points and biases of a
quantised convolution: ``sums * factor + offset``, in steps of the output's scale, or in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Step
from sparse_tvm.schedules.cpu.image_output import ImageOutput
from sparse_tvm.schedules.cpu.lane_tiles import Expr, argument, ramp, scalar, splat
from sparse_tvm.schedules.cpu.low_precision import int8_quad
from sparse_tvm.schedules.cpu.plane_code import Extents, clear_border, flat
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.vector_math import lanes_of
from sparse_tvm.schedules.cpu.word_planes import BYTES

PackBytes = Callable[[Sequence[Expr]], Expr]
"""Four vectors of float32 to one of words: each to the nearest byte, from 0 to 255."""


def plain_bytes(values: Sequence[Expr]) -> Expr:
    """The packing in plain arithmetic."""
    lanes = lanes_of(values[0])
    low, high = (T.broadcast(T.float32(end), lanes) for end in (0, 255))
    bounded = [tirx.min(tirx.max(value, low), high) for value in values]
    return int8_quad(bounded, lanes, zero_point=0)


class Output(Protocol):
    """Where a kernel's sums go; made where its last arguments are to be declared."""

    def open(self) -> None:
        """Compute extents here, in the body of a loop over jobs."""

    def finish(self, sums: Sequence[Expr], image: Expr, channel: Expr, pixel: Expr) -> None:
        """Finish a vector of pixels of the four channels from ``channel`` on, and store it."""

    def clear_borders(self, image: Expr, channel: Expr, stop: Expr, written: Expr) -> None:
        """Write what surrounds the ``written`` elements of some channels, if that is read.

        They are all from ``channel`` to ``stop``, as far as there are.
        """


class WordOutput:
    """Bytes. Arguments: ``factor``, ``offset``, the mask if padded, ``limits``, the output.

    ``limits`` float32 ``[3]`` are the least byte, the largest, and the one that stands for zero.
    """

    def __init__(
        self, batch: Expr, planes: int, target: Planes, simd: Simd, pack: PackBytes
    ) -> None:
        self._target, self._simd, self._planes, self._pack = target, simd, planes, pack
        self._factor = argument("factor", (planes * BYTES,))
        self._offset = argument("offset", (planes * BYTES,))
        padded = target.border.padded
        self._mask = argument("mask", (target.room,), "int32") if padded else None
        self._limits = argument("limits", (3,))
        self._declared = argument("y", (batch, planes, target.size), "int32")

    def open(self) -> None:
        """Compute extents here, in the body of a loop over jobs."""
        self._y, self._extents = flat(self._declared), Extents(self._target)

    def _fill(self) -> Expr:
        return fill_vector(self._limits[2], self._simd)

    def _plane(self, image: Expr, channel: Expr) -> Expr:
        return (image * self._planes + channel // BYTES) * self._extents.size

    def finish(self, sums: Sequence[Expr], image: Expr, channel: Expr, pixel: Expr) -> None:
        """Round a vector of pixels of four channels, and store it."""
        words = self._pack(
            [
                scaled(total, self._factor[channel + i], self._offset[channel + i], self._simd)
                for i, total in enumerate(sums)
            ]
        )
        words = bounded(words, self._limits[0], self._limits[1], self._simd)
        if self._mask is not None:
            words = kept(words, self._mask[ramp(pixel, self._simd)], self._fill())
        at = self._plane(image, channel) + self._extents.first + pixel
        T.buffer_store(self._y, words, [ramp(at, self._simd)])

    def clear_borders(self, image: Expr, channel: Expr, stop: Expr, written: Expr) -> None:
        """Fill planes around the ``written`` words, if they are padded."""
        if self._mask is not None:
            last = tirx.min(stop, self._planes * BYTES)
            with T.serial(0, (last - channel) // BYTES) as i:
                plane = scalar(self._plane(image, channel + i * BYTES))
                clear_border(self._y, plane, self._extents, written, self._simd, self._fill())


class FloatOutput:
    """float32 in planes, after an epilogue.

    Arguments: ``factor`` and ``offset``, then those of ``ImageOutput``.
    """

    def __init__(
        self,
        batch: Expr,
        channels: int,
        target: Planes,
        epilogue: Sequence[Step],
        residuals: Sequence[Planes],
        simd: Simd,
    ) -> None:
        self._channels, self._simd = channels, simd
        padded = -(-channels // BYTES) * BYTES
        self._factor, self._offset = (argument(n, (padded,)) for n in ("factor", "offset"))
        self._output = ImageOutput(batch, channels, target, epilogue, residuals, simd)

    def open(self) -> None:
        """Compute extents here, in the body of a loop over jobs."""
        self._output.open()

    def finish(self, sums: Sequence[Expr], image: Expr, channel: Expr, pixel: Expr) -> None:
        """Store those of the four channels that there are."""
        for i, total in enumerate(sums):
            one = channel + i
            with T.If(one < self._channels), T.Then():
                value = scaled(total, self._factor[one], self._offset[one], self._simd)
                self._output.store(value, image * self._channels + one, one, pixel)

    def clear_borders(self, image: Expr, channel: Expr, stop: Expr, written: Expr) -> None:
        """Clear the padding of those channels that there are."""
        self._output.clear_borders(image, channel, stop, written)


def scaled(sums: Expr, factor: Expr, offset: Expr, simd: Simd) -> Expr:
    """Integers times a factor, and an offset."""
    return T.Cast(f"float32x{simd.lanes}", sums) * splat(factor, simd) + splat(offset, simd)


def bounded(words: Expr, low: Expr, high: Expr, simd: Simd) -> Expr:
    """Words whose bytes are within bounds, float32."""
    dtype = f"uint8x{BYTES * simd.lanes}"
    least, most = (T.reinterpret(dtype, fill_vector(bound, simd)) for bound in (low, high))
    kept = tirx.min(tirx.max(T.reinterpret(dtype, words), least), most)
    return T.reinterpret(f"int32x{simd.lanes}", kept)


def fill_vector(zero: Expr, simd: Simd) -> Expr:
    """The byte of a zero point, a float32, in all bytes."""
    word = T.Cast("uint32", T.Cast("int32", zero)) * tirx.const(0x01010101, "uint32")
    return splat(T.reinterpret("int32", word), simd)


def kept(words: Expr, mask: Expr, fill: Expr) -> Expr:
    """Words where a mask of all bits is set, else ``fill``."""
    return tirx.bitwise_or(
        tirx.bitwise_and(words, mask), tirx.bitwise_and(fill, tirx.bitwise_not(mask))
    )
