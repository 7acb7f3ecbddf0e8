"""Images into blocks, and out of them: rows of a block move from and to where an image has them."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.blocks import Blocks
from sparse_tvm.schedules.cpu.lane_tiles import Expr, argument, prim_func, ramp, scalar, span, zero
from sparse_tvm.schedules.cpu.plane_code import flat
from sparse_tvm.schedules.cpu.planes import Image
from sparse_tvm.schedules.cpu.simd import Simd


def image_blocks(
    batch: Expr, channels: Expr, image: Image, blocks: Blocks, simd: Simd, *, back: bool
) -> tirx.PrimFunc:
    """Build the kernel x ``[batch, channels, image.size]`` -> y ``[..., blocks.planes.size]``.

    Or ``back``, from blocks to an image in planes. What is no pixel becomes zero.
    """
    there = blocks.planes
    shapes = [(batch, channels, image.size), (batch, channels, there.size)]
    with prim_func() as result:
        x = argument("x", shapes[1] if back else shapes[0])
        y = argument("y", shapes[0] if back else shapes[1])
        x, y = flat(x), flat(y)
        with T.parallel(0, batch * channels) as plane:
            in_image, in_blocks = scalar(plane * image.size), scalar(plane * there.size)
            written, start = (image, in_image) if back else (there, in_blocks)
            with T.serial(0, written.size // simd.lanes) as i:
                T.buffer_store(y, zero(simd), [ramp(start + i * simd.lanes, simd)])
            for block in blocks.blocks.values():
                across = len(block.columns)
                begin = in_image + image.first + block.rows.start * image.pitch
                with T.serial(0, len(block.rows)) as row:
                    for at in range(0, across, simd.lanes):
                        count = min(simd.lanes, across - at)
                        column = block.columns.start + at
                        outside = span(begin + row * image.pitch + column, count)
                        inside = span(in_blocks + block.first + row * across + at, count)
                        source, target = (inside, outside) if back else (outside, inside)
                        T.buffer_store(y, x[source], [target])
    return result["func"]
