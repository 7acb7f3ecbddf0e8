"""What kernels for a layer's weight share, for many rows of activations and for few.

The weight's arrays as arguments of a kernel (:mod:`block_arrays` makes them), and the epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Activation, Bias, Gate, Layout, Residual, Step
from sparse_tvm.schedules.cpu.block_arrays import (
    JOBS_PER_GROUP,
    STEPS_TOGETHER,
    index_dtype,
    stacked_multiple,
)
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Tiles,
    argument,
    local,
    prefetch,
    scalar,
    span,
    symbol,
)
from sparse_tvm.schedules.cpu.row_cost import asks
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.cpu.stored_values import StoredValues
from sparse_tvm.schedules.cpu.vector_math import ACTIVATIONS, lanes_of


@dataclass(frozen=True)
class SlicedWeight:
    """A weight ``[n_out, k_in]`` in slices of ``lanes`` rows, as arguments of the open PrimFunc.

    Of each group of ``STEPS_TOGETHER`` steps, ``data`` ``[groups, steps, lanes]``; ``places`` int32
    ``[groups, lanes]``, a byte for each step; ``windows`` ``[groups, steps]``. Besides ``slices``
    int32 ``[ceil(n_out / lanes) + 1]`` (first group of each slice) and ``partition`` int32
    ``[JOBS_PER_GROUP + 1]`` (first slice of each job). See
    :class:`sparse_tvm.sparsity.sliced.SlicedRows`.
    """

    lanes: int
    data: StoredValues
    places: Buffer
    windows: Buffer
    slices: Buffer
    partition: Buffer

    @classmethod
    def declare(cls, layout: Layout, n_out: int, k_in: int) -> SlicedWeight:
        """Declare the arrays as the next arguments."""
        groups, lanes = symbol("step_groups"), layout.get("sell", 0)
        return cls(
            lanes,
            StoredValues.declare("sliced_data", (groups, STEPS_TOGETHER, lanes), layout),
            argument("sliced_places", (groups, lanes), "int32"),
            argument("sliced_windows", (groups, STEPS_TOGETHER), index_dtype(k_in)),
            argument("slices", (-(-n_out // lanes) + 1,), "int32"),
            argument("sliced_partition", (JOBS_PER_GROUP + 1,), "int32"),
        )


@dataclass(frozen=True)
class StoredWeight:
    """A weight ``[n_out, k_in]``, as the arguments of the open PrimFunc.

    Of ``groups``, each is so many outputs of its own inputs, whole blocks of them; what a sparse
    weight stores tells which those are.

    ``data`` (dense ``[ceil(n_out / r), k_in / groups, r]``; sparse ``[blocks, c, r]``) and, if
    sparse, ``indices`` ``[blocks]`` (first input column of each block), ``indptr`` int32
    ``[parts * ceil(n_out / r) + 1]`` (first block of each block row of each part), ``order`` int32
    ``[parts * ceil(n_out / r)]`` (which block row that is) and ``partition`` int32
    ``[JOBS_PER_GROUP + 1]`` (first of a part's block rows for each job).

    Of a ``stack`` of so many matrices, one below the other, a job has the same rows of each.

    ``sliced`` is a form for few rows of activations, of as many lanes as the layout's parameter
    ``sell`` says: the only one of the format ``sell``, and of others one besides.
    """

    layout: Layout
    n_out: int
    k_in: int
    groups: int
    data: StoredValues
    indices: Buffer = None
    indptr: Buffer = None
    order: Buffer = None
    partition: Buffer = None
    sliced: SlicedWeight | None = None
    stack: int | None = None

    @classmethod
    def declare(
        cls, layout: Layout, n_out: int, k_in: int, groups: int = 1, stack: int | None = None
    ) -> StoredWeight:
        """Declare the weight's arrays as the next arguments."""
        return replace(cls._declare(layout, n_out, k_in, groups), stack=stack)

    @classmethod
    def _declare(cls, layout: Layout, n_out: int, k_in: int, groups: int) -> StoredWeight:
        rows, columns = layout.block
        block_rows = -(-n_out // rows)
        if not layout.sparse:
            data = StoredValues.declare("data", (block_rows, k_in // groups, rows), layout)
            return cls(layout, n_out, k_in, groups, data)
        lanes = layout.get("sell", 0)
        if layout.format == "sell":
            sliced = SlicedWeight.declare(layout, n_out, k_in)
            return cls(layout, n_out, k_in, groups, sliced.data, sliced=sliced)
        blocks, segments = symbol("blocks"), layout.get("parts", 1) * block_rows
        return cls(
            layout,
            n_out,
            k_in,
            groups,
            StoredValues.declare("data", (blocks, columns, rows), layout),
            argument("indices", (blocks,), index_dtype(k_in)),
            argument("indptr", (segments + 1,), "int32"),
            argument("rows", (segments,), "int32"),
            argument("partition", (JOBS_PER_GROUP + 1,), "int32"),
            SlicedWeight.declare(layout, n_out, k_in) if lanes else None,
        )

    @property
    def parts(self) -> int:
        """Ranges of columns, stored one after the other."""
        return int(self.layout.get("parts", 1))

    @property
    def block_rows(self) -> int:
        """Block rows of the whole weight, and of each part."""
        return -(-self.n_out // self.layout.block[0])

    @property
    def depth(self) -> int:
        """Inputs that a row of a dense weight multiplies."""
        return self.k_in // self.groups

    def asks(self, rows: int, simd: Simd) -> bool:
        """Whether so many rows of activations, few, ask for it ahead.

        Where the CPU foresees it that may be slower: they do from as many on as the layout's
        parameter ``ask`` says, if it does.
        """
        return not simd.foresees or asks(self.layout, rows)

    def first_input(self, block_row: Expr) -> Expr:
        """The first input of a dense block row's group."""
        if self.groups == 1:
            return 0
        per_group = self.n_out // self.groups // self.layout.block[0]
        return scalar(block_row // per_group * self.depth)

    def first_of(self, job: Expr) -> Expr:
        """First block row (in a part's order, of a stack's first matrix) of a job."""
        if self.layout.sparse:
            return scalar(self.partition[job])
        if self.stack is None:
            return scalar(job * self.block_rows // JOBS_PER_GROUP)
        block_rows, multiple = self.block_rows // self.stack, stacked_multiple(self.layout)
        first = job * -(-block_rows // multiple) // JOBS_PER_GROUP * multiple
        return scalar(tirx.min(first, block_rows))

    def ask_for_row(self, first: Expr, count: Expr) -> None:
        """Ask for the indices, a little further on, that the next blocks will use.

        And for the weights if they are single ones: a row of a part is too short for a loop.
        """
        rows, columns = self.layout.block
        data, ahead = self.data, first + self.data.ahead // (rows * columns)
        if rows * columns == 1:
            for line in range(2 * LANES // data.per_line):
                prefetch(data.buffer, (ahead + line * data.per_line, 0, 0))
            prefetch(self.indices, (ahead,))
            return
        with T.serial(0, (count + 2 * LANES - 1) // (2 * LANES)) as line:
            prefetch(self.indices, (ahead + line * 2 * LANES,))

    def ask_for_block(self, at: Expr) -> None:
        """Ask for the block that comes as much further on, in the midst of computing with this one.

        A core can wait for about two dozen lines: asked for all of a row at once, it would stand
        still until the first of them have come. Small blocks ask for some lines more than once.
        """
        rows, columns = self.layout.block
        if rows * columns == 1:
            return  # asked for with the row
        data, ahead = self.data, at + self.data.ahead // (rows * columns)
        for element in range(0, rows * columns, data.per_line):
            prefetch(data.buffer, (ahead, element // rows, element % rows))


@dataclass(frozen=True)
class Epilogue:
    """Steps after the product, each with its operand: a bias ``[n_out]``, others like Y."""

    steps: Sequence[tuple[Step, Buffer]]

    @classmethod
    def declare(cls, steps: Sequence[Step], tiles: Tiles, n_out: int) -> Epilogue:
        """Declare the steps' operands as the next arguments."""
        return cls(
            [
                (
                    step,
                    argument(
                        f"{step}_{i}",
                        (n_out,) if isinstance(step, Bias) else tiles.shape(n_out),
                    )
                    if step.operand
                    else None,
                )
                for i, step in enumerate(steps)
            ]
        )

    def flat(self, tiles: Tiles, n_out: int) -> Epilogue:
        """The same with operands like Y seen as ``[count, n_out, LANES]``."""
        return Epilogue(
            [
                (step, tiles.flat(extra, n_out) if isinstance(step, Residual | Gate) else extra)
                for step, extra in self.steps
            ]
        )

    def apply(
        self,
        value: Expr,
        bias: Callable[[Buffer], Expr],
        like_y: Callable[[Buffer], Expr],
    ) -> Expr:
        """All steps on a vector; ``bias`` and ``like_y`` load from an operand for it."""
        lanes = lanes_of(value)
        kept, at = local(lanes), span(0, lanes)
        for step, extra in self.steps:
            if isinstance(step, Bias):
                value = value + bias(extra)
            elif isinstance(step, Residual):
                value = value + like_y(extra)
            elif isinstance(step, Gate):
                value = value * like_y(extra)
            else:
                assert isinstance(step, Activation), step
                # Functions read their argument many times: nested, they would grow exponentially.
                T.buffer_store(kept, value, [at])
                value = ACTIVATIONS[step.function](kept[at])
        return value
