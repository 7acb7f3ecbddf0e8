"""What kernels for images in planes share: extents in registers, masks, borders."""

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
    zero,
)
from sparse_tvm.schedules.cpu.planes import Image, Planes
from sparse_tvm.schedules.cpu.simd import Simd


class Extents:
    """The extents of an image, each computed once, here, as int32."""

    def __init__(self, image: Image) -> None:
        self.height, self.width = scalar(image.height), scalar(image.width)
        self.pitch, self.first = scalar(image.pitch), scalar(image.first)
        self.size = scalar(image.size)


def vectors_of(image: Planes, simd: Simd) -> Expr:
    """Vectors from the first pixel to the last."""
    return scalar((image.pixels + (simd.lanes - 1)) // simd.lanes)


def flat(buffer: Buffer) -> Buffer:
    """The same memory as one run of elements."""
    elements: Expr = 1
    for extent in buffer.shape:
        elements = elements * extent
    return T.decl_buffer((elements,), str(buffer.dtype), data=buffer.data)


def declare_sizes(sizes: Sequence[Any]) -> None:
    """Declare the symbols that extents depend on as arguments of the open PrimFunc."""
    for size in sizes:
        T.arg(size.name, size)


def image_mask(image: Planes, sizes: Sequence[Any]) -> tirx.PrimFunc:
    """Build the kernel that writes a mask, int32 ``[image.room]``: ones at pixels, else zeros.

    ``sizes`` are arguments before it.
    """
    with prim_func() as result:
        declare_sizes(sizes)
        y = argument("y", (image.room,), "int32")
        with T.serial(0, image.height) as row:
            start = row * image.pitch
            with T.serial(0, image.width) as column:
                T.buffer_store(y, tirx.const(-1, "int32"), [start + column])
            # Behind the last row, the mask goes on to its end.
            stop = tirx.Select(row == image.height - 1, image.room - start, image.pitch)
            with T.serial(0, stop - image.width) as column:
                T.buffer_store(y, tirx.const(0, "int32"), [start + image.width + column])
    return result["func"]


def masked(value: Expr, mask: Buffer, pixel: Expr, simd: Simd) -> Expr:
    """A vector of ``value`` with zeros where it is not of pixels."""
    bits = T.reinterpret(f"int32x{simd.lanes}", value)
    kept = tirx.bitwise_and(bits, mask[ramp(pixel, simd)])
    return T.reinterpret(f"float32x{simd.lanes}", kept)


def clear_border(
    y: Buffer, plane: Expr, image: Extents, written: Expr, simd: Simd, value: Expr | None = None
) -> None:
    """Clear a plane around the ``written`` elements that start with the first pixel.

    ``value`` is the vector that is written there, zeros of float32 by default.
    """
    value = zero(simd) if value is None else value

    def clear(start: Expr, stop: Expr) -> None:
        with T.serial(0, (stop - start) // simd.lanes) as i:
            T.buffer_store(y, value, [ramp(plane + start + i * simd.lanes, simd)])

    clear(0, image.first)
    clear(image.first + written, image.size)


def deinterleaved(x: Buffer, at: Expr, simd: Simd) -> tuple[Expr, Expr]:
    """The even and the odd ones of two vectors of elements from ``x[at]`` on."""
    pair = [x[ramp(at, simd)], x[ramp(at + simd.lanes, simd)]]
    even, odd = (
        tirx.Shuffle(pair, [tirx.const(i, "int32") for i in range(phase, 2 * simd.lanes, 2)])
        for phase in (0, 1)
    )
    return even, odd


def one_of(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Generate code for both outcomes of a condition."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def in_groups(count: Expr, limit: int, body: Callable[[Expr, int], None]) -> None:
    """Call ``body(first, size)`` for all of ``count``, at most ``limit`` at a time."""
    groups = scalar(count // limit)
    with T.serial(0, groups) as group:
        body(scalar(group * limit), limit)
    if isinstance(count, int):
        if count % limit:
            body(count - count % limit, count % limit)
        return
    # The rest by halves: how many there are decides registers.
    size = limit // 2
    while size:
        with T.If(count // size % 2 == 1), T.Then():
            body(scalar(count // (2 * size) * (2 * size)), size)
        size //= 2
