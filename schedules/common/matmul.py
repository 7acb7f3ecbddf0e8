"""Y = epilogue(W X) on lane tiles, for W dense, CSR or BSR: one family of kernels.

For each block row of W, a block of accumulators (rows of W by vectors of tokens, up to four tiles
of them) stays in registers while the stored blocks stream past once, linearly; each block
multiplies the vectors of X at its column. A dense W is the same loop with every block present and
no indices. Rows are split over jobs by the number of stored blocks, so that threads finish
together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.common.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    Simd,
    Tiles,
    TileVectors,
    argument,
    for_group_sizes,
    groups_of,
    prim_func,
    scalar,
    splat,
    symbol,
    zero,
)
from sparse_tvm.schedules.common.vector_math import ACTIVATIONS

JOBS_PER_GROUP = 16
"""Row partitions per group of tiles: enough to balance up to sixteen threads on one group."""

MAX_GROUP = 4
"""Tiles whose accumulators share a pass over W: enough to reuse each weight 64 times."""


@dataclass(frozen=True)
class WeightLayout:
    """How a kernel finds W ``[n_out, k_in]``.

    Attributes
    ----------
    format : str
        ``dense``, ``csr`` or ``bsr``.
    block : tuple[int, int]
        Output rows by input columns of one stored block. ``dense`` has one block per column.
    """

    format: str
    block: tuple[int, int]

    @property
    def sparse(self) -> bool:
        """Whether blocks carry indices."""
        return self.format != "dense"


def group_limit(rows: int, simd: Simd) -> int:
    """Tiles per group whose accumulators fit into the registers beside each other."""
    return max(1, min(MAX_GROUP, simd.accumulators // (rows * simd.per_tile)))


def matmul(
    tiles: Tiles,
    n_out: int,
    k_in: int,
    layout: WeightLayout,
    epilogue: Sequence[str],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order:
    X ``[lead, tiles, k_in, LANES]``; then the weight: ``data`` (dense
    ``[ceil(n_out / r), k_in, r]``; sparse ``[blocks, c, r]``) and, if sparse, ``indices``
    int32 ``[blocks]`` (first input column of each block), ``indptr`` int32
    ``[ceil(n_out / r) + 1]`` and ``partition`` int32 ``[JOBS_PER_GROUP + 1]`` (first block row of
    each job); then one argument per ``bias`` (``[n_out]``) or ``residual`` (like Y) step of the
    epilogue; last Y ``[lead, tiles, n_out, LANES]``.

    Epilogue steps apply in order: ``bias``, ``residual``, or a name in ``ACTIVATIONS``.
    """
    rows, columns = layout.block
    block_rows = -(-n_out // rows)
    limit = group_limit(rows, simd)

    with prim_func() as result:
        x = argument("x", tiles.shape(k_in))
        if layout.sparse:
            blocks = symbol("blocks")
            data = argument("data", (blocks, columns, rows))
            indices = argument("indices", (blocks,), "int32")
            indptr = argument("indptr", (block_rows + 1,), "int32")
            partition = argument("partition", (JOBS_PER_GROUP + 1,), "int32")
        else:
            data = argument("data", (block_rows, k_in, rows))
        extras = [
            argument(f"{step}_{i}", (n_out,) if step == "bias" else tiles.shape(n_out))
            for i, step in enumerate(epilogue)
            if step in ("bias", "residual")
        ]
        y = argument("y", tiles.shape(n_out))

        x = tiles.flat(x, k_in)
        y = tiles.flat(y, n_out)
        operands = iter(extras)
        steps: list[tuple[str, Buffer]] = []
        for step in epilogue:
            extra = next(operands) if step in ("bias", "residual") else None
            steps.append((step, tiles.flat(extra, n_out) if step == "residual" else extra))

        def accumulate(acc: Registers, block_row: Expr, load: Callable[[Expr, int], Expr]) -> None:
            """Stream the stored blocks of one block row."""
            if not layout.sparse:
                with T.serial(0, k_in) as k:
                    acc.multiply_add(lambda row: data[block_row, k, row], lambda v: load(k, v))
                return
            first = scalar(indptr[block_row])
            with T.serial(0, scalar(indptr[block_row + 1]) - first) as p:
                at = first + p
                column = scalar(indices[at])
                for c in range(columns):

                    def weight(row: int, c: int = c) -> Expr:
                        return data[at, c, row]

                    def operand(vector: int, c: int = c) -> Expr:
                        return load(column + c, vector)

                    acc.multiply_add(weight, operand)

        def finish(acc: Registers, first_row: Expr, vectors: TileVectors) -> None:
            """Apply the epilogue in registers and store."""
            for row in range(acc.rows):
                for vector in range(acc.vectors):
                    tile, lanes = vectors.at(vector)
                    at = [tile, first_row + row, lanes]
                    for step, extra in steps:
                        acc.set(row, vector, _apply(step, acc.get(row, vector), extra, at, simd))
                    T.buffer_store(y, acc.get(row, vector), at)

        def block_row_kernel(block_row: Expr, live: int, vectors: TileVectors) -> None:
            """Compute the ``live`` rows of one block row for one group of tiles."""

            def load(k: Expr, vector: int) -> Expr:
                tile, lanes = vectors.at(vector)
                return x[tile, k, lanes]

            acc = Registers(live, vectors.count, simd)
            acc.fill(lambda row, vector: zero(simd))
            accumulate(acc, block_row, load)
            finish(acc, block_row * rows, vectors)

        def job_kernel(first_tile: Expr, size: int, start: Expr, stop: Expr) -> None:
            """Compute a range of block rows for one group of tiles."""
            vectors = TileVectors(first_tile, size, simd)
            remainder = n_out % rows
            with T.serial(0, stop - start) as i:
                block_row = scalar(start + i)
                if remainder == 0:
                    block_row_kernel(block_row, rows, vectors)
                else:
                    with T.If(block_row < block_rows - 1):
                        with T.Then():
                            block_row_kernel(block_row, rows, vectors)
                        with T.Else():
                            block_row_kernel(block_row, remainder, vectors)

        # Group-major: a thread keeps the same tokens through the whole model, in its own cache.
        with T.parallel(0, groups_of(tiles.count, limit) * JOBS_PER_GROUP) as job:
            part = scalar(job % JOBS_PER_GROUP)
            if layout.sparse:
                start, stop = scalar(partition[part]), scalar(partition[part + 1])
            else:
                start = scalar(part * block_rows // JOBS_PER_GROUP)
                stop = scalar((part + 1) * block_rows // JOBS_PER_GROUP)

            def body(first_tile: Expr, size: int) -> None:
                job_kernel(first_tile, size, start, stop)

            for_group_sizes(tiles.count, limit, job // JOBS_PER_GROUP, body)
    return result["func"]


def _apply(step: str, value: Expr, extra: Buffer, at: list[Expr], simd: Simd) -> Expr:
    """One epilogue step on one register."""
    if step == "bias":
        return value + splat(extra[at[1]], simd)
    if step == "residual":
        return value + extra[tuple(at)]
    return ACTIVATIONS[step](value)
