"""Images of zeros around the images of each video."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import Expr, argument, prim_func, ramp, scalar, zero
from sparse_tvm.schedules.cpu.plane_code import flat, one_of
from sparse_tvm.schedules.cpu.simd import Simd


def pad_frames(
    images: Expr,
    count: int,
    pads: tuple[int, int],
    channels: Expr,
    extents: Sequence[Expr],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel x ``[images, channels, *extents]`` -> y, ``pads`` images more per video.

    A video has ``count`` of the images.
    """
    longer = count + sum(pads)
    with prim_func() as result:
        x = argument("x", (images, channels, *extents))
        y = argument("y", (images // count * longer, channels, *extents))
        x, y, size = flat(x), flat(y), prod(extents)
        with T.parallel(0, images // count * longer * channels) as plane:
            image, channel = scalar(plane // channels), scalar(plane % channels)
            frame = scalar(image % longer - pads[0])
            source = scalar(image // longer * count + frame)
            start = scalar((source * channels + channel) * size, "int64")
            target = scalar(plane * size, "int64")
            vectors = scalar(size // simd.lanes)

            def copy() -> None:
                with T.serial(0, vectors) as v:
                    value = x[ramp(start + v * simd.lanes, simd)]
                    T.buffer_store(y, value, [ramp(target + v * simd.lanes, simd)])
                with T.serial(0, size - vectors * simd.lanes) as i:
                    at = vectors * simd.lanes + i
                    T.buffer_store(y, x[start + at], [target + at])

            def clear() -> None:
                with T.serial(0, vectors) as v:
                    T.buffer_store(y, zero(simd), [ramp(target + v * simd.lanes, simd)])
                with T.serial(0, size - vectors * simd.lanes) as i:
                    at = target + vectors * simd.lanes + i
                    T.buffer_store(y, T.float32(0), [at])

            one_of(tirx.all(frame >= 0, frame < count), copy, clear)
    return result["func"]
