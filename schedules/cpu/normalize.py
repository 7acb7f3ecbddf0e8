"""Layer and RMS normalisation down the feature axis of lane tiles: no horizontal sums."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import (
    Expr,
    Registers,
    Tiles,
    argument,
    prim_func,
    ramp,
    splat,
    zero,
)
from sparse_tvm.schedules.cpu.low_precision import Lines, store_tile
from sparse_tvm.schedules.cpu.precision import Precision
from sparse_tvm.schedules.cpu.simd import Simd

_UNROLL = 4
"""Partial sums per lane: hides the latency of the additions."""


def layer_norm(
    tiles: Tiles,
    features: int,
    epsilon: float,
    simd: Simd,
    out: Precision | None = None,
    centred: bool = True,
) -> tirx.PrimFunc:
    """Build the kernel: ``(x - mean) / sqrt(variance + epsilon) * gamma + beta`` per token.

    Arguments of the PrimFunc: x ``[lead, tiles, features, LANES]``, gamma and beta
    ``[features]``, y like x, or in lines of ``out``. The variance is the biased one, by a second
    pass over x. Unless ``centred``, the mean is taken for 0, and there is no beta: RMS norm.
    """
    unroll = next(u for u in (_UNROLL, 2, 1) if features % u == 0)
    groups = simd.per_tile

    with prim_func() as result:
        x = argument("x", tiles.shape(features))
        gamma = argument("gamma", (features,))
        beta = argument("beta", (features,)) if centred else None
        lines = Lines("y", tiles, features, out) if out else None
        y = argument("y", tiles.shape(features)) if lines is None else None
        x = tiles.flat(x, features)
        if lines is None:
            y = tiles.flat(y, features)
        else:
            lines.bind()

        with T.parallel(0, tiles.count * groups) as job:
            tile = job // groups
            lanes = ramp(job % groups * simd.lanes, simd)
            mean, deviation = Registers(1, 1, simd), Registers(1, 1, simd)

            def average(term: Callable[[Expr], Expr]) -> Expr:
                """Mean over the features of ``term(feature)``."""
                sums = Registers(unroll, 1, simd)
                sums.fill(lambda row, vector: zero(simd))
                with T.serial(0, features // unroll) as i:
                    for row in range(unroll):
                        sums.set(row, 0, sums.get(row, 0) + term(i * unroll + row))
                total = sums.get(0, 0)
                for row in range(1, unroll):
                    total = total + sums.get(row, 0)
                return total * splat(T.float32(1.0 / features), simd)

            if centred:
                mean.set(0, 0, average(lambda f: x[tile, f, lanes]))

            def difference(f: Expr) -> Expr:
                return x[tile, f, lanes] - mean.get(0, 0) if centred else x[tile, f, lanes]

            variance = average(lambda f: difference(f) * difference(f))
            root = tirx.sqrt(variance + splat(T.float32(epsilon), simd))
            deviation.set(0, 0, splat(T.float32(1), simd) / root)

            def normal(f: Expr) -> Expr:
                scaled = difference(f) * deviation.get(0, 0) * splat(gamma[f], simd)
                return scaled + splat(beta[f], simd) if beta is not None else scaled

            if lines is not None:
                store_tile(lines, tile, lanes.base, normal, simd)
            else:
                with T.serial(0, features) as f:
                    T.buffer_store(y, normal(f), [tile, f, lanes])
    return result["func"]
