"""Layer normalisation down the feature axis of lane tiles: no horizontal sums."""

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
from sparse_tvm.schedules.cpu.simd import Simd

_UNROLL = 4
"""Partial sums per lane: hides the latency of the additions."""


def layer_norm(tiles: Tiles, features: int, epsilon: float, simd: Simd) -> tirx.PrimFunc:
    """Build the kernel: ``(x - mean) / sqrt(variance + epsilon) * gamma + beta`` per token.

    Arguments of the PrimFunc: x ``[lead, tiles, features, LANES]``, gamma and beta
    ``[features]``, y like x. The variance is the biased one, by a second pass over x.
    """
    unroll = next(u for u in (_UNROLL, 2, 1) if features % u == 0)
    groups = simd.per_tile

    with prim_func() as result:
        x = argument("x", tiles.shape(features))
        gamma = argument("gamma", (features,))
        beta = argument("beta", (features,))
        y = argument("y", tiles.shape(features))
        x, y = tiles.flat(x, features), tiles.flat(y, features)

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

            mean.set(0, 0, average(lambda f: x[tile, f, lanes]))

            def centred(f: Expr) -> Expr:
                return x[tile, f, lanes] - mean.get(0, 0)

            variance = average(lambda f: centred(f) * centred(f))
            root = tirx.sqrt(variance + splat(T.float32(epsilon), simd))
            deviation.set(0, 0, splat(T.float32(1), simd) / root)
            with T.serial(0, features) as f:
                scaled = centred(f) * deviation.get(0, 0) * splat(gamma[f], simd)
                T.buffer_store(y, scaled + splat(beta[f], simd), [tile, f, lanes])
    return result["func"]
