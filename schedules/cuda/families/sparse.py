"""Dense layers with unstructured weights, in float16 or bfloat16, on CUDA cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel, WeightedFamily, Wish, Work
from sparse_tvm.operators import Dense, Layout
from sparse_tvm.schedules.cuda.cost import row_seconds
from sparse_tvm.schedules.cuda.families.dense import HALVES, known_tokens, layer_work, refused_step
from sparse_tvm.schedules.cuda.sparse_rows import LARGEST_INPUTS, row_arrays, row_tile
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets.cuda import CudaTarget

_LEAST = 0.8
"""Share of zeros from which kernels are compared: with fewer of them nothing was measured."""


class SparseDenseFamily(WeightedFamily[Dense]):
    """Kernels of :mod:`sparse_tvm.schedules.cuda.sparse_matmul`."""

    name: ClassVar[str] = "sparse_dense"
    operator: ClassVar[type[Dense]] = Dense

    def refuses(self, op: Dense, target: CudaTarget) -> str | None:
        if op.types not in HALVES:
            return f"{self.name} computes fp16 and bf16 only"
        if op.matrix[1] % 8:
            return f"{self.name} reads eight inputs at a time, not {op.matrix[1]}"
        if op.matrix[1] > LARGEST_INPUTS:
            return f"{self.name} numbers inputs in 16 bits, not {op.matrix[1]}"
        return refused_step(op)

    def candidates(
        self, op: Dense, weight: WeightStatistics, target: CudaTarget, wish: Wish | None = None
    ) -> Sequence[Layout]:
        offered = weight.sparsity >= _LEAST if wish is None else wish.format == "csr"
        return [Layout(self.name, "csr")] if offered else []

    def structures(self, op: Dense, target: CudaTarget) -> Sequence[str]:
        return ["unstructured"]

    def cost(
        self, op: Dense, layout: Layout, weight: WeightStatistics, tokens: int, target: CudaTarget
    ) -> float:
        return row_seconds(op.matrix, weight.nonzeros, tokens, target.gpu)

    def pack(
        self, op: Dense, w: np.ndarray, layout: Layout, target: CudaTarget
    ) -> dict[str, np.ndarray]:
        return row_arrays(w, op.types.weight)

    def build(
        self, op: Dense, operands: Sequence[Extents], output: Extents, target: CudaTarget
    ) -> Kernel:
        from sparse_tvm.schedules.cuda.sparse_matmul import SparseProblem, sparse_matmul

        (n, k), (x, *_) = op.matrix, operands
        extras = operands[len(operands) - op.extras :] if op.extras else ()
        tile = row_tile(n, k, known_tokens(x))
        problem = SparseProblem(n, k, x, tuple(extras), output, tile, op.epilogue)
        size = f"{tile.rows}x{tile.tokens}tile"
        title = "_".join(["csr", f"{n}x{k}", size, *op.step_titles])
        return Kernel(title, sparse_matmul(problem))

    def work(
        self, op: Dense, operands: Sequence[Extents], output: Extents, nonzeros: int | None = None
    ) -> Work:
        return layer_work(op, operands, output, nonzeros)
