"""Scaled dot-product attention on lane tiles, scores never leaving the core's cache.

One job is one (query tile, head). Keys are the rows of a small matmul whose vectors are query
lanes: scores[key, lanes] = sum_d K[d, key] Q[d, lanes]. Soft-max then runs down the keys, lane by
lane, and the same register-blocked product gives O[d, lanes] = sum_key V[d, key] P[key, lanes].
Heads are slices of the feature axis, so nothing is ever transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.common import vector_math
from sparse_tvm.schedules.common.lane_tiles import (
    Buffer,
    Expr,
    LaneTiles,
    Registers,
    Simd,
    argument,
    prim_func,
    ramp,
    splat,
)

LOWEST = -3.0e38


@dataclass(frozen=True)
class Mask:
    """An additive attention mask.

    Attributes
    ----------
    lead, heads, keys : int
        Extents; 1 broadcasts over batch, heads or keys.
    per_query : bool
        The mask differs between queries; it is then lane-tiled over them.
    """

    lead: int
    heads: int
    keys: int
    per_query: bool

    def shape(self, queries: LaneTiles) -> tuple[int, ...]:
        """Shape of the mask argument: ``[lead, heads, keys]`` or tiled over queries."""
        if self.per_query:
            return (self.lead * self.heads, queries.per_lead, self.keys, queries.lanes)
        return (self.lead, self.heads, self.keys)


def attention(
    queries: LaneTiles,
    keys: LaneTiles,
    heads: int,
    head_size: int,
    value_size: int,
    scale: float,
    mask: Mask | None,
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel: ``softmax(scale * Q K^T + mask) V`` for every head.

    Arguments of the PrimFunc, in order: Q ``[lead, tiles, heads * head_size, lanes]``,
    K likewise over the keys' tiles, V ``[lead, tiles, heads * value_size, lanes]``, the mask if
    any, and the output ``[lead, tiles, heads * value_size, lanes]`` over the queries' tiles.
    """
    # Half a tile at a time keeps a strip's scores (keys x lanes) within L1.
    per_tile = queries.lanes // simd.lanes
    vectors = 2 if per_tile % 2 == 0 else 1
    strips = per_tile // vectors
    block = max(1, min(8, simd.accumulators // vectors))
    while keys.lanes % block:
        block -= 1
    width = vectors * simd.lanes

    with prim_func() as (_, result):
        q = argument("q", queries.shape(heads * head_size))
        k = argument("k", keys.shape(heads * head_size))
        v = argument("v", keys.shape(heads * value_size))
        m = argument("mask", mask.shape(queries)) if mask else None
        out = argument("out", queries.shape(heads * value_size))

        with T.parallel(0, queries.count * heads) as job:
            tile_index, head = job // heads, job % heads
            lead, tile = tile_index // queries.per_lead, tile_index % queries.per_lead
            scores = T.alloc_buffer((keys.per_lead * keys.lanes, width), "float32")
            with T.serial(0, strips) as strip:
                lane = strip * width

                def lane_at(vector: int, lane: Expr = lane) -> Expr:
                    return ramp(lane + vector * simd.lanes, simd)

                top = Registers(1, vectors, simd)
                top.fill(lambda _, vector: splat(T.float32(LOWEST), simd))

                def masked(score: Expr, key: Expr, vector: int) -> Expr:
                    score = score * splat(T.float32(scale), simd)
                    if mask is None or m is None:
                        return score
                    return score + _mask_at(m, mask, lead, head, heads, tile, key, lane_at(vector))

                def score_block(key_tile: Expr, first: Expr, live: int) -> None:
                    acc = Registers(live, vectors, simd)
                    acc.fill(lambda row, vector: splat(T.float32(0), simd))
                    with T.serial(0, head_size) as d:
                        feature = head * head_size + d
                        acc.multiply_add(
                            lambda row: k[lead, key_tile, feature, first + row],
                            lambda vector: q[lead, tile, feature, lane_at(vector)],
                        )
                    for row in range(live):
                        key = key_tile * keys.lanes + first + row
                        for vector in range(vectors):
                            score = acc.get(row, vector)
                            acc.set(row, vector, masked(score, key, vector))
                            at = ramp(vector * simd.lanes, simd)
                            T.buffer_store(scores, acc.get(row, vector), [key, at])
                            top.set(0, vector, tirx.max(top.get(0, vector), acc.get(row, vector)))

                _for_keys(keys, block, score_block)

                total = Registers(1, vectors, simd)
                total.fill(lambda _, vector: splat(T.float32(0), simd))
                with T.serial(0, keys.rows) as key:
                    for vector in range(vectors):
                        at = ramp(vector * simd.lanes, simd)
                        weight = Registers(1, 1, simd)
                        weight.set(0, 0, vector_math.exp(scores[key, at] - top.get(0, vector)))
                        total.set(0, vector, total.get(0, vector) + weight.get(0, 0))
                        T.buffer_store(scores, weight.get(0, 0), [key, at])

                def value_block(first: Expr, live: int) -> None:
                    acc = Registers(live, vectors, simd)
                    acc.fill(lambda row, vector: splat(T.float32(0), simd))

                    def one_key(key_tile: Expr, at: Expr) -> None:
                        acc.multiply_add(
                            lambda row: v[lead, key_tile, head * value_size + first + row, at],
                            lambda vector: scores[
                                key_tile * keys.lanes + at, ramp(vector * simd.lanes, simd)
                            ],
                        )

                    _for_keys(keys, 1, lambda key_tile, at, live: one_key(key_tile, at))
                    for row in range(live):
                        for vector in range(vectors):
                            T.buffer_store(
                                out,
                                acc.get(row, vector) / total.get(0, vector),
                                [lead, tile, head * value_size + first + row, lane_at(vector)],
                            )

                _blocks(value_size, block, value_block)
    return result["func"]


def _mask_at(
    m: Buffer, mask: Mask, lead: Expr, head: Expr, heads: int, tile: Expr, key: Expr, lanes: Expr
) -> Expr:
    """The mask of one key for one vector of queries."""
    lead = lead if mask.lead > 1 else 0
    head = head if mask.heads > 1 else 0
    key = key if mask.keys > 1 else 0
    if mask.per_query:
        return m[lead * mask.heads + head, tile, key, lanes]
    return T.broadcast(m[lead, head, key], int(lanes.ty.dtype.lanes))


def _blocks(extent: int, block: int, body) -> None:  # type: ignore[no-untyped-def]
    """Call ``body(first, live)`` for each block of ``extent``, the last one possibly short."""
    if extent >= block:
        with T.serial(0, extent // block) as i:
            body(i * block, block)
    if extent % block:
        body(extent // block * block, extent % block)


def _for_keys(keys: LaneTiles, block: int, body) -> None:  # type: ignore[no-untyped-def]
    """Call ``body(key tile, first lane, live)`` over all keys, never across a tile's end."""
    full, rest = divmod(keys.rows, keys.lanes)
    if full:
        with T.serial(0, full) as key_tile:
            _blocks(keys.lanes, block, lambda first, live: body(key_tile, first, live))
    if rest:
        _blocks(rest, block, lambda first, live: body(full, first, live))
