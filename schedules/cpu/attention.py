"""Scaled dot-product attention, scores never leaving the core's cache.

One job is one (group of query tiles, head). Keys are the rows of a small matmul whose vectors are
query lanes: scores[key, lanes] = sum_d K[d, key] Q[d, lanes]. Soft-max then runs down the keys,
lane by lane, and the same register-blocked product gives O[d, lanes] = sum_key V[d, key]
P[key, lanes]. Heads are slices of the feature axis, so nothing is ever transposed; or q, k, v lie
by heads, as after rotary positions and in a cache, and are read there
(:mod:`sparse_tvm.schedules.cpu.attention_operands`). A few queries of such keys have a kernel of
their own, :mod:`sparse_tvm.schedules.cpu.row_attention`, chosen at run time where only that knows
how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu import vector_math
from sparse_tvm.schedules.cpu.attention_blocks import Blocks, check_blocks, usual_blocks
from sparse_tvm.schedules.cpu.attention_operands import (
    LOWEST,
    AttentionProblem,
    ByHeads,
    mask_argument,
    mask_at,
)
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    TileVectors,
    argument,
    for_group_sizes,
    groups_of,
    prim_func,
    ramp,
    scalar,
    splat,
    zero,
)
from sparse_tvm.schedules.cpu.row_attention import FEW_QUERIES, few_queries, takes_few_queries
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.cpu.visible_keys import MaskedKeys, visible_tiles


def attention(problem: AttentionProblem, simd: Simd, blocks: Blocks | None = None) -> tirx.PrimFunc:
    """Build the kernel.

    ``blocks`` are keys, and tiles of queries, that are summed up together; None for as many as
    usual. A few queries of a cache are not computed in blocks.

    Arguments of the PrimFunc, in order: q, k, v as the problem has them, the mask if any, then as
    int64 whatever of the numbers of keys and of queries is not known, and the output
    ``[lead, tiles, heads * value_size, LANES]`` over the queries' tiles.

    Raises
    ------
    ValueError
        When the target has too few registers for the blocks.
    """
    blocks = usual_blocks(simd) if blocks is None else blocks
    check_blocks(blocks, simd)
    out_shape = problem.queries.shape(problem.heads * problem.v.size)
    numbers = {"key_rows": problem.key_rows, "query_rows": problem.query_rows}
    with prim_func() as result:
        q = argument("q", problem.q.shape)
        k = argument("k", problem.k.shape)
        v = argument("v", problem.v.shape)
        mask = mask_argument(problem.mask, problem.queries) if problem.mask else None
        for name, number in numbers.items():
            if isinstance(number, tirx.Var):
                T.arg(name, number)
        out = argument("out", out_shape)
        kernel = _Attention(problem, q, k, v, mask, out, simd, *blocks)
        rows = problem.query_rows if takes_few_queries(problem, simd) else None
        if rows is None or (isinstance(rows, int) and rows > FEW_QUERIES):
            kernel.run()
        elif isinstance(rows, int):
            few_queries(problem, q, k, v, mask, out, simd)
        else:
            with T.If(rows <= FEW_QUERIES):
                with T.Then():
                    few_queries(problem, q, k, v, mask, out, simd)
                with T.Else():
                    kernel.run()
    return result["func"]


@dataclass(frozen=True)
class _Attention:
    """The kernel whose lanes are queries.

    ``block`` keys, or features of the result, are summed up together, for ``group`` tiles of
    queries, which are a job.
    """

    problem: AttentionProblem
    q: Buffer
    k: Buffer
    v: Buffer
    mask: Buffer | None
    out: Buffer
    simd: Simd
    block: int
    group: int

    def run(self) -> None:
        """Emit the jobs, in parallel."""
        problem, queries = self.problem, self.problem.queries
        heads, groups = problem.heads, groups_of(queries.per_lead, self.group)
        with T.parallel(0, queries.lead * groups * heads) as job:
            head = scalar(job % heads)
            lead = scalar(job // heads // groups)
            width = self.group * LANES
            scores = T.alloc_buffer((problem.key_tiles * LANES, width), "float32")
            keys = MaskedKeys(heads, problem.key_rows, problem.key_tiles, problem.mask, self.mask)
            packed = None
            if isinstance(problem.q, ByHeads):
                packed = T.alloc_buffer((problem.q.size, width), "float32")

            def body(first: Expr, size: int) -> None:
                vectors = TileVectors(first, size, self.simd)
                key_head = scalar(problem.key_head(head))
                if packed is not None:
                    self._pack_queries(packed, lead, head, first, size)
                shown = visible_tiles(keys, lead, head, vectors, self.simd)
                self._score(scores, packed, lead, head, key_head, vectors, shown)
                total = self._soft_max(scores, lead, head, vectors, shown)
                self._weigh(scores, total, lead, head, key_head, vectors, shown)

            for_group_sizes(queries.per_lead, self.group, job // heads % groups, body)

    def _place(self, key: Expr, vector: int) -> list[Expr]:
        """Where the scores of a key are, for one vector of queries."""
        return [key, ramp(vector * self.simd.lanes, self.simd)]

    def _pack_queries(self, packed: Buffer, lead: Expr, head: Expr, first: Expr, size: int) -> None:
        """Copy some tiles of queries that lie by heads to ``[features, lanes]``."""
        q = self.problem.q
        assert isinstance(q, ByHeads)
        with T.serial(0, size) as tile, T.serial(0, LANES) as lane, T.serial(0, q.size) as d:
            value = self.q[q.at_most(lead, head, first + tile, lane, d)]
            T.buffer_store(packed, value, [d, tile * LANES + lane])

    def _score(
        self,
        scores: Buffer,
        packed: Buffer | None,
        lead: Expr,
        head: Expr,
        key_head: Expr,
        vectors: TileVectors,
        shown: tuple[Expr, Expr],
    ) -> None:
        """Keys times queries, for the groups of keys from one to another."""
        first, stop = shown
        q, k = self.problem.q, self.problem.k

        def query(vector: int, d: Expr) -> Expr:
            tile, lanes = vectors.at(vector)
            if packed is not None:
                return packed[d, ramp(vector * self.simd.lanes, self.simd)]
            return self.q[(*q.at(lead, head, tile, 0, d)[:-1], lanes)]

        def blocks(tile: Expr, at: Callable[..., tuple[Expr, ...]]) -> None:
            def block(begin: Expr, live: int) -> None:
                acc = Registers(live, vectors.count, self.simd)
                acc.fill(lambda row, vector: zero(self.simd))

                def key(row: int, d: Expr) -> Expr:
                    return self.k[at(lead, key_head, tile, begin + row, d)]

                self._add_products(acc, k.size, k.neighbours == "features", key, query)
                for row in range(live):
                    for vector in range(vectors.count):
                        place = self._place(tile * LANES + begin + row, vector)
                        T.buffer_store(scores, acc.get(row, vector), place)

            _blocks(LANES, self.block, block)

        with T.serial(0, _between(first, tirx.min(stop, k.full_tiles))) as tile:
            blocks(first + tile, k.at)
        if isinstance(k, ByHeads) and not (isinstance(k.rows, int) and k.rows % LANES == 0):
            with T.serial(0, _between(k.full_tiles, stop)):
                blocks(k.full_tiles, k.at_most)

    def _add_products(
        self,
        acc: Registers,
        extent: Expr,
        together: bool,
        left: Callable[[int, Expr], Expr],
        right: Callable[[int, Expr], Expr],
    ) -> None:
        """Add ``left(row, i) * right(vector, i)`` for all i below ``extent``.

        ``together`` tells that ``left`` has neighbours in memory from i to i + 1.
        """
        if not (together and self.simd.by_element):
            with T.serial(0, extent) as i:
                acc.multiply_add(lambda row: left(row, i), lambda vector: right(vector, i))
            return
        steps = self.simd.lanes

        def add(first: Expr, count: int) -> None:
            acc.multiply_add_steps(
                count,
                lambda row, step: left(row, first + step),
                lambda vector, step: right(vector, first + step),
            )

        with T.serial(0, extent // steps) as i:
            add(i * steps, steps)
        if not (isinstance(extent, int) and extent % steps == 0):
            with T.serial(0, extent % steps) as i:
                add(extent // steps * steps + i, 1)

    def _soft_max(
        self,
        scores: Buffer,
        lead: Expr,
        head: Expr,
        vectors: TileVectors,
        shown: tuple[Expr, Expr],
    ) -> Registers:
        """Turn scores into weights; return what makes them sum up to one."""
        problem, simd = self.problem, self.simd
        first = shown[0] * LANES
        count = _between(first, tirx.min(shown[1] * LANES, problem.key_rows))

        def scaled(key: Expr, vector: int) -> Expr:
            score = scores[tuple(self._place(key, vector))]
            score *= splat(T.float32(problem.scale), simd)
            if self.mask is not None and problem.mask is not None:
                of_query = (problem.heads, vectors.at(vector)[0], key, vectors.at(vector)[1])
                score += mask_at(self.mask, problem.mask, lead, head, *of_query)
            return score

        # Scaled twice, which takes less time than to store what is scaled.
        top = Registers(1, vectors.count, simd)
        top.fill(lambda _, vector: splat(T.float32(LOWEST), simd))
        with T.serial(0, count) as i:
            for vector in range(vectors.count):
                top.set(0, vector, tirx.max(top.get(0, vector), scaled(first + i, vector)))

        total = Registers(1, vectors.count, simd)
        total.fill(lambda _, vector: zero(simd))
        with T.serial(0, count) as i:
            for vector in range(vectors.count):
                below, weight = Registers(1, 1, simd), Registers(1, 1, simd)
                below.set(0, 0, scaled(first + i, vector) - top.get(0, vector))
                weight.set(0, 0, vector_math.exp_to_one(below.get(0, 0)))
                total.set(0, vector, total.get(0, vector) + weight.get(0, 0))
                T.buffer_store(scores, weight.get(0, 0), self._place(first + i, vector))
        # The largest score has weight 1, so only a query without any key has a sum of 0.
        total.fill(
            lambda _, vector: (
                splat(T.float32(1), simd)
                / tirx.max(total.get(0, vector), splat(T.float32(1e-30), simd))
            )
        )
        return total

    def _weigh(
        self,
        scores: Buffer,
        total: Registers,
        lead: Expr,
        head: Expr,
        key_head: Expr,
        vectors: TileVectors,
        shown: tuple[Expr, Expr],
    ) -> None:
        """Values times weights."""
        beginning, stop = shown
        problem, v = self.problem, self.problem.v

        def block(first: Expr, live: int) -> None:
            acc = Registers(live, vectors.count, self.simd)
            acc.fill(lambda row, vector: zero(self.simd))
            with T.serial(0, _between(beginning, stop)) as i:
                tile = beginning + i
                keys = tirx.min(LANES, problem.key_rows - tile * LANES)

                def value(row: int, key: Expr) -> Expr:
                    return self.v[v.at(lead, key_head, tile, key, first + row)]

                def weight(vector: int, key: Expr) -> Expr:
                    return scores[tuple(self._place(tile * LANES + key, vector))]

                self._add_products(acc, keys, v.neighbours == "rows", value, weight)
            for row in range(live):
                for vector in range(vectors.count):
                    tile, lanes = vectors.at(vector)
                    result = acc.get(row, vector) * total.get(0, vector)
                    feature = head * v.size + first + row
                    T.buffer_store(self.out, result, [lead, tile, feature, lanes])

        _blocks(v.size, self.block, block)


def _between(first: Expr, stop: Expr) -> Expr:
    """How many there are from the first on."""
    return stop if isinstance(first, int) and first == 0 else tirx.max(stop - first, 0)


def _blocks(extent: int, most: int, body: Callable[[Expr, int], None]) -> None:
    """Call ``body(first, live)`` for blocks of ``extent``, as large and as even as can be."""
    count = -(-extent // most)
    larger, size = extent % count, extent // count
    if larger:
        with T.serial(0, larger) as i:
            body(i * (size + 1), size + 1)
    with T.serial(0, count - larger) as i:
        body(larger * (size + 1) + i * size, size)
