"""What kernels of Y = epilogue(W X) in low precision share: arguments, epilogue, jobs, output.

The sums of int8 are integers: minus 128 times the sum of a row's weights (``correction``), since
activations are stored plus 128, and times the scales of the row and of the token, they are the
product. Those of bf16 are float32 already. Epilogues work in float32. An output in low precision is
rounded when all features of its tokens are there, since int8's scale depends on them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.block_arrays import JOBS_PER_GROUP
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Tiles,
    argument,
    scalar,
)
from sparse_tvm.schedules.cpu.low_precision import Lines, Precision, store_tiles
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.cpu.vector_math import ACTIVATIONS

PREFETCH_BYTES = 4096
"""How far ahead of its use a weight is asked for."""


@dataclass(frozen=True)
class LowMatmul:
    """One linear layer.

    Attributes
    ----------
    tiles : Tiles
        Extents of the activations.
    n_out, k_in : int
        Features.
    precision : Precision
        Of weights and input.
    epilogue : tuple[str, ...]
        ``bias``, ``residual``, or a name in ``ACTIVATIONS``, in order.
    out : Precision | None
        Of the output; None for float32.
    """

    tiles: Tiles
    n_out: int
    k_in: int
    precision: Precision
    epilogue: tuple[str, ...] = ()
    out: Precision | None = None

    @property
    def extras(self) -> tuple[str, ...]:
        """The epilogue's steps that bring a tensor."""
        return tuple(step for step in self.epilogue if step in ("bias", "residual"))


@dataclass(frozen=True)
class SparseWeight:
    """The arguments by which a kernel finds a sparse weight's blocks, block row by block row.

    Attributes
    ----------
    indices : Buffer
        uint16 or int32 ``[blocks, per block]``: the input lines that a block multiplies.
    indptr : Buffer
        int32 ``[block rows + 1]``: the first block of each, in the order of ``rows``.
    rows : Buffer
        int32 ``[block rows]``: which block row that is.
    partition : Buffer
        int32 ``[JOBS_PER_GROUP + 1]``: the first of those for each job.
    """

    indices: Buffer
    indptr: Buffer
    rows: Buffer
    partition: Buffer

    @classmethod
    def arguments(cls, blocks: Expr, per_block: int, block_rows: int, dtype: str) -> SparseWeight:
        """Declare the next arguments of the open PrimFunc."""
        return cls(
            argument("indices", (blocks, per_block), dtype),
            argument("indptr", (block_rows + 1,), "int32"),
            argument("rows", (block_rows,), "int32"),
            argument("partition", (JOBS_PER_GROUP + 1,), "int32"),
        )


def index_dtype(lines: int) -> str:
    """Type of the indices of lines: the smaller, the less streams from memory."""
    return "uint16" if lines <= 1 << 16 else "int32"


class Rows:
    """The two sides of a kernel: input lines, and rows of the output with their epilogue.

    Made inside of an open PrimFunc, of which it declares the first argument, x; then the kernel
    declares its weight's, and :meth:`declare` the rest: for int8 ``correction`` int32 and
    ``scale`` float32 ``[n_out]``, one per ``extras`` (``[n_out]`` or like a float32 Y), and Y.
    """

    def __init__(self, problem: LowMatmul, simd: Simd) -> None:
        self.problem, self.simd = problem, simd
        self.x = Lines("x", problem.tiles, problem.k_in, problem.precision)

    def declare(self) -> None:
        """Declare the arguments behind the weight's, and see all as the kernel uses them."""
        problem, tiles, n = self.problem, self.problem.tiles, self.problem.n_out
        if problem.precision.scaled:
            self._correction = argument("correction", (n,), "int32")
            self._scale = argument("scale", (n,))
        extras = [
            argument(f"{step}_{i}", (n,) if step == "bias" else tiles.shape(n))
            for i, step in enumerate(problem.extras)
        ]
        if problem.out is None:
            y = argument("y", tiles.shape(n))
        else:
            self._rounded = Lines("y", tiles, n, problem.out)

        self.x.bind()
        if problem.out is None:
            self._y = tiles.flat(y, n)
        else:
            self._rounded.bind()
            self._y = T.alloc_buffer((tiles.count, n, LANES), "float32")
        operands = iter(extras)
        self._steps: list[tuple[str, Buffer]] = []
        for step in problem.epilogue:
            extra = next(operands) if step in problem.extras else None
            self._steps.append((step, tiles.flat(extra, n) if step == "residual" else extra))

    def finish(self, sums: Expr, row: Expr, tile: Expr, first: Expr) -> None:
        """Scale the sums of a row for some tokens of a tile, apply the epilogue and store.

        ``sums`` is a vector of int32 for int8, else of float32.
        """
        lanes = self.simd.lanes
        value = sums
        if self.problem.precision.scaled:
            exact = sums + T.broadcast(self._correction[row], lanes)
            scales = self.x.scales(tile, first, lanes) * T.broadcast(self._scale[row], lanes)
            value = T.Cast(f"float32x{lanes}", exact) * scales
        at = [tile, row, T.ramp(first, 1, lanes)]
        for step, extra in self._steps:
            if step == "bias":
                value = value + T.broadcast(extra[row], lanes)
            elif step == "residual":
                value = value + extra[tuple(at)]
            else:
                T.buffer_store(self._y, value, at)  # activations repeat their argument
                value = ACTIVATIONS[step](self._y[tuple(at)])
        T.buffer_store(self._y, value, at)

    def close(self) -> None:
        """Round the output, where it is wanted in low precision."""
        if self.problem.out is not None:
            store_tiles(self._rounded, self._y, self.problem.tiles, self.simd)


def for_job_ranges(
    groups: Expr,
    body: Callable[[Expr, Expr, Expr], None],
    around: tuple[Callable[[], None], Callable[[], None]] | None = None,
) -> None:
    """Call ``body(group, first job, last job)`` for a range of each group's jobs, on all threads.

    Each thread takes one range of the jobs of all groups, group-major, so that it keeps the same
    tokens, in its own cache, from one layer to the next. ``around`` is called at both ends of a
    thread's work.
    """
    threads = scalar(tirx.call_packed("runtime.NumThreads"))
    jobs = scalar(groups * JOBS_PER_GROUP)
    with T.parallel(0, threads) as thread:
        begin = scalar(thread * jobs // threads)
        end = scalar((thread + 1) * jobs // threads)
        first = scalar(begin // JOBS_PER_GROUP)
        if around:
            around[0]()
        with T.serial(0, scalar((end + (JOBS_PER_GROUP - 1)) // JOBS_PER_GROUP - first)) as i:
            group = scalar(first + i)
            start = scalar(tirx.max(begin - group * JOBS_PER_GROUP, 0))
            stop = scalar(tirx.min(end - group * JOBS_PER_GROUP, JOBS_PER_GROUP))
            body(group, start, stop)
        if around:
            around[1]()


def row_range(
    weight: SparseWeight | None, block_rows: int, job: Expr, last_job: Expr
) -> tuple[Expr, Expr]:
    """The block rows of a range of jobs."""
    if weight is not None:
        return scalar(weight.partition[job]), scalar(weight.partition[last_job])
    return (
        scalar(job * block_rows // JOBS_PER_GROUP),
        scalar(last_job * block_rows // JOBS_PER_GROUP),
    )
