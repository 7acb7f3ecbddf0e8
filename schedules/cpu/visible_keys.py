"""Which keys some queries see, found in the mask at run time.

A causal mask hides half of all keys, a window most, and a padded batch the ends of its texts. What
is hidden from all queries that are computed together has weight 0, so it need not be computed.
Looking costs two loads of the mask a key, where a head of 64 features takes 256 multiply-adds.
"""

from __future__ import annotations

from functools import reduce

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.attention_operands import LOWEST, AttentionProblem, mask_at
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    TileVectors,
    local,
    scalar,
    splat,
    zero,
)
from sparse_tvm.schedules.cpu.loops import joined
from sparse_tvm.schedules.cpu.simd import LANES, Simd

_HIDDEN = LOWEST / 2
"""A key with this or less in the mask has weight exactly 0 beside one with more."""


def visible_tiles(
    problem: AttentionProblem,
    mask: Buffer | None,
    lead: Expr,
    head: Expr,
    vectors: TileVectors,
    simd: Simd,
) -> tuple[Expr, Expr]:
    """The first group of ``LANES`` keys that any of the queries sees, and the one behind the last.

    All groups, where there is no mask of keys, or a query sees none: its weights are what they are.
    """
    if mask is None or problem.mask is None or not problem.mask.keys:
        return 0, problem.key_tiles
    everything = scalar(problem.key_tiles)
    bounds = local(2, "int32")
    T.buffer_store(bounds, everything, [0])
    T.buffer_store(bounds, 0, [1])
    seen = Registers(1, vectors.count, simd)
    seen.fill(lambda row, vector: zero(simd))
    with T.serial(0, everything) as tile:
        here = Registers(1, vectors.count, simd)
        here.fill(lambda row, vector: zero(simd))
        with T.serial(0, tirx.min(LANES, scalar(problem.key_rows) - tile * LANES)) as i:
            for v in range(vectors.count):
                of_query = (problem.heads, vectors.at(v)[0], tile * LANES + i, vectors.at(v)[1])
                added = mask_at(mask, problem.mask, lead, head, *of_query)
                # Padding may be NaN, which compares as hidden.
                shown = tirx.Select(
                    added > splat(T.float32(_HIDDEN), simd), splat(T.float32(1), simd), zero(simd)
                )
                here.set(0, v, tirx.max(here.get(0, v), shown))
        for v in range(vectors.count):
            seen.set(0, v, tirx.max(seen.get(0, v), here.get(0, v)))
        with T.If(_combined(here, tirx.max, simd) > 0), T.Then():
            T.buffer_store(bounds, tirx.min(bounds[0], tile), [0])
            T.buffer_store(bounds, tile + 1, [1])
    with T.If(_combined(seen, tirx.min, simd) == 0), T.Then():
        T.buffer_store(bounds, 0, [0])
        T.buffer_store(bounds, everything, [1])
    return bounds[0], bounds[1]


def _combined(registers: Registers, combine: Expr, simd: Simd) -> Expr:
    """All lanes of all vectors, combined."""
    values = [registers.get(0, v) for v in range(registers.vectors)]
    return joined(reduce(combine, values), simd.lanes, combine)
