"""Y = epilogue(W X) on lane tiles, for W dense, CSR or BSR: one family of kernels.

For each block row of W, a block of accumulators (rows of W by vectors of tokens, up to four tiles
of them) stays in registers while the stored blocks stream past once, linearly; each block
multiplies the vectors of X at its column. A dense W is the same loop with every block present and
no indices. Rows are split over jobs by the number of stored blocks, so that threads finish
together.

A sparse W with few rows per block does little with each vector of X, so what counts is where X
comes from. Such a W is stored in parts of columns (K-splitting): the part of X that one part
multiplies stays in the first cache while all rows of a thread pass over it, and the sums wait in Y
from part to part. Within a part and a job, block rows are sorted by their number of blocks, for
the CPU to foresee where the inner loop ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Activation, Bias, Layout, Residual, Step
from sparse_tvm.schedules.cpu.block_arrays import JOBS_PER_GROUP, index_dtype
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    Tiles,
    TileVectors,
    argument,
    for_group_sizes,
    groups_of,
    prefetch,
    prim_func,
    scalar,
    splat,
    symbol,
    zero,
)
from sparse_tvm.schedules.cpu.simd import LANES, Simd, group_limit
from sparse_tvm.schedules.cpu.vector_math import ACTIVATIONS

_PREFETCH_BYTES = 4096
"""How far ahead of its use a weight is asked for: the CPU's own prefetchers stop at each page."""


def matmul(
    tiles: Tiles,
    n_out: int,
    k_in: int,
    layout: Layout,
    epilogue: Sequence[Step],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order:
    X ``[lead, tiles, k_in, LANES]``; then the weight: ``data`` (dense
    ``[ceil(n_out / r), k_in, r]``; sparse ``[blocks, c, r]``) and, if sparse, ``indices``
    ``[blocks]`` (first input column of each block), ``indptr`` int32
    ``[parts * ceil(n_out / r) + 1]`` (first block of each block row of each part), ``rows`` int32
    ``[parts * ceil(n_out / r)]`` (which block row that is) and ``partition`` int32
    ``[JOBS_PER_GROUP + 1]`` (first of a part's block rows for each job); then one argument per
    bias (``[n_out]``) or residual (like Y) step of the epilogue; last Y
    ``[lead, tiles, n_out, LANES]``.

    Epilogue steps apply in order.
    """
    rows, columns = layout.block
    parts = layout.get("parts", 1)
    block_rows = -(-n_out // rows)
    limit = group_limit(rows, simd)

    with prim_func() as result:
        x = argument("x", tiles.shape(k_in))
        if layout.sparse:
            blocks = symbol("blocks")
            data = argument("data", (blocks, columns, rows))
            indices = argument("indices", (blocks,), index_dtype(k_in))
            indptr = argument("indptr", (parts * block_rows + 1,), "int32")
            order = argument("rows", (parts * block_rows,), "int32")
            partition = argument("partition", (JOBS_PER_GROUP + 1,), "int32")
        else:
            data = argument("data", (block_rows, k_in, rows))
        extras = [
            argument(f"{step}_{i}", (n_out,) if isinstance(step, Bias) else tiles.shape(n_out))
            for i, step in enumerate(epilogue)
            if step.operand
        ]
        y = argument("y", tiles.shape(n_out))

        x = tiles.flat(x, k_in)
        y = tiles.flat(y, n_out)
        operands = iter(extras)
        steps: list[tuple[Step, Buffer]] = []
        for step in epilogue:
            extra = next(operands) if step.operand else None
            steps.append((step, tiles.flat(extra, n_out) if isinstance(step, Residual) else extra))

        def prefetch_as_many(first: Expr, count: Expr) -> None:
            """Ask for as much of the weight, a little further on, as the next blocks will use."""
            size = rows * columns
            ahead = first + _PREFETCH_BYTES // (4 * size)
            if size == 1:  # a row of a part is too short for a loop
                for line in range(2):
                    prefetch(data, (ahead + line * LANES, 0, 0))
                prefetch(indices, (ahead,))
                return
            with T.serial(0, (count * size + (LANES - 1)) // LANES) as line:
                prefetch(data, (ahead + line * LANES // size, 0, 0))
            with T.serial(0, (count + 2 * LANES - 1) // (2 * LANES)) as line:
                prefetch(indices, (ahead + line * 2 * LANES,))

        def accumulate(acc: Registers, segment: Expr, load: Callable[[Expr, int], Expr]) -> None:
            """Stream the stored blocks of one block row of one part."""
            if not layout.sparse:
                with T.serial(0, k_in) as k:
                    acc.multiply_add(lambda row: data[segment, k, row], lambda v: load(k, v))
                return
            first = scalar(indptr[segment])
            count = scalar(indptr[segment + 1] - first)
            prefetch_as_many(first, count)
            with T.serial(0, count) as p:
                at = first + p
                column = scalar(indices[at])
                for c in range(columns):

                    def weight(row: int, c: int = c) -> Expr:
                        return data[at, c, row]

                    def operand(vector: int, c: int = c) -> Expr:
                        return load(column + c, vector)

                    acc.multiply_add(weight, operand)

        def at_y(first_row: Expr, row: int, vector: int, vectors: TileVectors) -> list[Expr]:
            tile, lanes = vectors.at(vector)
            return [tile, first_row + row, lanes]

        def finish(acc: Registers, first_row: Expr, vectors: TileVectors) -> None:
            """Apply the epilogue in registers and store."""
            for row in range(acc.rows):
                for vector in range(acc.vectors):
                    at = at_y(first_row, row, vector, vectors)
                    for step, extra in steps:
                        acc.set(row, vector, _apply(step, acc.get(row, vector), extra, at, simd))
                    T.buffer_store(y, acc.get(row, vector), at)

        def block_row_kernel(
            part: Expr, segment: Expr, block_row: Expr, live: int, vectors: TileVectors
        ) -> None:
            """Add one part's product to the ``live`` rows of a block row, for a group of tiles."""
            first_row = block_row * rows
            acc = Registers(live, vectors.count, simd)

            def load(k: Expr, vector: int) -> Expr:
                tile, lanes = vectors.at(vector)
                return x[tile, k, lanes]

            def sums_so_far(row: int, vector: int) -> Expr:
                return y[tuple(at_y(first_row, row, vector, vectors))]

            if parts == 1:
                acc.fill(lambda row, vector: zero(simd))
                accumulate(acc, segment, load)
                finish(acc, first_row, vectors)
                return
            with T.If(part == 0):
                with T.Then():
                    acc.fill(lambda row, vector: zero(simd))
                with T.Else():
                    acc.fill(sums_so_far)
            accumulate(acc, segment, load)
            with T.If(part == parts - 1):
                with T.Then():
                    finish(acc, first_row, vectors)
                with T.Else():
                    for row in range(acc.rows):
                        for vector in range(acc.vectors):
                            at = at_y(first_row, row, vector, vectors)
                            T.buffer_store(y, acc.get(row, vector), at)

        def rows_kernel(first_tile: Expr, size: int, start: Expr, stop: Expr) -> None:
            """Compute a range of a part's block rows, part by part, for one group of tiles."""
            vectors = TileVectors(first_tile, size, simd)
            remainder = n_out % rows
            with T.serial(0, parts) as part, T.serial(0, stop - start) as i:
                segment = scalar(part * block_rows + start + i)
                block_row = scalar(order[segment]) if layout.sparse else segment
                if remainder == 0:
                    block_row_kernel(part, segment, block_row, rows, vectors)
                else:
                    with T.If(block_row < block_rows - 1):
                        with T.Then():
                            block_row_kernel(part, segment, block_row, rows, vectors)
                        with T.Else():
                            block_row_kernel(part, segment, block_row, remainder, vectors)

        # Each thread takes one range of the jobs of all groups. Group-major, so that it keeps the
        # same tokens through the whole model, in its own cache; and as one range, so that a part
        # of X serves all its rows.
        threads = scalar(tirx.call_packed("runtime.NumThreads"))
        jobs = scalar(groups_of(tiles.count, limit) * JOBS_PER_GROUP)
        with T.parallel(0, threads) as thread:
            begin = scalar(thread * jobs // threads)
            end = scalar((thread + 1) * jobs // threads)
            first_group = scalar(begin // JOBS_PER_GROUP)
            group_stop = (end + (JOBS_PER_GROUP - 1)) // JOBS_PER_GROUP
            with T.serial(0, scalar(group_stop - first_group)) as i:
                group = scalar(first_group + i)
                job = scalar(tirx.max(begin - group * JOBS_PER_GROUP, 0))
                last_job = scalar(tirx.min(end - group * JOBS_PER_GROUP, JOBS_PER_GROUP))
                if layout.sparse:
                    start, stop = scalar(partition[job]), scalar(partition[last_job])
                else:
                    start = scalar(job * block_rows // JOBS_PER_GROUP)
                    stop = scalar(last_job * block_rows // JOBS_PER_GROUP)

                def body(first: Expr, size: int, start: Expr = start, stop: Expr = stop) -> None:
                    rows_kernel(first, size, start, stop)

                for_group_sizes(tiles.count, limit, group, body)
    return result["func"]


def _apply(step: Step, value: Expr, extra: Buffer, at: list[Expr], simd: Simd) -> Expr:
    """One epilogue step on one register."""
    if isinstance(step, Bias):
        return value + splat(extra[at[1]], simd)
    if isinstance(step, Residual):
        return value + extra[tuple(at)]
    assert isinstance(step, Activation), step
    return ACTIVATIONS[step.function](value)
