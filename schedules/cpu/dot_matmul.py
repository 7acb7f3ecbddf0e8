"""Y = epilogue(W X) in int8 or bf16 by dot products, for W dense or in blocks of words.

The family of ``schedules.cpu.matmul`` in words: a block is some rows of W by one line of X, four
inputs or two; its weight, broadcast, multiplies vectors of tokens, and the sums stay in registers.
An unstructured W is stored as every word that holds a non-zero.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.block_arrays import index_dtype
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    TileVectors,
    argument,
    for_group_sizes,
    groups_of,
    loaded_together,
    local,
    prefetch,
    prim_func,
    ramp,
    scalar,
    side_by_side,
    symbol,
)
from sparse_tvm.schedules.cpu.low_matmul import (
    PREFETCH_BYTES,
    LowMatmul,
    Rows,
    SparseWeight,
    for_job_ranges,
    row_range,
)
from sparse_tvm.schedules.cpu.plane_code import one_of
from sparse_tvm.schedules.cpu.simd import Simd, dot_chains, dot_group_limit

_WORDS_PER_LINE = 16

_ROWS_AHEAD = 4
"""How many block rows ahead their outputs are asked for: CPUs do not foresee their order."""


MultiplyAdd = Callable[[Expr, Expr, Expr], Expr]
"""A dot product instruction: sums, words of x and words of weights to new sums."""


def dot_matmul(
    problem: LowMatmul,
    rows: int,
    sparse: bool,
    simd: Simd,
    multiply_add: MultiplyAdd,
    group: int | None = None,
) -> tirx.PrimFunc:
    """Build the kernel for blocks of ``rows`` outputs by one word of inputs.

    ``multiply_add(acc, x, w)`` is the dot product, from a kind of CPU's ``instructions``.

    Arguments of the PrimFunc, in order: x; the weight: ``data`` int32, dense
    ``[ceil(n_out / rows), lines, rows]``, sparse ``[blocks, rows]`` with the arguments of
    :class:`SparseWeight`; then those of :class:`Rows`, rows counted.

    ``group`` tiles share a pass over the weight, or as many as there are registers for.

    Where each tile has no more rows than a vector has lanes, one vector of it is computed.
    """
    limit = group or dot_group_limit(rows, simd)
    block_rows = -(-problem.n_out // rows)
    lines = -(-problem.k_in // problem.precision.unit)
    of_sums = "int32" if problem.precision.scaled else "float32"

    with prim_func() as result:
        outputs = Rows(problem, simd, limit, paired=False)
        x = outputs.x
        weight = None
        if sparse:
            blocks = symbol("blocks")
            data = argument("data", (blocks, rows), "int32")
            weight = SparseWeight.arguments(blocks, 1, block_rows, index_dtype(lines))
        else:
            data = argument("data", (block_rows, lines, rows), "int32")
        outputs.declare(counted=True)

        def block_row_kernel(
            segment: Expr, block_row: Expr, live: int, vectors: TileVectors
        ) -> None:
            """Compute the ``live`` rows of a block row for a group of tiles."""
            chains = 1 if weight is None else dot_chains(live, vectors.count)
            acc = local(chains * live * vectors.count * simd.lanes, of_sums)

            def at(row: int, vector: int, chain: int = 0) -> Expr:
                place = (chain * live + row) * vectors.count + vector
                return ramp(place * simd.lanes, simd)

            every = [(row, vector) for row in range(live) for vector in range(vectors.count)]
            for row, vector in every:
                for chain in range(chains):
                    nothing = T.broadcast(tirx.const(0, of_sums), simd.lanes)
                    T.buffer_store(acc, nothing, [at(row, vector, chain)])

            def step(line: Expr, weight_of: Callable[[int], Expr], chain: int = 0) -> None:
                operands = []
                for vector in range(vectors.count):
                    tile, lanes = vectors.at(vector)
                    operands.append(x.get(tile, line, lanes.base, simd.lanes))
                words = [weight_of(row) for row in range(live)]
                if simd.by_element:
                    words = loaded_together(words, simd)
                for row, word in enumerate(words):
                    w = T.broadcast(word, simd.lanes)
                    for vector, operand in enumerate(operands):
                        place = at(row, vector, chain)
                        T.buffer_store(acc, multiply_add(acc[place], operand, w), [place])

            if weight is None:
                with T.serial(0, lines) as line:
                    step(line, lambda row: data[segment, line, row])
            else:
                soon = scalar(weight.rows[tirx.min(segment + _ROWS_AHEAD, block_rows - 1)] * rows)
                for place in range(vectors.count // vectors.used):
                    for row in range(rows):
                        outputs.ask(soon + row, vectors.first + place)
                _for_blocks(data, weight, rows, segment, step, chains)
                for row, vector in every:
                    for chain in range(1, chains):
                        total = acc[at(row, vector)] + acc[at(row, vector, chain)]
                        T.buffer_store(acc, total, [at(row, vector)])
            # Whole tiles at once: what follows a sum is long, and CPUs look few of them ahead.
            for place in range(vectors.count // vectors.used):
                tile = vectors.first + place
                with outputs.output.peak(place, 0, vectors.used * simd.lanes) as peak:
                    for row in range(live):
                        parts = [
                            acc[at(row, place * vectors.used + i)] for i in range(vectors.used)
                        ]
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
                    with outputs.output.jobs(first, size, job, last_job):
                        rows_kernel(TileVectors(first, size, simd, used), start, stop)

                for_group_sizes(problem.tiles.count, limit, group, body)

            for_job_ranges(groups_of(problem.tiles.count, limit), jobs_kernel)

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
    rows: int,
    segment: Expr,
    step: Callable[[Expr, Callable[[int], Expr], int], None],
    chains: int,
) -> None:
    """Call ``step(line, weight of a row, chain)`` for the stored blocks of a block row.

    As many blocks as there are chains follow each other, each with sums of its own.
    """
    first = scalar(weight.indptr[segment])
    count = scalar(weight.indptr[segment + 1] - first)
    ahead = PREFETCH_BYTES // (4 * rows)
    prefetch(weight.indices, (first + ahead, 0))
    if rows == 1:  # short blocks, whose lines would be asked for again and again
        for line in range(2):
            prefetch(data, (first + ahead + line * _WORDS_PER_LINE, 0))

    def block(at: Expr, chain: int) -> None:
        if rows > 1:
            prefetch(data, (at + ahead, 0))
        step(scalar(weight.indices[at, 0]), lambda row: data[at, row], chain)

    with T.serial(0, count // chains) as p:
        for chain in range(chains):
            block(first + p * chains + chain, chain)
    if chains > 1:
        with T.serial(0, count % chains) as rest:
            block(first + count - 1 - rest, 0)
