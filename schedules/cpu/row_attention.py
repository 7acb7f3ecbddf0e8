"""Attention of a few queries over keys and values that lie by heads: as fast as they can be read.

A decoder's step has one query, and a tile of sixteen would be padding but for it. Here features
fill the vector lanes: a score is a product of two rows, whose sums of several keys are added up
across lanes together, and the result is a sum of rows. One job is one head.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu import vector_math
from sparse_tvm.schedules.cpu.attention_operands import LOWEST, AttentionProblem, ByHeads, mask_at
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    broadcast,
    scalar,
    scratch,
    span,
    unrolled,
)
from sparse_tvm.schedules.cpu.row_sums import Sums
from sparse_tvm.schedules.cpu.simd import Simd

FEW_QUERIES = 7
"""Beyond, lanes of queries are the faster kernel."""

_SEGMENT = 4
"""Lanes among which every CPU shuffles at full speed."""

_CHAINS = 8
"""Independent sums that keep the multiply-adds busy."""


def takes_few_queries(problem: AttentionProblem, simd: Simd) -> bool:
    """Whether there is such a kernel for a problem."""
    sizes = (problem.k.size, problem.v.size)
    by_heads = isinstance(problem.k, ByHeads) and isinstance(problem.v, ByHeads)
    return by_heads and all(size % simd.lanes == 0 for size in sizes)


def few_queries(
    problem: AttentionProblem,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    mask: Buffer | None,
    out: Buffer,
    simd: Simd,
) -> None:
    """Emit the kernel for at most ``FEW_QUERIES`` queries, all in one tile, on all threads."""
    count, lanes, heads = problem.key_rows, simd.lanes, problem.heads
    padded = (count + (lanes - 1)) // lanes * lanes
    with T.parallel(0, problem.queries.lead * heads) as job:
        head, lead = scalar(job % heads), scalar(job // heads)
        key_head = scalar(problem.key_head(head))
        scores = T.alloc_buffer((padded,), "float32")
        query, result = scratch(problem.k.size), scratch(problem.v.size)
        with T.serial(0, problem.query_rows) as row:
            with T.serial(0, problem.k.size) as d:
                value = q[problem.q.at(lead, head, 0, row, d)]
                T.buffer_store(query, value * T.float32(problem.scale), [d])
            _score(scores, query, k, problem, lead, key_head, simd)
            if mask is not None and problem.mask is not None:
                with T.serial(0, count) as key:
                    added = mask_at(mask, problem.mask, lead, head, heads, 0, key, row)
                    T.buffer_store(scores, scores[key] + added, [key])
            with T.serial(0, padded - count) as i:
                T.buffer_store(scores, T.float32(-math.inf), [count + i])
            total = _soft_max(scores, padded, simd)
            _weigh(result, scores, v, problem, lead, key_head, simd)
            with T.serial(0, problem.v.size) as d:
                T.buffer_store(out, result[d] * total, [lead, 0, head * problem.v.size + d, row])


def _score(
    scores: Buffer,
    query: Buffer,
    k: Buffer,
    problem: AttentionProblem,
    lead: Expr,
    head: Expr,
    simd: Simd,
) -> None:
    """The products of a query and all keys; as many keys at a time as fill a vector with scores."""
    lanes, size, count = simd.lanes, problem.k.size, problem.key_rows

    def block(first: Expr, last: Expr | None) -> None:
        sums = Sums(lanes, lanes)
        with T.serial(0, size // lanes) as part:
            features = span(part * lanes, lanes)
            for i in range(lanes):
                key = first + i if last is None else tirx.min(first + i, last)
                sums.add(i, k[lead, head, key, features], query[features])
        totals = _across([sums.get(i) for i in range(lanes)], simd)
        T.buffer_store(scores, totals, [span(first, lanes)])

    with T.serial(0, count // lanes) as i:
        block(i * lanes, None)
    if not (isinstance(count, int) and count % lanes == 0):
        with T.If(count % lanes != 0), T.Then():
            block(count // lanes * lanes, count - 1)


def _across(vectors: list[Expr], simd: Simd) -> Expr:
    """One vector of the sums across each of as many vectors as it has lanes.

    Pairs of vectors are added up: neighbours first, within segments, then segments.
    """
    unit = 1
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [_folded(a, b, unit, simd) for a, b in pairs]
        unit = _SEGMENT if len(vectors) * _SEGMENT <= simd.lanes else 1
    return vectors[0]


def _folded(a: Expr, b: Expr, unit: int, simd: Simd) -> Expr:
    """Even and odd groups of ``unit`` lanes of two vectors, added up: those of a, then those of b.

    Groups of one lane stay in their segments, in each of which a's come before b's.
    """
    reach = _SEGMENT if unit == 1 else simd.lanes
    even = [
        start + vector + group + i
        for start in range(0, simd.lanes, reach)
        for vector in (0, simd.lanes)
        for group in range(0, reach, 2 * unit)
        for i in range(unit)
    ]
    first, second = (
        tirx.Shuffle([a, b], [tirx.const(i + shift, "int32") for i in even]) for shift in (0, unit)
    )
    total = Registers(1, 1, simd)
    total.set(0, 0, first + second)
    return total.get(0, 0)


def _soft_max(scores: Buffer, padded: Expr, simd: Simd) -> Expr:
    """Turn scores into weights; return what makes them sum up to one."""
    lanes = simd.lanes
    each, lowest = scratch(lanes), T.float32(LOWEST)
    top, total = scratch(1), scratch(1)
    every = [span(0, lanes)]
    T.buffer_store(each, broadcast(lowest, lanes), every)
    with T.serial(0, padded // lanes) as i:
        T.buffer_store(each, tirx.max(each[tuple(every)], scores[span(i * lanes, lanes)]), every)
    T.buffer_store(top, lowest, [0])
    with T.serial(0, lanes) as i:
        T.buffer_store(top, tirx.max(top[0], each[i]), [0])
    T.buffer_store(each, broadcast(T.float32(0), lanes), every)
    with T.serial(0, padded // lanes) as i:
        at = span(i * lanes, lanes)
        below = scores[at] - broadcast(top[0], lanes)
        T.buffer_store(scores, vector_math.exp_to_one(below), [at])
        T.buffer_store(each, each[tuple(every)] + scores[at], every)
    T.buffer_store(total, T.float32(0), [0])
    with T.serial(0, lanes) as i:
        T.buffer_store(total, total[0] + each[i], [0])
    return scalar(T.float32(1) / tirx.max(total[0], T.float32(1e-30)), "float32")


def _weigh(
    result: Buffer,
    scores: Buffer,
    v: Buffer,
    problem: AttentionProblem,
    lead: Expr,
    head: Expr,
    simd: Simd,
) -> None:
    """The sum of all values, each times its weight; as many features at a time as fit."""
    lanes = simd.lanes
    vectors = problem.v.size // lanes
    for first in range(0, vectors, _CHAINS):
        some = min(_CHAINS, vectors - first)
        chains = _CHAINS // some
        sums = Sums(chains * some, lanes)

        def step(
            key: Expr, chain: int, first: int = first, some: int = some, sums: Sums = sums
        ) -> None:
            weight = broadcast(scores[key], lanes)
            for i in range(some):
                values = v[lead, head, key, span((first + i) * lanes, lanes)]
                sums.add(chain * some + i, weight, values)

        unrolled(problem.key_rows, chains, step)
        for i in range(some):
            T.buffer_store(result, sums.total(i, some), [span((first + i) * lanes, lanes)])
