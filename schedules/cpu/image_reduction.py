"""What becomes of whole channels of images in planes: their means, or their largest pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import (
    Expr,
    Registers,
    argument,
    prim_func,
    ramp,
    scalar,
    splat,
)
from sparse_tvm.schedules.cpu.loops import joined
from sparse_tvm.schedules.cpu.plane_code import Extents, declare_sizes, flat, vectors_of
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.windows import MAX, Operation


def image_reduction(
    batch: Expr,
    channels: int,
    source: Planes,
    operation: Operation,
    sizes: Sequence[Any],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel x ``[batch, channels, source.size]`` -> y ``[batch, channels]``.

    ``sizes`` and the image's mask are arguments between them.
    """

    def combine(a: Expr, b: Expr) -> Expr:
        return tirx.max(a, b) if operation is MAX else a + b

    with prim_func() as result:
        x = argument("x", (batch, channels, source.size))
        declare_sizes(sizes)
        mask = argument("mask", (source.room,), "int32")
        y = argument("y", (batch, channels))
        x, y = flat(x), flat(y)
        with T.parallel(0, batch * channels) as plane:
            here, vectors = Extents(source), vectors_of(source, simd)
            start = scalar(plane * here.size + here.first)
            total = Registers(1, 1, simd)
            nothing = splat(T.float32(operation.identity), simd)
            total.set(0, 0, nothing)
            with T.serial(0, vectors) as v:
                at = ramp(v * simd.lanes, simd)
                pixel = mask[at] != T.broadcast(tirx.const(0, "int32"), simd.lanes)
                value = tirx.Select(pixel, x[ramp(start + v * simd.lanes, simd)], nothing)
                total.set(0, 0, combine(total.get(0, 0), value))
            whole = joined(total.get(0, 0), simd.lanes, combine)
            if operation is not MAX:
                whole = whole / T.Cast("float32", here.height * here.width)
            T.buffer_store(y, whole, [plane])
    return result["func"]
