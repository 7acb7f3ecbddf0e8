"""Y = epilogue(W X) in int8 or bf16 by dot products, for W dense or in blocks of words.

The family of ``schedules.cpu.matmul`` in words: a block is some rows of W by one line of X, four
inputs or two; its weight, broadcast, multiplies vectors of tokens, and the sums stay in registers.
An unstructured W is stored as every word that holds a non-zero. Instructions that multiply pairs
have blocks of two lines (see :mod:`sparse_tvm.schedules.cpu.dot_products`).
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.block_arrays import index_dtype
from sparse_tvm.schedules.cpu.dot_products import (
    DotProducts,
    MultiplyAdd,
    PairProducts,
    WordsAt,
)
from sparse_tvm.schedules.cpu.lane_tiles import (
    PREFETCH_BYTES,
    Buffer,
    Expr,
    Registers,
    TileVectors,
    argument,
    for_group_sizes,
    groups_of,
    prefetch,
    prim_func,
    scalar,
    side_by_side,
    symbol,
)
from sparse_tvm.schedules.cpu.low_matmul import (
    LowMatmul,
    Rows,
    SparseWeight,
    for_job_ranges,
    row_range,
)
from sparse_tvm.schedules.cpu.plane_code import one_of
from sparse_tvm.schedules.cpu.simd import Simd, dot_chains, dot_group_limit

_WORDS_PER_LINE = 16

_PRODUCTS = {products.depth: products for products in (DotProducts, PairProducts)}

_ROWS_AHEAD = 4
"""How many block rows ahead their outputs are asked for: CPUs do not foresee their order."""


def dot_matmul(
    problem: LowMatmul,
    rows: int,
    sparse: bool,
    simd: Simd,
    multiply_add: MultiplyAdd,
    group: int | None = None,
    depth: int = 1,
) -> tirx.PrimFunc:
    """Build the kernel for blocks of ``rows`` outputs by ``depth`` words of inputs, one or two.

    ``multiply_add(acc, x, w)`` is the dot product, from a kind of CPU's ``instructions``.

    Arguments of the PrimFunc, in order: x; the weight: ``data`` int32, dense
    ``[ceil(n_out / rows), ceil(lines / depth), rows * depth]``, sparse ``[blocks, rows * depth]``
    with the arguments of :class:`SparseWeight`, whose lines are ``depth`` of them; then those of
    :class:`Rows`, rows counted.

    ``group`` tiles share a pass over the weight, or as many as there are registers for.

    Where each tile has no more rows than a vector has lanes, one vector of it is computed.
    """
    limit = group or dot_group_limit(rows, simd)
    block_rows = -(-problem.n_out // rows)
    lines = -(-problem.k_in // (problem.precision.unit * depth))
    words = rows * depth
    of_sums = "int32" if problem.precision.scaled else "float32"

    with prim_func() as result:
        outputs = Rows(problem, simd, limit, paired=False)
        products = _PRODUCTS[depth](outputs.x, simd, multiply_add)
        weight = None
        if sparse:
            blocks = symbol("blocks")
            data = argument("data", (blocks, words), "int32")
            weight = SparseWeight.arguments(blocks, 1, block_rows, index_dtype(lines))
        else:
            data = argument("data", (block_rows, lines, words), "int32")
        outputs.declare(counted=True)

        def block_row_kernel(
            segment: Expr, block_row: Expr, live: int, vectors: TileVectors
        ) -> None:
            """Compute the ``live`` rows of a block row for a group of tiles."""
            chains = 1 if weight is None else dot_chains(live, vectors.count)
            nothing = T.broadcast(tirx.const(0, of_sums), simd.lanes)
            of_chains = []
            for _ in range(chains):
                sums = Registers(products.rows(live), vectors.count, simd, of_sums)
                sums.fill(lambda row, vector: nothing)
                of_chains.append(sums)

            def step(line: Expr, words_at: WordsAt, chain: int = 0) -> None:
                products.add(of_chains[chain], live, vectors, line, words_at)

            if weight is None:
                with T.serial(0, lines) as line:
                    step(line, lambda word: data[segment, line, word])
            else:
                soon = scalar(weight.rows[tirx.min(segment + _ROWS_AHEAD, block_rows - 1)] * rows)
                for place in range(vectors.count // vectors.used):
                    for row in range(rows):
                        outputs.ask(soon + row, vectors.first + place)
                _for_blocks(data, weight, words, segment, step, chains)
            sums, *others = of_chains
            for other in others:
                sums.add(other)
            # Whole tiles at once: what follows a sum is long, and CPUs look few of them ahead.
            for place in range(vectors.count // vectors.used):
                tile = vectors.first + place
                with outputs.output.peak(place, 0, vectors.used * simd.lanes) as peak:
                    for row in range(live):
                        first = place * vectors.used
                        parts = [products.total(sums, row, first + i) for i in range(vectors.used)]
                        outputs.finish(side_by_side(parts), block_row * rows + row, tile, 0, peak)

        def rows_kernel(vectors: TileVectors, start: Expr, stop: Expr) -> None:
            remainder = problem.n_out % rows
            with T.serial(0, stop - start) as i:
                segment = scalar(start + i)
                block_row = segment if weight is None else scalar(weight.rows[segment])
                if remainder == 0:
                    block_row_kernel(segment, block_row, rows, vectors)
                    return
                with T.If(block_row < block_rows - 1):
                    with T.Then():
                        block_row_kernel(segment, block_row, rows, vectors)
                    with T.Else():
                        block_row_kernel(segment, block_row, remainder, vectors)

        def tiles_kernel(limit: int, used: int) -> None:
            """Compute ``used`` vectors of all tiles, ``limit`` tiles at a time."""

            def jobs_kernel(group: Expr, job: Expr, last_job: Expr) -> None:
                start, stop = row_range(weight, block_rows, job, last_job)

                def body(first: Expr, size: int) -> None:
                    vectors = TileVectors(first, size, simd, used)
                    products.begin(vectors)
                    with outputs.output.jobs(first, size, job, last_job):
                        rows_kernel(vectors, start, stop)

                for_group_sizes(problem.tiles.count, limit, group, body)

            groups = groups_of(problem.tiles.count, limit)
            for_job_ranges(groups, jobs_kernel, (lambda: products.open(limit), lambda: None))

        def whole() -> None:
            tiles_kernel(limit, simd.per_tile)

        def few() -> None:
            tiles_kernel(1, 1)

        if simd.per_tile == 1:
            whole()
        elif problem.rows is None:
            one_of(outputs.rows <= simd.lanes, few, whole)
        elif problem.rows <= simd.lanes:
            few()
        else:
            whole()
        outputs.output.close()
    return result["func"]


def _for_blocks(
    data: Buffer,
    weight: SparseWeight,
    words: int,
    segment: Expr,
    step: Callable[[Expr, WordsAt, int], None],
    chains: int,
) -> None:
    """Call ``step(line, words, chain)`` for the stored blocks of a block row, of so many words.

    As many blocks as there are chains follow each other, each with sums of its own.
    """
    first = scalar(weight.indptr[segment])
    count = scalar(weight.indptr[segment + 1] - first)
    ahead = PREFETCH_BYTES // (4 * words)
    prefetch(weight.indices, (first + ahead, 0))
    if words == 1:  # short blocks, whose lines would be asked for again and again
        for line in range(2):
            prefetch(data, (first + ahead + line * _WORDS_PER_LINE, 0))

    def block(at: Expr, chain: int) -> None:
        if words > 1:
            prefetch(data, (at + ahead, 0))
        step(scalar(weight.indices[at, 0]), lambda word: data[at, word], chain)

    with T.serial(0, count // chains) as p:
        for chain in range(chains):
            block(first + p * chains + chain, chain)
    if chains > 1:
        with T.serial(0, count % chains) as rest:
            block(first + count - 1 - rest, 0)
