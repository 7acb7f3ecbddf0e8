"""What is done to each pixel of int8 images in planes of words, and the ways in and out of words.

Rows are read from where the source has them and written to where the target wants them, in whole
vectors; what pads an image is written first.
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
    splat,
    zero,
)
from sparse_tvm.schedules.cpu.low_precision import words_like
from sparse_tvm.schedules.cpu.plane_code import Extents, declare_sizes, flat
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.word_output import PackBytes, bounded, fill_vector
from sparse_tvm.schedules.cpu.word_planes import BYTES, word_planes


def quantise_image(
    batch: Expr,
    channels: int,
    source: Planes,
    target: Planes,
    sizes: Sequence[Any],
    simd: Simd,
    pack: PackBytes,
) -> tirx.PrimFunc:
    """Build the kernel x float32 ``[batch, channels, source.size]`` -> words.

    Arguments: x, ``sizes``, ``steps`` float32 ``[2]``, y int32 ``[batch, planes, target.size]``. A
    byte is ``round(x / steps[0]) + steps[1]``, within 0 to 255.
    """
    planes = word_planes(channels)
    with prim_func() as result:
        x = argument("x", (batch, channels, source.size))
        declare_sizes(sizes)
        steps = argument("steps", (2,))
        y = argument("y", (batch, planes, target.size), "int32")
        x, y = flat(x), flat(y)
        with T.parallel(0, batch * planes) as job:
            here = Extents(source)
            image, plane = scalar(job // planes), scalar(job % planes)
            scale, shift = (splat(steps[i], simd) for i in (0, 1))
            low, high = (splat(T.float32(end), simd) - shift for end in (0, 255))

            def words(row: Expr, column: Expr) -> Expr:
                values = []
                for i in range(BYTES):
                    channel = tirx.min(plane * BYTES + i, channels - 1)
                    start = (image * channels + channel) * here.size + here.first
                    value = x[ramp(start + row * here.pitch + column, simd)] / scale
                    # Rounded before the zero point comes: nearest even is another one behind it.
                    values.append(_nearest(tirx.min(tirx.max(value, low), high), simd) + shift)
                return pack(values)

            _write_rows(y, job, target, words, fill_vector(steps[1], simd), simd)
    return result["func"]


def dequantise_image(
    batch: Expr, channels: int, source: Planes, target: Planes, sizes: Sequence[Any], simd: Simd
) -> tirx.PrimFunc:
    """Build the kernel x, words -> float32 ``[batch, channels, target.size]``.

    Arguments: x int32 ``[batch, planes, source.size]``, ``sizes``, ``steps`` float32 ``[2]``, y,
    ``(x - steps[1]) * steps[0]``.
    """
    planes = word_planes(channels)
    with prim_func() as result:
        x = argument("x", (batch, planes, source.size), "int32")
        declare_sizes(sizes)
        steps = argument("steps", (2,))
        y = argument("y", (batch, channels, target.size))
        x, y = flat(x), flat(y)
        with T.parallel(0, batch * channels) as job:
            here = Extents(source)
            image, channel = scalar(job // channels), scalar(job % channels)
            start = scalar((image * planes + channel // BYTES) * here.size + here.first)
            bits = scalar(channel % BYTES * 8)

            def values(row: Expr, column: Expr) -> Expr:
                words = x[ramp(start + row * here.pitch + column, simd)]
                value = _byte(words, T.broadcast(bits, simd.lanes), simd)
                return (value - splat(steps[1], simd)) * splat(steps[0], simd)

            _write_rows(y, job, target, values, zero(simd), simd)
    return result["func"]


def add_images(
    batch: Expr,
    channels: int,
    sources: tuple[Planes, Planes],
    target: Planes,
    sizes: Sequence[Any],
    simd: Simd,
    pack: PackBytes,
) -> tirx.PrimFunc:
    """Build the kernel a, b -> their weighted sum, all of them words.

    Arguments: a, b int32 ``[batch, planes, size]``, ``sizes``, ``steps`` float32 ``[6]``, y. A byte
    is ``round(a * steps[0] + b * steps[1] + steps[2])``, within ``steps[3]`` and ``steps[4]``;
    ``steps[5]`` is the one that stands for zero.
    """
    planes = word_planes(channels)
    with prim_func() as result:
        operands = [
            argument(name, (batch, planes, source.size), "int32")
            for name, source in zip("ab", sources, strict=True)
        ]
        declare_sizes(sizes)
        steps = argument("steps", (6,))
        y = argument("y", (batch, planes, target.size), "int32")
        images, y = [flat(operand) for operand in operands], flat(y)
        with T.parallel(0, batch * planes) as job:
            places = [Extents(source) for source in sources]
            a, b, offset = (splat(steps[i], simd) for i in range(3))

            def words(row: Expr, column: Expr) -> Expr:
                loaded = [
                    image[ramp(job * place.size + place.first + row * place.pitch + column, simd)]
                    for image, place in zip(images, places, strict=True)
                ]
                values = []
                for i in range(BYTES):
                    shift = words_like(8 * i, simd.lanes)
                    one, other = (_byte(word, shift, simd) for word in loaded)
                    values.append(one * a + other * b + offset)
                return bounded(pack(values), steps[3], steps[4], simd)

            _write_rows(y, job, target, words, fill_vector(steps[5], simd), simd)
    return result["func"]


def _byte(words: Expr, bits: Expr, simd: Simd) -> Expr:
    """One byte of each word as float32, ``bits`` from the lowest."""
    byte = T.bitwise_and(T.shift_right(words, bits), words_like(255, simd.lanes))
    return T.Cast(f"float32x{simd.lanes}", byte)


def _nearest(value: Expr, simd: Simd) -> Expr:
    """The nearest whole numbers."""
    return T.call_llvm_pure_intrin(f"float32x{simd.lanes}", "llvm.nearbyint", value)


def _write_rows(
    y: Buffer,
    plane: Expr,
    target: Planes,
    vector: Callable[[Expr, Expr], Expr],
    fill: Expr,
    simd: Simd,
) -> None:
    """Write a plane: ``vector(row, column)`` where there are pixels, and ``fill`` elsewhere."""
    lanes, there = simd.lanes, Extents(target)
    start = scalar(plane * there.size)
    if target.border.padded:
        with T.serial(0, there.size // lanes) as i:
            T.buffer_store(y, fill, [ramp(start + i * lanes, simd)])
    with T.serial(0, there.height) as row:
        first = scalar(start + there.first + row * there.pitch)
        with T.serial(0, (there.width + (lanes - 1)) // lanes) as i:
            value = vector(row, i * lanes)
            if target.border.padded:
                left = T.Cast("int32", there.width - i * lanes)
                inside = T.ramp(tirx.const(0, "int32"), 1, lanes) < T.broadcast(left, lanes)
                value = tirx.Select(inside, value, fill)
            T.buffer_store(y, value, [ramp(first + i * lanes, simd)])
