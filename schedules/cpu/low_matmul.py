"""What kernels of Y = epilogue(W X) in low precision share: arguments, epilogue, jobs, output.

The sums of int8 are integers: minus 128 times the sum of a row's weights (``correction``), since
activations are stored plus 128, and times the scales of the row and of the token, they are the
product. Those of bf16 are float32 already. Epilogues work in float32. An output in low precision is
rounded when all features of its tokens are there, since int8's scale depends on them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Activation, Bias, Residual, Step
from sparse_tvm.schedules.cpu.block_arrays import JOBS_PER_GROUP
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    Tiles,
    argument,
    prefetch,
    scalar,
    share_jobs,
    symbol,
    zero,
)
from sparse_tvm.schedules.cpu.low_output import Output
from sparse_tvm.schedules.cpu.low_precision import Lines
from sparse_tvm.schedules.cpu.precision import Precision
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.vector_math import ACTIVATIONS, ROUGH_ACTIVATIONS, lanes_of


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
    epilogue : tuple[Step, ...]
        ``Bias``, ``Residual`` and ``Activation``, in order.
    out : Precision | None
        Of the output; None for float32.
    rows : int | None
        Tokens of each leading index, for a kernel that wants to know; None if run time tells.
    """

    tiles: Tiles
    n_out: int
    k_in: int
    precision: Precision
    epilogue: tuple[Step, ...] = ()
    out: Precision | None = None
    rows: int | None = None

    @property
    def extras(self) -> tuple[Step, ...]:
        """The epilogue's steps that bring a tensor."""
        return tuple(step for step in self.epilogue if step.operand)


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


class Rows:
    """The two sides of a kernel: input lines, and rows of the output with their epilogue.

    Made inside of an open PrimFunc, of which it declares the first argument, x; then the kernel
    declares its weight's, and :meth:`declare` the rest: for int8 ``correction`` int32 and
    ``scale`` float32 ``[n_out]``, one per ``extras`` (``[n_out]`` or like a float32 Y), and Y.

    ``group`` is how many tiles of tokens a job has at most, ``paired`` whether the kernel has
    pairs of rows at hand (see :class:`Output`).
    """

    def __init__(self, problem: LowMatmul, simd: Simd, group: int, paired: bool) -> None:
        self.problem, self.simd = problem, simd
        self._group, self._paired = group, paired
        self.x = Lines("x", problem.tiles, problem.k_in, problem.precision)

    def declare(self, *, counted: bool = False) -> None:
        """Declare the arguments behind the weight's, and see all as the kernel uses them.

        ``counted`` tells that the number of rows is one, an int64 before Y, if it is not known.
        """
        problem, tiles, n = self.problem, self.problem.tiles, self.problem.n_out
        if problem.precision.scaled:
            self._correction = argument("correction", (n,), "int32")
            self._scale = argument("scale", (n,))
        extras = [
            argument(f"{step}_{i}", (n,) if isinstance(step, Bias) else tiles.shape(n))
            for i, step in enumerate(problem.extras)
        ]
        self.rows: Expr = problem.rows
        if counted and problem.rows is None:
            self.rows = T.arg("rows", symbol("rows"))
        self.output = Output(tiles, n, problem.out, self.simd, self._group, self._paired)

        self.x.bind()
        self.output.bind()
        operands = iter(extras)
        self._steps: list[tuple[Step, Buffer]] = []
        for step in problem.epilogue:
            extra = next(operands) if step.operand else None
            self._steps.append(
                (step, tiles.flat(extra, n) if isinstance(step, Residual) else extra)
            )

    def ask(self, row: Expr, tile: Expr) -> None:
        """Ask for what soon is added to a row of a tile, and for where it goes."""
        self.output.ask(row, tile)
        for step, extra in self._steps:
            if isinstance(step, Residual):
                prefetch(extra, (tile, row, 0))

    def finish(
        self, sums: Expr, row: Expr, tile: Expr, first: Expr, peak: Registers | None
    ) -> None:
        """Scale the sums of a row for some tokens of a tile, apply the epilogue and store.

        ``sums`` is a vector of int32 for int8, else of float32; ``peak`` is the output's. Vectors
        may be wider than registers, so that more of them are on their way at once.
        """
        self.output.store(self._finished(sums, row, tile, first), row, tile, first, peak)

    def finish_pair(self, low: Expr, high: Expr, row: Expr, tile: Expr, first: Expr) -> None:
        """The same for two rows of sums, where the output takes them in pairs.

        ``high`` is None behind the last row.
        """
        even, odd = self._finished(low, row, tile, first), zero(self.simd)
        if high is not None:
            odd = self._finished(high, row + 1, tile, first)
        self.output.store_pair(even, odd, row, tile, first)

    def _finished(self, sums: Expr, row: Expr, tile: Expr, first: Expr) -> Expr:
        lanes = lanes_of(sums)
        simd = replace(self.simd, lanes=lanes)
        value = sums
        if self.problem.precision.scaled:
            exact = sums + T.broadcast(self._correction[row], lanes)
            scales = self.x.scales(tile, first, lanes) * T.broadcast(self._scale[row], lanes)
            value = T.Cast(f"float32x{lanes}", exact) * scales
        functions = ACTIVATIONS if self.problem.out is None else ROUGH_ACTIVATIONS
        for step, extra in self._steps:
            if isinstance(step, Bias):
                value = value + T.broadcast(extra[row], lanes)
            elif isinstance(step, Residual):
                value = value + extra[tile, row, T.ramp(first, 1, lanes)]
            else:
                assert isinstance(step, Activation), step
                held = Registers(1, 1, simd)  # activations repeat their argument
                held.set(0, 0, value)
                value = functions[step.function](held.get(0, 0))
        held = Registers(1, 1, simd)
        held.set(0, 0, value)
        return held.get(0, 0)


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
    with T.parallel(0, threads) as thread:
        if around:
            around[0]()
        share_jobs(thread, threads, groups, body)
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
