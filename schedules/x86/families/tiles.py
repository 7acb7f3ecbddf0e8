"""Dense layers in int8 and bf16 on matrix units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel
from sparse_tvm.operators import Dense, Layout
from sparse_tvm.schedules.cpu.families.low_precision import (
    UNSTRUCTURED,
    LowPrecisionFamily,
    precision_of,
    problem_of,
    title_of,
)
from sparse_tvm.schedules.cpu.precision import BF16, INT8, LINES, Precision
from sparse_tvm.schedules.cpu.simd import Simd, tiles_of
from sparse_tvm.schedules.cpu.word_weights import rounded
from sparse_tvm.schedules.x86 import tile_weights
from sparse_tvm.schedules.x86.units import AMX_FEATURES, AMX_RATE, TILE_ROWS
from sparse_tvm.sparsity.quantise import as_words
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import Target


@dataclass(frozen=True)
class TileFamily(LowPrecisionFamily):
    """Kernels of :mod:`sparse_tvm.schedules.x86.tile_matmul`."""

    name: ClassVar[str] = "tiles"
    precisions: ClassVar[tuple[Precision, ...]] = (INT8, BF16)

    # Cycles, measured on Sapphire Rapids with two tiles of tokens: a step of K per tile of
    # outputs; one of gathered lines, which are copied besides; a row of sixteen results; a line
    # that is expanded; a block row.
    _STEP, _GATHER, _GATHERED_STEP, _RESULT, _LINE, _ROW = 70.0, 76.0, 42.0, 8.0, 4.0, 60.0
    _EXPANDED_ROW = 400.0
    """More, where it is expanded first."""

    _UNFORESEEN = 0.6
    """Share of the time of streaming what is to be expanded that no product hides."""

    _ONE_TILE = 0.65
    """What the steps cost with one tile of tokens instead of two."""

    def rate(self, op: Dense) -> float:
        precision = precision_of(op)
        assert precision is not None
        return AMX_RATE * precision.unit

    def lacks(self, target: Target) -> str | None:
        return None if target.has(*AMX_FEATURES) else f"{target.name} has no matrix unit (AMX)"

    def structures(self, op: Dense, target: Target) -> Sequence[str]:
        precision = precision_of(op)
        assert precision is not None
        one, whole = precision.unit, LINES * precision.unit
        blocks = ((TILE_ROWS, one), (2 * TILE_ROWS, one), (TILE_ROWS, whole))
        return ["unstructured", *(f"{rows}x{columns}" for rows, columns in blocks)]

    def layouts(self, op: Dense, target: Target) -> Sequence[Layout]:
        precision = precision_of(op)
        assert precision is not None
        unit = precision.unit
        found = []
        for height in (1, 2):
            rows = height * TILE_ROWS
            found.append(Layout(self.name, "dense", (rows, LINES * unit)))
            found += [Layout(self.name, "bsr", (rows, step * unit)) for step in (1, LINES)]
            expanded = Layout(self.name, UNSTRUCTURED, (1, 1))
            found.append(expanded.having(height=height))
        return found

    def cost(
        self, op: Dense, layout: Layout, weight: WeightStatistics, tokens: int, target: Target
    ) -> float:
        precision = precision_of(op)
        assert precision is not None
        (n, k), height = op.matrix, _height(layout)
        block_rows = -(-n // (TILE_ROWS * height))
        whole = block_rows * -(-k // (LINES * precision.unit))
        tiles = tiles_of(tokens)
        steps, form = float(whole), _form(layout, precision)
        each = self._STEP * height
        if form == "skip":
            steps = weight.stored_blocks(layout.block)
        elif form == "gather":
            lines = weight.stored_blocks(layout.block) / block_rows
            steps = block_rows * (lines / LINES + (0.5 if lines else 0.0))
            each = self._GATHER + self._GATHERED_STEP * height
        products = steps * each * (tiles // 2 + self._ONE_TILE * (tiles % 2))
        results = tiles * n * self._RESULT + block_rows * self._ROW
        stored_bytes, lines = steps * height * TILE_ROWS * LINES * 4, 0.0
        if form == "expand":
            lines = whole * height * TILE_ROWS
            stored_bytes = weight.nonzeros * 4 / precision.unit + lines * 2 * precision.unit
        fetched = streamed = stored_bytes / target.costs.words
        if form in ("dense", "expand"):  # what is next comes beside the products before it
            fetched = max(streamed - products / 2, self._UNFORESEEN * streamed if lines else 0.0)
        expanded = lines * self._LINE * (1 + 0.5 / tiles)  # more is hidden behind more products
        if lines:
            expanded += block_rows * self._EXPANDED_ROW
        return target.seconds(products + results + expanded + fetched)

    def pack(
        self, op: Dense, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        precision = precision_of(op)
        assert precision is not None
        elements, of_rows = rounded(w, precision)
        form, height = _form(layout, precision), _height(layout)
        if form == "expand":
            return {**tile_weights.expanded_tiles(elements, height), **of_rows}
        pack = {
            "dense": tile_weights.dense_tiles,
            "skip": tile_weights.skipped_tiles,
            "gather": tile_weights.gathered_tiles,
        }[form]
        return {**pack(as_words(elements), height), **of_rows}

    def build(
        self, op: Dense, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.x86.instructions import Amx
        from sparse_tvm.schedules.x86.tile_matmul import TileLayout, tile_matmul

        problem = problem_of(op, operands)
        form = _form(op.stored, problem.precision)
        layout = TileLayout(form, _height(op.stored))
        function = tile_matmul(problem, layout, Simd.of(target), Amx())
        return Kernel(title_of(op, f"amx_{form}"), function)


def _height(layout: Layout) -> int:
    """Tiles of outputs in a block row."""
    return layout.get("height", max(1, layout.block[0] // TILE_ROWS))


def _form(layout: Layout, precision: Precision) -> str:
    """The kernel's form of a layout (see ``schedules.x86.tile_matmul``)."""
    if layout.format == "bsr":
        return "gather" if layout.block[1] == precision.unit else "skip"
    return {"dense": "dense", UNSTRUCTURED: "expand"}[layout.format]
