"""Dense layers in float32 on lane tiles: the weight dense, CSR, or BSR, in parts of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel, WeightedFamily, Wish, Work, bytes_of, elements
from sparse_tvm.operators import Activation, Bias, Dense, Gate, Layout, Residual
from sparse_tvm.schedules.cpu.block_arrays import block_diagonal, split_arrays
from sparse_tvm.schedules.cpu.cost import (
    dense_parts,
    dense_rows,
    matmul_seconds,
    packs,
    part_counts,
)
from sparse_tvm.schedules.cpu.families.extents import tiles_for
from sparse_tvm.schedules.cpu.families.stored_types import refuses_types, storing
from sparse_tvm.schedules.cpu.row_cost import (
    asks_from,
    few_rows_seconds,
    sliced_rows_seconds,
)
from sparse_tvm.schedules.cpu.simd import (
    LANES,
    ROW_COUNTS,
    Simd,
    group_of,
    most_sliced_rows,
)
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import Target

_DENSE_ROWS = LANES
"""Rows of a dense block for few tokens: outputs fill the vectors where tokens cannot."""

_TUNED_ROWS = (4, 8, 12)
"""More rows of a dense block that may be worth a measurement."""

_WORTH_STORING_TWICE = 1.2
"""How much faster sliced rows must be for one token to be stored beside another form."""

STRUCTURES = ("unstructured", "4x1", "16x1")
"""What kernels in float32 skip, as ``prune --structure`` has it; blocks of 2 and 8 gain as much as
their neighbours."""

_BLOCKS = ((2, 1), (4, 1), (8, 1), (16, 1))
_MAX_BLOCK_ROWS, _MAX_BLOCK_COLUMNS = 16, 8


def kernel_block(block: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The largest divisor of a block that fits the register file and the weight."""
    rows, columns = block
    most_rows = min(rows, _MAX_BLOCK_ROWS, shape[0])
    most_columns = min(columns, _MAX_BLOCK_COLUMNS, shape[1])
    return (
        next(r for r in range(most_rows, 0, -1) if rows % r == 0),
        next(c for c in range(most_columns, 0, -1) if columns % c == 0),
    )


def wished_blocks(weight: WeightStatistics, wish: Wish | None) -> list[tuple[str, tuple[int, int]]]:
    """Formats and blocks of a sparse weight that are worth comparing, or that come near a wish."""
    blocks = [*_BLOCKS, *([weight.block] if weight.block else [])]
    if wish is not None and wish.format == "bsr" and wish.block is not None:
        blocks = [wish.block]
    sizes = dict.fromkeys(kernel_block(block, weight.shape) for block in blocks)
    found = [("csr", (1, 1)), *(("bsr", size) for size in sizes)]
    return [pair for pair in found if wish is None or pair[0] == wish.format]


@dataclass(frozen=True)
class MatmulFamily(WeightedFamily[Dense]):
    """Kernels of :mod:`sparse_tvm.schedules.cpu.matmul`.

    Operands are lane tiles of x, the weight's arrays, the epilogue's operands, and how many rows
    each leading index has.
    """

    name: ClassVar[str] = "matmul"
    counts_rows: ClassVar[bool] = True
    operator: ClassVar[type[Dense]] = Dense

    def refuses(self, op: Dense, target: Target) -> str | None:
        if (refusal := refuses_types(self.name, op, target)) is not None:
            return refusal
        for step in op.epilogue:
            if not isinstance(step, Bias | Residual | Gate | Activation):
                return f"{self.name} has no epilogue {step}"
        return None

    def candidates(
        self, op: Dense, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        if op.groups > 1:
            return _of_groups(op, weight, target, wish)
        found = []
        if wish is None or wish.format == "dense":
            for rows in dict.fromkeys((dense_rows(weight.shape[0], Simd.of(target)), _DENSE_ROWS)):
                layout = _layout(op, "dense", (rows, 1))
                parts = dense_parts(weight.shape[1], rows, target)
                found.append(layout.having(parts=parts) if parts > 1 else layout)
        for format, block in wished_blocks(weight, wish):
            layout = _layout(op, format, block)
            packed = {"packed": 1} if packs(weight, layout, target) else {}
            for parts in part_counts(weight.shape[1], layout, target):
                found.append(layout.having(**({"parts": parts} if parts > 1 else {}), **packed))
        found += _sliced(found, weight, target)
        return [_asking(layout, weight, target) for layout in found]

    def structures(self, op: Dense, target: Target) -> Sequence[str]:
        return STRUCTURES

    def variants(
        self, op: Dense, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        if op.groups > 1:
            return ()
        n, simd = weight.shape[0], Simd.of(target)
        found = []
        if wish is None or wish.format == "dense":
            found += [_layout(op, "dense", (rows, 1)) for rows in _TUNED_ROWS if rows <= n]
            whole = _layout(op, "dense", (_DENSE_ROWS, 1))
            found += [whole, whole.having(parts=4), whole.having(parts=8)]
        for format, block in wished_blocks(weight, wish):
            layout = _layout(op, format, block)
            likely = part_counts(weight.shape[1], layout, target)
            for parts in sorted({1, 2, *likely, 2 * max(likely)}):
                found.append(layout.having(parts=parts) if parts > 1 else layout)
        halves = {layout: group_of(layout, simd) // 2 for layout in found}
        found += [one.having(group=half) for one, half in halves.items() if half]
        found += [one.having(packed=1) for one in found if one.sparse]
        found = [_asking(layout, weight, target) for layout in found]
        known = {*self.candidates(op, weight, target, wish)}
        return [layout for layout in dict.fromkeys(found) if layout not in known]

    def cost(
        self, op: Dense, layout: Layout, weight: WeightStatistics, tokens: int, target: Target
    ) -> float:
        lanes, few = layout.get("sell", 0), tokens <= ROW_COUNTS[-1]
        if lanes and tokens <= most_sliced_rows(lanes):
            steps = weight.window_steps(lanes)
            return sliced_rows_seconds(weight.shape, layout, steps, target, tokens, weight.copies)
        predict, blocks = few_rows_seconds if few else matmul_seconds, stored_blocks(weight, layout)
        return predict(weight.shape, layout, blocks, target, tokens, weight.copies)

    def pack(
        self, op: Dense, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        whole = block_diagonal(w, op.groups) if layout.sparse else w
        simd = Simd.of(target)
        return split_arrays(whole, layout, simd.weights_together(layout), simd.rows_abreast(layout))

    def second_form(self, layout: Layout, arrays: Mapping[str, np.ndarray]) -> str | None:
        if not (lanes := layout.get("sell", 0)):
            return None
        kilobytes = sum(array.nbytes for name, array in arrays.items() if "slice" in name) / 1e3
        most = most_sliced_rows(lanes)
        return f"stored once more for up to {most} tokens, {kilobytes:.0f} kB"

    def build(
        self, op: Dense, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.matmul import matmul

        n, k = op.matrix
        layout = op.stored
        rows, columns = layout.block
        size = f"_{rows}x{columns}" if layout.format != "csr" else ""
        parts = layout.get("parts", 1)
        split = [f"{parts}parts"] if parts > 1 else []
        split += [f"{group}tiles" for name, group in layout.parameters if name == "group"]
        split += ["and_sell"] if layout.get("sell", 0) else []
        split += ["packed"] if layout.get("packed", 0) else []
        split += [f"asking{least}" for name, least in layout.parameters if name == "ask"]
        split += [op.types.weight] if op.types.weight != "float32" else []
        split += [f"{op.groups}groups"] if op.groups > 1 else []
        title = "_".join([layout.format + size, f"{n}x{k}", *split, *op.step_titles])
        tiles, (count,) = tiles_for(operands[0]), operands[-1].shape
        simd = Simd.of(target)
        function = matmul(tiles, count, n, op.inputs, layout, op.epilogue, simd, op.groups)
        return Kernel(title, function)

    def work(
        self,
        op: Dense,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        return layer_work(op.matrix, op.stored, operands, output, nonzeros)


def _layout(op: Dense, format: str, block: tuple[int, int]) -> Layout:
    """A layout with values of the type that the operator wants."""
    return storing(Layout(MatmulFamily.name, format, block), op)


def _of_groups(
    op: Dense, weight: WeightStatistics, target: Target, wish: Wish | None
) -> list[Layout]:
    """Layouts whose blocks lie in one group: rows of a group read few of the inputs, near enough.

    No parts of columns then: each would be those of one group.
    """
    (n, _), simd = weight.shape, Simd.of(target)
    formats = [("dense", (rows, 1)) for rows in (dense_rows(n, simd), _DENSE_ROWS)]
    if wish is not None and wish.format != "dense":
        formats = []
    formats += wished_blocks(weight, wish)
    per_group = n // op.groups
    found = [
        (format, (next(r for r in range(rows, 0, -1) if per_group % r == 0), columns))
        for format, (rows, columns) in formats
        if format == "dense" or (per_group % rows == 0 and weight.shape[1] % columns == 0)
    ]
    return [_layout(op, format, block) for format, block in dict.fromkeys(found)]


def _asking(layout: Layout, weight: WeightStatistics, target: Target) -> Layout:
    """The layout, its weight asked for ahead where that is far away."""
    blocks = stored_blocks(weight, layout)
    rows = asks_from(weight.shape, layout, blocks, target, weight.copies)
    return layout.having(ask=rows) if rows else layout


def _sliced(layouts: Sequence[Layout], weight: WeightStatistics, target: Target) -> list[Layout]:
    """CSR with sliced rows beside it, where these are much faster for one token."""
    lanes = Simd.of(target).lanes
    if Simd.of(target).permutation is None or weight.shape[1] < lanes:
        return []
    rows = [layout for layout in layouts if layout.format == "csr"]
    if not rows:
        return []
    shape, copies = weight.shape, weight.copies
    steps, blocks = weight.window_steps(lanes), weight.stored_blocks((1, 1))
    one = sliced_rows_seconds(shape, rows[0].having(sell=lanes), steps, target, 1, copies)
    return [
        layout.having(sell=lanes)
        for layout in rows
        if _WORTH_STORING_TWICE * one < few_rows_seconds(shape, layout, blocks, target, 1, copies)
    ]


def layer_work(
    matrix: tuple[int, int],
    layout: Layout,
    operands: Sequence[Extents],
    output: Extents,
    nonzeros: int | None,
) -> Work:
    """The work of a layer: each of its weights multiplies as many values as an output has."""
    n, k = matrix
    count = n * k if nonzeros is None else nonzeros
    flops = 2.0 * count * elements(output) / n
    # A sparse block loads a value, of four bytes, for two FLOPs in each of its rows.
    near = 2.0 * flops / layout.block[0] if layout.sparse else 0.0
    return Work(flops, bytes_of([*operands, output]), near)


def stored_blocks(weight: WeightStatistics, layout: Layout) -> int:
    """How many blocks of the weight are stored."""
    if layout.sparse:
        return weight.stored_blocks(layout.block)
    return -(-weight.shape[0] // layout.block[0]) * weight.shape[1]
