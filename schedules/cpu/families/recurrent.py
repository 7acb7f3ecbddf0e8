"""The steps of recurrent networks, whose weight is multiplied by a few sequences' states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel, WeightedFamily, Wish, Work, bytes_of
from sparse_tvm.operators import FLOAT32, Layout, Recurrent
from sparse_tvm.schedules.cpu.block_arrays import split_arrays
from sparse_tvm.schedules.cpu.families.extents import known_or_symbols
from sparse_tvm.schedules.cpu.families.matmul import STRUCTURES, stored_blocks, wished_blocks
from sparse_tvm.schedules.cpu.families.stored_types import refuses_types, storing
from sparse_tvm.schedules.cpu.row_cost import sequence_seconds, sliced_sequence_seconds
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import Target

_WIDENED = 0.4
"""Cycles to spread a number of 16 bits over the sequences, beside a multiply-add; measured on Zen 4
with eight of them. A single sequence, and a dense weight, have outputs in the lanes."""

_FUNCTIONS = ("sigmoid", "tanh", "relu")


@dataclass(frozen=True)
class RecurrentFamily(WeightedFamily[Recurrent]):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.recurrent`."""

    name: ClassVar[str] = "recurrent"
    operator: ClassVar[type[Recurrent]] = Recurrent

    def refuses(self, op: Recurrent, target: Target) -> str | None:
        if (refusal := refuses_types(self.name, op, target)) is not None:
            return refusal
        unknown = [function for function in op.functions if function not in _FUNCTIONS]
        return f"{self.name} has no activation {unknown[0]}" if unknown else None

    def candidates(
        self, op: Recurrent, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        dense = wish is None or wish.format == "dense"
        found = [Layout(self.name, "dense", (LANES, 1))] if dense else []
        found += [Layout(self.name, *form) for form in wished_blocks(weight, wish)]
        simd, tall = Simd.of(target), weight.block[0] if weight.block else 1
        # Blocks as tall as a vector fill its lanes by themselves.
        fits = simd.permutation is not None and tall < simd.lanes <= weight.shape[1]
        if fits and wish is None:
            found.append(Layout(self.name, "sell").having(sell=simd.lanes))
        return [storing(layout, op) for layout in found]

    def structures(self, op: Recurrent, target: Target) -> Sequence[str]:
        return STRUCTURES

    def unpacked(self, op: Recurrent) -> Layout:
        return Layout(self.name, "dense", (1, 1))

    def cost(
        self, op: Recurrent, layout: Layout, weight: WeightStatistics, tokens: int, target: Target
    ) -> float:
        """Seconds of one step of ``tokens`` sequences."""
        if layout.format == "sell":
            lanes = layout.get("sell", 0)
            steps = weight.window_steps(lanes)
            return sliced_sequence_seconds(weight.shape, layout, steps, target, tokens)
        blocks, (rows, columns) = stored_blocks(weight, layout), layout.block
        seconds = sequence_seconds(weight.shape, layout, blocks, target, tokens)
        if layout.sparse and tokens > 1 and op.types != FLOAT32:
            seconds += target.seconds(_WIDENED * blocks * rows * columns * -(-tokens // LANES))
        return seconds

    def pack(
        self, op: Recurrent, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        simd = Simd.of(target)
        together, abreast = simd.weights_together(layout), simd.rows_abreast(layout)
        return split_arrays(w, layout, together, abreast, stack=w.shape[0] // w.shape[1])

    def build(
        self, op: Recurrent, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.recurrent import recurrent

        steps, batch, _ = known_or_symbols(operands[0], ("steps", "batch", "features"))
        rows, columns = op.stored.block
        size = f"_{rows}x{columns}" if op.stored.format not in ("csr", "sell") else ""
        values = "" if op.types == FLOAT32 else f"_{op.types.weight}"
        way = "_backward" if op.backward else ""
        title = f"{op.cell}_{op.stored.format}{size}_{op.hidden}{values}{way}"
        return Kernel(title, recurrent(op, steps, batch, Simd.of(target)))

    def work(
        self,
        op: Recurrent,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        steps, batch, _ = operands[0].shape
        n, k = op.matrix
        flops = 2.0 * (n * k if nonzeros is None else nonzeros) * (steps or 0) * (batch or 0)
        near = 2.0 * flops / op.stored.block[0] if op.stored.sparse else 0.0
        # Every step reads the weight again.
        weight = max((o for o in operands[1:]), key=lambda o: prod(d or 0 for d in o.shape))
        again = bytes_of([weight]) * max(0, (steps or 0) - 1)
        return Work(flops, bytes_of([*operands, output]) + again, near)
