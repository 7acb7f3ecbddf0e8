"""Channels of images in planes become pixels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import Expr, argument, prim_func, ramp, scalar, zero
from sparse_tvm.schedules.cpu.plane_code import Extents, declare_sizes, flat
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import Simd


def pixel_shuffle(
    batch: Expr,
    channels: Any,
    source: Planes,
    target: Planes,
    blocks: tuple[int, int],
    starts: tuple[int, int],
    sizes: Sequence[Any],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel x ``[batch, channels, source.size]`` -> y, ``sizes`` between them.

    y is ``[batch, channels / blocks, target.size]``. ``starts`` pixels in front of the output, and
    whatever is behind it, are left out.
    """
    outputs = channels // prod(blocks)
    with prim_func() as result:
        x = argument("x", (batch, channels, source.size))
        declare_sizes(sizes)
        y = argument("y", (batch, outputs, target.size))
        x, y = flat(x), flat(y)
        with T.parallel(0, batch * outputs) as plane:
            here, there = Extents(source), Extents(target)
            if target.border.padded:
                with T.serial(0, there.size // simd.lanes) as v:
                    T.buffer_store(y, zero(simd), [ramp(plane * there.size + v * simd.lanes, simd)])
            with T.serial(0, there.height) as row:
                line, phase = (
                    scalar((row + starts[0]) // blocks[0]),
                    scalar((row + starts[0]) % blocks[0]),
                )
                for column in range(blocks[1]):
                    first = -(-(starts[1] - column) // blocks[1]) if starts[1] > column else 0
                    begin = first * blocks[1] + column - starts[1]
                    channel = plane * prod(blocks) + phase * blocks[1] + column
                    read = scalar(channel * here.size + here.first + line * here.pitch + first)
                    write = scalar(plane * there.size + there.first + row * there.pitch + begin)
                    count = (there.width - begin + (blocks[1] - 1)) // blocks[1]
                    with T.serial(0, scalar(count)) as i:
                        T.buffer_store(y, x[read + i], [write + i * blocks[1]])
    return result["func"]
