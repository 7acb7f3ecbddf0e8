"""Scaled dot-product attention in bf16: scores and weighted values in pairs, float32 soft-max.

One job is one head and up to eight tiles of queries, whose values it first brings into the form
of weights, by pairs of keys. Then, for one or two tiles of queries at a time, come
``scores[key, query]``; the soft-max runs down the keys, and its weights, rounded to bf16 in pairs
of keys, are the lines that the values multiply. Keys that a mask hides from all of these queries
are passed over, two tiles at a time. What multiplies is a :class:`Head`'s to say: that of
:mod:`sparse_tvm.schedules.x86.tile_attention` has a matrix unit, that of
:mod:`sparse_tvm.schedules.cpu.dot_attention` dot products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.attention_operands import LOWEST, Mask, mask_argument, mask_at
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    Tiles,
    TileVectors,
    argument,
    local,
    prim_func,
    scalar,
    scratch,
    splat,
    symbol,
    zero,
)
from sparse_tvm.schedules.cpu.low_precision import (
    Lines,
    bf16_pair,
    store_tiles,
    words_like,
)
from sparse_tvm.schedules.cpu.precision import BF16, HEAD_STEP, LINES, Precision
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.cpu.vector_math import rough_exp
from sparse_tvm.schedules.cpu.visible_keys import MaskedKeys, visible_tiles

_MAX_GROUP = 8
_SQUARE = LINES * LANES
"""Words of a tile of values: a row for each of some features, a column for each pair of keys."""

Span = tuple[Expr, Expr]
"""Some pairs of tiles of keys: the first, and the one behind the last."""


@dataclass(frozen=True)
class Bf16Attention:
    """One attention.

    Attributes
    ----------
    queries, keys : Tiles
        Extents of q, and of k and v.
    key_rows : int or None
        Keys, unless run time says how many.
    heads, head_size, value_size : int
        The sizes are multiples of ``HEAD_STEP``.
    scale : float
        Factor of the scores.
    mask : Mask | None
        An additive mask.
    out : Precision | None
        Of the output; None for float32.
    """

    queries: Tiles
    keys: Tiles
    key_rows: int | None
    heads: int
    head_size: int
    value_size: int
    scale: float
    mask: Mask | None = None
    out: Precision | None = None


def bf16_attention(problem: Bf16Attention, simd: Simd, make_head: MakeHead) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order: q, k and v in bf16, the mask if any, the number of keys
    as an int64 unless ``key_rows`` is a number, and the output.
    """
    queries, heads = problem.queries, problem.heads
    features = heads * problem.value_size
    with prim_func() as result:
        q = Lines("q", queries, heads * problem.head_size, BF16)
        k = Lines("k", problem.keys, heads * problem.head_size, BF16)
        v = Lines("v", problem.keys, features, BF16)
        mask = mask_argument(problem.mask, queries) if problem.mask else None
        count = problem.key_rows
        if count is None:
            count = T.arg("key_rows", symbol("key_rows"))
        if problem.out is None:
            out = argument("out", queries.shape(features))
        else:
            rounded = Lines("out", queries, features, problem.out)
        for lines in (q, k, v):
            lines.bind()
        if problem.out is None:
            flat = queries.flat(out, features)
        else:
            rounded.bind()
            flat = T.alloc_buffer((queries.count, features, LANES), "float32")

        groups = (queries.per_lead + (_MAX_GROUP - 1)) // _MAX_GROUP
        jobs = scalar(queries.lead * heads * groups)
        threads = scalar(tirx.call_packed("runtime.NumThreads"))
        with T.parallel(0, threads) as thread:
            kernel = make_head(problem, simd, (q, k, v), mask, count, flat)
            kernel.begin()
            first_job = scalar(thread * jobs // threads)
            last_job = scalar((thread + 1) * jobs // threads)
            with T.serial(0, last_job - first_job) as i:
                job = scalar(first_job + i)
                kernel.compute(
                    scalar(job // groups // heads), scalar(job // groups % heads), job % groups
                )
            kernel.end()
        if problem.out is not None:
            store_tiles(rounded, flat, queries, simd)
    return result["func"]


class Head(ABC):
    """The work of one job; its scratch memory serves all jobs of a thread."""

    width = 2
    """Tiles of queries at a time, 1 or 2."""

    def __init__(
        self,
        problem: Bf16Attention,
        simd: Simd,
        inputs: tuple[Lines, Lines, Lines],
        mask: Buffer,
        count: Expr,
        out: Buffer,
    ) -> None:
        self._problem, self._simd = problem, simd
        self._q, self._k, self._v = inputs
        self._mask, self._count, self._out = mask, count, out
        self._height = problem.value_size // LANES  # tiles of a head's values
        # Keys in pairs of tiles: as many as a line of bf16 has.
        self._pairs = (problem.keys.per_lead + 1) // 2
        self._values = self._memory(self._pairs * self._height * _SQUARE)
        self._scores = self._memory(self._pairs * HEAD_STEP * LANES * self.width)
        self._weights = self._memory(self._pairs * LINES * LANES * self.width)

    @abstractmethod
    def begin(self) -> None:
        """Before a thread's first job."""

    @abstractmethod
    def end(self) -> None:
        """After its last."""

    @abstractmethod
    def _pack_keys(self, lead: Expr, head: Expr, pair: Expr) -> None:
        """Bring two tiles of keys into the unit's form."""

    @abstractmethod
    def _score(self, lead: Expr, head: Expr, tile: Expr, width: int, span: Span) -> None:
        """Scores of a span of keys for some tiles of queries."""

    @abstractmethod
    def _value(self, lead: Expr, head: Expr, tile: Expr, width: int, span: Span) -> None:
        """Weighted sums of the values, divided by the weights' sums."""

    @staticmethod
    def _memory(words: Expr) -> Buffer:
        return T.alloc_buffer((words,), "int32")

    def compute(self, lead: Expr, head: Expr, group: Expr) -> None:
        """Attention of a head for a group of tiles of queries."""
        per_lead = self._problem.queries.per_lead
        first = scalar(group * _MAX_GROUP)
        size = scalar(tirx.min(_MAX_GROUP, per_lead - first))
        (begin, stop), span_of = self._visible(lead, head, first, size)
        with T.serial(0, stop - begin) as i:
            pair = scalar(begin + i)
            self._pack_keys(lead, head, pair)
            self._pack_values(lead, head, pair)

        def some_queries(place: Expr, width: int) -> None:
            tile, span = scalar(first + place), span_of(place, width)
            self._score(lead, head, tile, width, span)
            self._soft_max(lead, head, tile, width, span)
            self._value(lead, head, tile, width, span)

        with T.serial(0, size // self.width) as i:
            some_queries(i * self.width, self.width)
        if self.width > 1:
            with T.If(size % self.width == 1), T.Then():
                some_queries(size - 1, 1)

    def _visible(
        self, lead: Expr, head: Expr, first: Expr, size: Expr
    ) -> tuple[Span, Callable[[Expr, int], Span]]:
        """The keys that ``size`` tiles of queries see, and those that some neighbours see."""
        problem, simd = self._problem, self._simd
        keys = MaskedKeys(
            problem.heads, self._count, problem.keys.per_lead, problem.mask, self._mask
        )

        def seen(tile: Expr) -> Span:
            begin, stop = visible_tiles(keys, lead, head, TileVectors(tile, 1, simd), simd)
            return scalar(begin // 2), scalar((stop + 1) // 2)

        if problem.mask is None or not (problem.mask.queries and problem.mask.keys):
            same = seen(first)
            return same, lambda place, width: same
        begins, stops = scratch(_MAX_GROUP, "int32"), scratch(_MAX_GROUP, "int32")
        ends = local(2, "int32")
        T.buffer_store(ends, self._pairs, [0])
        T.buffer_store(ends, 0, [1])
        with T.serial(0, size) as place:
            begin, stop = seen(scalar(first + place))
            T.buffer_store(begins, begin, [place])
            T.buffer_store(stops, stop, [place])
            T.buffer_store(ends, tirx.min(ends[0], begin), [0])
            T.buffer_store(ends, tirx.max(ends[1], stop), [1])

        def of_neighbours(place: Expr, width: int) -> Span:
            places = [place + i for i in range(width)]
            begin = scalar(reduce(tirx.min, [begins[i] for i in places]))
            return begin, scalar(reduce(tirx.max, [stops[i] for i in places]))

        return (ends[0], ends[1]), of_neighbours

    def _tile(self, lead: Expr, tile: Expr) -> Expr:
        """A tile of keys, among those of all leading indices; the last one instead of none."""
        per_lead = self._problem.keys.per_lead
        return lead * per_lead + tirx.min(tile, per_lead - 1)

    def _pack_values(self, lead: Expr, head: Expr, pair: Expr) -> None:
        """Rows of features, columns of two tiles' keys; zeros behind the last key."""
        tiles = [scalar(self._tile(lead, pair * 2 + side)) for side in range(2)]
        live = []
        for side in range(2):
            key = T.ramp(T.Cast("int32", (pair * 2 + side) * LANES), 1, LANES)
            below = key < T.broadcast(T.Cast("int32", self._count), LANES)
            live.append(T.Select(below, words_like(-1, LANES), words_like(0, LANES)))
        with T.serial(0, self._height) as tile, T.serial(0, LANES // 2) as i:
            line = scalar((head * self._height + tile) * (LANES // 2) + i)
            halves = [
                T.reinterpret(
                    f"int16x{2 * LANES}",
                    T.bitwise_and(self._v.get(tiles[side], line, 0, LANES), live[side]),
                )
                for side in range(2)
            ]
            for odd in range(2):
                row = tirx.Shuffle(halves, [tirx.const(2 * j + odd, "int32") for j in range(32)])
                at = (pair * self._height + tile) * _SQUARE + (2 * i + odd) * LANES
                words = T.reinterpret(f"int32x{LANES}", row)
                T.buffer_store(self._values, words, [T.ramp(at, 1, LANES)])

    def _score_at(self, key: Expr, column: int) -> Expr:
        return (column * (self._pairs * HEAD_STEP) + key) * LANES

    def _soft_max(self, lead: Expr, head: Expr, tile: Expr, width: int, span: Span) -> None:
        """Turn the scores of some tiles of queries into pairs of weights, which sum up to one."""
        simd, mask = self._simd, self._problem.mask
        first_pair, last_pair = span[0] * LINES, span[1] * LINES  # of keys
        count = scalar(tirx.min(self._count, last_pair * 2))
        full = count // 2 - first_pair
        lanes, scale = simd.lanes, self._problem.scale
        real, integer = f"float32x{lanes}", f"int32x{lanes}"
        vectors = [divmod(v * lanes, LANES) for v in range(width * simd.per_tile)]
        # Even and odd keys by themselves: chains of additions are what would take the time.
        tops, totals = Registers(2, len(vectors), simd), Registers(2, len(vectors), simd)
        tops.fill(lambda row, vector: splat(T.float32(LOWEST), simd))
        totals.fill(lambda row, vector: zero(simd))

        def place(key: Expr, vector: int) -> Expr:
            column, first = vectors[vector]
            return T.ramp(self._score_at(key, column) + first, 1, lanes)

        def see(key: Expr, parity: int) -> None:
            for vector, (column, first) in enumerate(vectors):
                at = place(key, vector)
                score = Registers(1, 1, simd)
                score.set(0, 0, T.reinterpret(real, self._scores[at]))
                if mask is not None:
                    of_queries = tile + column, key, T.ramp(first, 1, lanes)
                    added = mask_at(self._mask, mask, lead, head, self._problem.heads, *of_queries)
                    score.set(0, 0, score.get(0, 0) * splat(T.float32(scale), simd) + added)
                    T.buffer_store(self._scores, T.reinterpret(integer, score.get(0, 0)), [at])
                top = tirx.max(tops.get(parity, vector), score.get(0, 0))
                tops.set(parity, vector, top)

        def weight(key: Expr, parity: int, vector: int) -> Expr:
            value = Registers(1, 1, simd)
            score = T.reinterpret(real, self._scores[place(key, vector)])
            factor = splat(T.float32(scale if mask is None else 1.0), simd)
            value.set(0, 0, rough_exp((score - tops.get(0, vector)) * factor))
            totals.set(parity, vector, totals.get(parity, vector) + value.get(0, 0))
            return value.get(0, 0)

        def store(pair: Expr, vector: int, words: Expr) -> None:
            column, first = vectors[vector]
            at = self._weight_at(pair, column) + first
            T.buffer_store(self._weights, words, [T.ramp(at, 1, lanes)])

        with T.serial(0, full) as i:
            for parity in range(2):
                see((first_pair + i) * 2 + parity, parity)
        with T.If(count % 2 == 1), T.Then():
            see(count - 1, 0)
        for vector in range(len(vectors)):
            tops.set(0, vector, tirx.max(tops.get(0, vector), tops.get(1, vector)))
        with T.serial(0, full) as i:
            pair = first_pair + i
            for vector in range(len(vectors)):
                even, odd = weight(pair * 2, 0, vector), weight(pair * 2 + 1, 1, vector)
                store(pair, vector, bf16_pair(even, odd, lanes))
        with T.If(count % 2 == 1), T.Then():
            for vector in range(len(vectors)):
                last = weight(count - 1, 0, vector)
                store(count // 2, vector, bf16_pair(last, zero(simd), lanes))
        used = (count + 1) // 2
        with T.serial(0, last_pair - used) as i:
            for vector in range(len(vectors)):
                store(used + i, vector, words_like(0, lanes))
        for vector in range(len(vectors)):
            total = totals.get(0, vector) + totals.get(1, vector)
            # The largest score has weight 1: only a query without any key has a sum of about 0.
            inverse = splat(T.float32(1), simd) / tirx.max(total, splat(T.float32(1e-30), simd))
            words = T.reinterpret(integer, inverse)
            T.buffer_store(self._scores, words, [place(0, vector)])  # which nobody needs any more

    def _weight_at(self, pair: Expr, column: int) -> Expr:
        return (column * (self._pairs * LINES) + pair) * LANES

    def _inverse(self, column: int, first: int) -> Registers:
        """What makes the weights of some queries sum up to one, after the soft-max."""
        lanes = self._simd.lanes
        factor = Registers(1, 1, self._simd)
        words = self._scores[T.ramp(self._score_at(0, column) + first, 1, lanes)]
        factor.set(0, 0, T.reinterpret(f"float32x{lanes}", words))
        return factor

    def _place(self, lead: Expr, head: Expr, tile: Expr, feature: Expr, first: int) -> list[Expr]:
        """Where a feature of the result of some queries goes."""
        row = head * self._problem.value_size + feature
        lanes = T.ramp(first, 1, self._simd.lanes)
        return [lead * self._problem.queries.per_lead + tile, row, lanes]


MakeHead = Callable[
    [Bf16Attention, Simd, tuple[Lines, Lines, Lines], Buffer, Expr, Buffer],
    Head,
]
"""Makes a head of: problem, vector unit, q, k and v, mask, number of keys, and output."""
