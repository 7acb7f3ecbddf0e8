"""Scaled dot-product attention on lane tiles, scores never leaving the core's cache.

One job is one (group of query tiles, head). Keys are the rows of a small matmul whose vectors are
query lanes: scores[key, lanes] = sum_d K[d, key] Q[d, lanes]. Soft-max then runs down the keys,
lane by lane, and the same register-blocked product gives O[d, lanes] = sum_key V[d, key]
P[key, lanes]. Heads are slices of the feature axis, so nothing is ever transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu import vector_math
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    Tiles,
    TileVectors,
    argument,
    for_group_sizes,
    groups_of,
    prim_func,
    ramp,
    scalar,
    splat,
    symbol,
    zero,
)
from sparse_tvm.schedules.cpu.simd import LANES, Simd

_LOWEST = float(np.finfo(np.float32).min)
_KEY_BLOCK = 8
_MAX_GROUP = 2
"""Query tiles per job: their scores, keys x 32 floats, stay within L1 for a few hundred keys."""


@dataclass(frozen=True)
class Mask:
    """An additive attention mask ``[B, H, Sq, Sk]``, by the axes it really has.

    Attributes
    ----------
    lead, heads, queries, keys : bool
        False where the mask has extent 1 and broadcasts. A mask with queries is given lane-tiled
        over them, ``[B * H, tiles, Sk, LANES]``; any other as it is, ``[B, H, 1, Sk]``.
    """

    lead: bool
    heads: bool
    queries: bool
    keys: bool


def attention(
    queries: Tiles,
    keys: Tiles,
    key_rows: Expr | None,
    heads: int,
    head_size: int,
    value_size: int,
    scale: float,
    mask: Mask | None,
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel: ``softmax(scale * Q K^T + mask) V`` for every head.

    Arguments of the PrimFunc, in order: Q ``[lead, tiles, heads * head_size, LANES]``,
    K likewise over the keys' tiles, V ``[lead, tiles, heads * value_size, LANES]``, the mask if
    any, the number of keys as an int64 unless ``key_rows`` is a number, and the output
    ``[lead, tiles, heads * value_size, LANES]`` over the queries' tiles.
    """
    group = max(1, min(_MAX_GROUP, simd.accumulators // (4 * simd.per_tile)))
    block = min(_KEY_BLOCK, simd.accumulators // (group * simd.per_tile))
    while LANES % block:
        block -= 1
    width = group * LANES

    with prim_func() as result:
        q = argument("q", queries.shape(heads * head_size))
        k = argument("k", keys.shape(heads * head_size))
        v = argument("v", keys.shape(heads * value_size))
        m = mask_argument(mask, queries) if mask else None
        count = key_rows if isinstance(key_rows, int) else T.arg("key_rows", symbol("key_rows"))
        out = argument("out", queries.shape(heads * value_size))
        groups = groups_of(queries.per_lead, group)

        def job_kernel(lead: Expr, head: Expr, scores: Buffer, first: Expr, size: int) -> None:
            vectors = TileVectors(first, size, simd)

            def score_at(key: Expr, vector: int) -> list[Expr]:
                return [key, ramp(vector * simd.lanes, simd)]

            def score_block(key_tile: Expr, first_key: Expr) -> None:
                acc = Registers(block, vectors.count, simd)
                acc.fill(lambda row, vector: zero(simd))
                with T.serial(0, head_size) as d:
                    feature = head * head_size + d

                    def query(vector: int) -> Expr:
                        tile, lanes = vectors.at(vector)
                        return q[lead, tile, feature, lanes]

                    acc.multiply_add(lambda row: k[lead, key_tile, feature, first_key + row], query)
                for row in range(block):
                    for vector in range(vectors.count):
                        key = key_tile * LANES + first_key + row
                        T.buffer_store(scores, acc.get(row, vector), score_at(key, vector))

            with T.serial(0, keys.per_lead) as key_tile, T.serial(0, LANES // block) as i:
                score_block(key_tile, i * block)

            top = Registers(1, vectors.count, simd)
            top.fill(lambda _, vector: splat(T.float32(_LOWEST), simd))
            with T.serial(0, count) as key:
                for vector in range(vectors.count):
                    at = score_at(key, vector)
                    score = scores[tuple(at)] * splat(T.float32(scale), simd)
                    if mask is not None and m is not None:
                        tile, lanes = vectors.at(vector)
                        score += mask_at(m, mask, lead, head, heads, tile, key, lanes)
                    masked = Registers(1, 1, simd)
                    masked.set(0, 0, score)
                    T.buffer_store(scores, masked.get(0, 0), at)
                    top.set(0, vector, tirx.max(top.get(0, vector), masked.get(0, 0)))

            total = Registers(1, vectors.count, simd)
            total.fill(lambda _, vector: zero(simd))
            with T.serial(0, count) as key:
                for vector in range(vectors.count):
                    at = score_at(key, vector)
                    weight = Registers(1, 1, simd)
                    weight.set(0, 0, vector_math.exp(scores[tuple(at)] - top.get(0, vector)))
                    total.set(0, vector, total.get(0, vector) + weight.get(0, 0))
                    T.buffer_store(scores, weight.get(0, 0), at)
            # The largest score has weight 1, so only a query without any key has a sum of 0.
            total.fill(
                lambda _, vector: (
                    splat(T.float32(1), simd)
                    / tirx.max(total.get(0, vector), splat(T.float32(1e-30), simd))
                )
            )

            def value_block(first_row: Expr, live: int) -> None:
                acc = Registers(live, vectors.count, simd)
                acc.fill(lambda row, vector: zero(simd))
                together = simd.lanes if simd.by_element else 1
                with T.serial(0, keys.per_lead) as key_tile:
                    live_keys = tirx.min(LANES, count - key_tile * LANES)

                    def add(key: Expr, keys: int) -> None:
                        feature = head * value_size + first_row
                        acc.multiply_add_steps(
                            keys,
                            lambda row, step: v[lead, key_tile, feature + row, key + step],
                            lambda vector, step: scores[
                                tuple(score_at(key_tile * LANES + key + step, vector))
                            ],
                        )

                    with T.serial(0, live_keys // together) as j:
                        add(j * together, together)
                    if together > 1:
                        with T.serial(0, live_keys % together) as j:
                            add(live_keys // together * together + j, 1)
                for row in range(live):
                    for vector in range(vectors.count):
                        tile, lanes = vectors.at(vector)
                        T.buffer_store(
                            out,
                            acc.get(row, vector) * total.get(0, vector),
                            [lead, tile, head * value_size + first_row + row, lanes],
                        )

            _blocks(value_size, block, value_block)

        with T.parallel(0, queries.lead * groups * heads) as job:
            head = scalar(job % heads)
            lead = scalar(job // heads // groups)
            scores = T.alloc_buffer((keys.per_lead * LANES, width), "float32")

            def body(first: Expr, size: int) -> None:
                job_kernel(lead, head, scores, first, size)

            for_group_sizes(queries.per_lead, group, job // heads % groups, body)
    return result["func"]


def mask_argument(mask: Mask, queries: Tiles) -> Buffer:
    """Declare the mask; extents it broadcasts over are 1."""
    lead = symbol("mask_lead") if mask.lead else 1
    heads = symbol("mask_heads") if mask.heads else 1
    keys = symbol("mask_keys") if mask.keys else 1
    if mask.queries:
        lead_and_heads = symbol("mask_lead") if mask.lead or mask.heads else 1
        return argument("mask", (lead_and_heads, queries.per_lead, keys, LANES))
    return argument("mask", (lead, heads, 1, keys))


def mask_at(
    m: Buffer, mask: Mask, lead: Expr, head: Expr, heads: int, tile: Expr, key: Expr, lanes: Expr
) -> Expr:
    """The mask of one key for one vector of queries."""
    lead = lead if mask.lead else 0
    head = head if mask.heads else 0
    key = key if mask.keys else 0
    if mask.queries:
        return m[lead * (heads if mask.heads else 1) + head, tile, key, lanes]
    return T.broadcast(m[lead, head, 0, key], int(lanes.ty.dtype.lanes))


def _blocks(extent: int, block: int, body: Callable[[Expr, int], None]) -> None:
    """Call ``body(first, live)`` for each block of ``extent``, the last one possibly short."""
    if extent >= block:
        with T.serial(0, extent // block) as i:
            body(i * block, block)
    if extent % block:
        body(extent // block * block, extent % block)
