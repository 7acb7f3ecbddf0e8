"""Y = epilogue(W X) on lane tiles, for W dense, CSR or BSR: one family of kernels.

For each block row of W, ``rows`` x ``vectors`` accumulators stay in registers while the stored
blocks stream past once, linearly; each block multiplies the vectors of X at its column. A dense
W is the same loop with every block present and no indices. Rows are split over jobs by the
number of stored blocks, so that threads finish together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.common.lane_tiles import (
    Buffer,
    Expr,
    LaneTiles,
    Registers,
    Simd,
    argument,
    prim_func,
    ramp,
    scalar,
    splat,
    symbol,
)
from sparse_tvm.schedules.common.vector_math import ACTIVATIONS

JOBS_PER_TILE = 16
"""Row partitions per lane tile: enough to balance up to sixteen threads on one tile."""


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


def register_vectors(tiles: LaneTiles, rows: int, simd: Simd) -> int:
    """Vectors of tokens to keep in registers per block row: the most that divide the tile."""
    per_tile = tiles.lanes // simd.lanes
    fitting = [v for v in range(1, per_tile + 1) if per_tile % v == 0]
    return max((v for v in fitting if v * rows <= simd.accumulators), default=1)


def matmul(
    tiles: LaneTiles,
    n_out: int,
    k_in: int,
    layout: WeightLayout,
    epilogue: Sequence[str],
    simd: Simd,
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order:
    X ``[lead, tiles, k_in, lanes]``; then the weight: ``data`` (dense
    ``[ceil(n_out / r), k_in, r]``; sparse ``[blocks, c, r]``) and, if sparse, ``indices``
    int32 ``[blocks]`` (first input column of each block), ``indptr`` int32 ``[ceil(n_out / r) + 1]``
    and ``partition`` int32 ``[JOBS_PER_TILE + 1]`` (first block row of each job); then one argument
    per ``bias`` (``[n_out]``) or ``residual`` (like Y) step of the epilogue; last Y
    ``[lead, tiles, n_out, lanes]``.

    Epilogue steps apply in order: ``bias``, ``residual``, or a name in ``ACTIVATIONS``.
    """
    rows, columns = layout.block
    block_rows = -(-n_out // rows)
    vectors = register_vectors(tiles, rows, simd)
    strips = tiles.lanes // (vectors * simd.lanes)

    with prim_func() as (_, result):
        x = argument("x", tiles.shape(k_in))
        if layout.sparse:
            blocks = symbol("blocks")
            data = argument("data", (blocks, columns, rows))
            indices = argument("indices", (blocks,), "int32")
            indptr = argument("indptr", (block_rows + 1,), "int32")
            partition = argument("partition", (JOBS_PER_TILE + 1,), "int32")
        else:
            data = argument("data", (block_rows, k_in, rows))
        extras = [
            argument(f"{step}_{i}", (n_out,) if step == "bias" else tiles.shape(n_out))
            for i, step in enumerate(epilogue)
            if step in ("bias", "residual")
        ]
        y = argument("y", tiles.shape(n_out))

        def accumulate(acc: Registers, block_row: Expr, load: Callable[[Expr, int], Expr]) -> None:
            """Stream the stored blocks of one block row."""
            if not layout.sparse:
                with T.serial(0, k_in) as k:
                    acc.multiply_add(
                        lambda row: data[block_row, k, row], lambda vector: load(k, vector)
                    )
                return
            first = scalar(indptr[block_row])
            with T.serial(0, scalar(indptr[block_row + 1]) - first) as p:
                at = first + p
                column = scalar(indices[at])
                for c in range(columns):
                    acc.multiply_add(
                        lambda row, c=c: data[at, c, row],
                        lambda vector, c=c: load(column + c, vector),
                    )

        def finish(acc: Registers, first_row: Expr, vector_at: Callable[[int], list[Expr]]) -> None:
            """Apply the epilogue in registers and store."""
            queue = list(extras)
            for step in epilogue:
                extra = queue.pop(0) if step in ("bias", "residual") else None
                for row in range(acc.rows):
                    for vector in range(acc.vectors):
                        value = acc.get(row, vector)
                        acc.set(
                            row,
                            vector,
                            _apply(step, value, extra, first_row + row, vector_at(vector), simd),
                        )
            for row in range(acc.rows):
                for vector in range(acc.vectors):
                    lead, tile, lane = vector_at(vector)
                    T.buffer_store(y, acc.get(row, vector), [lead, tile, first_row + row, lane])

        def block_row_kernel(block_row: Expr, live: int, lead: Expr, tile: Expr) -> None:
            """Compute ``live`` rows of one block row, strip by strip of the tile's lanes."""
            for strip in range(strips):

                def lane_at(vector: int, strip: int = strip) -> Expr:
                    return ramp((strip * vectors + vector) * simd.lanes, simd)

                acc = Registers(live, vectors, simd)
                acc.fill(lambda row, vector: splat(T.float32(0), simd))
                accumulate(acc, block_row, lambda k, v: x[lead, tile, k, lane_at(v)])
                finish(acc, block_row * rows, lambda v: [lead, tile, lane_at(v)])

        # Tile-major: a thread keeps the same tokens through the whole model, in its own cache.
        with T.parallel(0, tiles.count * JOBS_PER_TILE) as job:
            tile_index = job // JOBS_PER_TILE
            lead, tile = tile_index // tiles.per_lead, tile_index % tiles.per_lead
            part = job % JOBS_PER_TILE
            if layout.sparse:
                start, stop = partition[part], partition[part + 1]
            else:
                start = part * block_rows // JOBS_PER_TILE
                stop = (part + 1) * block_rows // JOBS_PER_TILE
            start = scalar(start)
            remainder = n_out % rows
            with T.serial(0, scalar(stop) - start) as i:
                block_row = scalar(start + i)
                if remainder == 0:
                    block_row_kernel(block_row, rows, lead, tile)
                else:
                    with T.If(block_row < block_rows - 1):
                        with T.Then():
                            block_row_kernel(block_row, rows, lead, tile)
                        with T.Else():
                            block_row_kernel(block_row, remainder, lead, tile)
    return result["func"]


def _apply(
    step: str, value: Expr, extra: Buffer | None, row: Expr, at: list[Any], simd: Simd
) -> Expr:
    """One epilogue step on one register."""
    if step == "bias":
        return value + splat(extra[row], simd)
    if step == "residual":
        lead, tile, lane = at
        return value + extra[lead, tile, row, lane]
    return ACTIVATIONS[step](value)
