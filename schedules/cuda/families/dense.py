"""Dense layers: on tensor cores in float16 or bfloat16, and in float32."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel, WeightedFamily, Wish, Work, bytes_of, elements
from sparse_tvm.operators import FLOAT32, PRECISIONS, Activation, Bias, Dense, Layout, Residual
from sparse_tvm.schedules.cuda.cost import core_seconds, tensor_seconds
from sparse_tvm.schedules.cuda.tiles import tile_for
from sparse_tvm.schedules.cuda.weights import stacked, weight_arrays
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets.cuda import CudaTarget

FUNCTIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
"""Activations that an epilogue can have."""

HALVES = (PRECISIONS["fp16"], PRECISIONS["bf16"])
"""Types that tensor cores multiply."""

BLOCKS = ((16, 16), (32, 32), (64, 64))
"""Blocks that there are kernels for, rows by columns."""


class TensorDenseFamily(WeightedFamily[Dense]):
    """Kernels of :mod:`sparse_tvm.schedules.cuda.tensor_matmul`."""

    name: ClassVar[str] = "tensor_dense"
    operator: ClassVar[type[Dense]] = Dense

    def refuses(self, op: Dense, target: CudaTarget) -> str | None:
        if op.types not in HALVES:
            return f"{self.name} computes fp16 and bf16 only"
        if op.matrix[1] % 8:
            return f"{self.name} reads eight inputs at a time, not {op.matrix[1]}"
        return refused_step(op)

    def candidates(
        self, op: Dense, weight: WeightStatistics, target: CudaTarget, wish: Wish | None = None
    ) -> Sequence[Layout]:
        found = []
        if wish is None or wish.format == "dense":
            found.append(Layout(self.name, "dense"))
        if wish is None or wish.format == "bsr":
            found += [Layout(self.name, "bsr", block) for block in _nearest(wish)]
        if wish is None and weight.n_m in ((1, 4), (2, 4)):
            found.append(Layout(self.name, "2:4", (1, 4)))
        return found

    def structures(self, op: Dense, target: CudaTarget) -> Sequence[str]:
        return [f"{rows}x{columns}" for rows, columns in BLOCKS]

    def cost(
        self, op: Dense, layout: Layout, weight: WeightStatistics, tokens: int, target: CudaTarget
    ) -> float:
        stored = weight.stored_blocks(layout.block) if layout.format == "bsr" else None
        return tensor_seconds(op.matrix, layout, stored, tokens, target.gpu)

    def pack(
        self, op: Dense, w: np.ndarray, layout: Layout, target: CudaTarget
    ) -> dict[str, np.ndarray]:
        return weight_arrays(w, layout, op.types.weight)

    def stacked(
        self, layers: Sequence[Sequence[np.ndarray]], layout: Layout
    ) -> list[np.ndarray] | None:
        return stacked(layers, layout)

    def build(
        self, op: Dense, operands: Sequence[Extents], output: Extents, target: CudaTarget
    ) -> Kernel:
        from sparse_tvm.schedules.cuda.tensor_matmul import Problem, tensor_matmul

        (n, k), layout = op.matrix, op.stored
        x, *_ = operands
        extras = operands[len(operands) - op.extras :] if op.extras else ()
        tile = tile_for(layout, n, known_tokens(x))
        problem = Problem(n, k, x, tuple(extras), output, layout, tile, op.epilogue)
        size = "_{}x{}".format(*layout.block) if layout.format == "bsr" else ""
        form = layout.format.replace(":", "of") + size
        title = "_".join([form, f"{n}x{k}", f"{tile.rows}x{tile.tokens}tile", *op.step_titles])
        return Kernel(title if title[0].isalpha() else f"sparse_{title}", tensor_matmul(problem))

    def work(
        self, op: Dense, operands: Sequence[Extents], output: Extents, nonzeros: int | None = None
    ) -> Work:
        return layer_work(op, operands, output, nonzeros)


class CoreDenseFamily(WeightedFamily[Dense]):
    """Kernels of :mod:`sparse_tvm.schedules.cuda.core_matmul`: the weight dense, in float32."""

    name: ClassVar[str] = "core_dense"
    operator: ClassVar[type[Dense]] = Dense

    def refuses(self, op: Dense, target: CudaTarget) -> str | None:
        if op.types != FLOAT32:
            return f"{self.name} computes fp32 only"
        return refused_step(op)

    def candidates(
        self, op: Dense, weight: WeightStatistics, target: CudaTarget, wish: Wish | None = None
    ) -> Sequence[Layout]:
        return [Layout(self.name, "dense")] if wish is None or wish.format == "dense" else []

    def remark(self, op: Dense) -> str | None:
        return "in fp32 weights are stored dense on this target"

    def cost(
        self, op: Dense, layout: Layout, weight: WeightStatistics, tokens: int, target: CudaTarget
    ) -> float:
        return core_seconds(op.matrix, tokens, target.gpu)

    def pack(
        self, op: Dense, w: np.ndarray, layout: Layout, target: CudaTarget
    ) -> dict[str, np.ndarray]:
        return {"data": np.ascontiguousarray(w, np.float32)}

    def build(
        self, op: Dense, operands: Sequence[Extents], output: Extents, target: CudaTarget
    ) -> Kernel:
        from sparse_tvm.schedules.cuda.core_matmul import core_matmul

        (n, k), (x, *_) = op.matrix, operands
        extras = operands[len(operands) - op.extras :] if op.extras else ()
        kernel = core_matmul(n, k, [x, *extras], output, op.epilogue)
        return Kernel("_".join(["dense_fp32", f"{n}x{k}", *op.step_titles]), kernel)

    def work(
        self, op: Dense, operands: Sequence[Extents], output: Extents, nonzeros: int | None = None
    ) -> Work:
        return layer_work(op, operands, output, nonzeros)


def refused_step(op: Dense) -> str | None:
    """Why there is no such layer, or no epilogue as the layer's; None if there is."""
    if op.groups > 1:
        return "no groups"
    for step in op.epilogue:
        known = isinstance(step, Bias | Residual) or (
            isinstance(step, Activation) and step.function in FUNCTIONS
        )
        if not known:
            return f"no epilogue {step}"
    return None


def _nearest(wish: Wish | None) -> list[tuple[int, int]]:
    """The blocks there are, or the largest of them that a wished one is made of."""
    if wish is None or wish.block is None:
        return list(BLOCKS)
    rows, columns = wish.block
    fitting = [b for b in BLOCKS if rows % b[0] == 0 and columns % b[1] == 0]
    return fitting[-1:] or [BLOCKS[0]]


def known_tokens(x: Extents) -> int | None:
    """Rows of a tensor, if they are known."""
    rows = [dim for dim in x.shape[:-1] if dim is not None]
    return prod(rows) if len(rows) == len(x.shape) - 1 else None


def layer_work(
    op: Dense, operands: Sequence[Extents], output: Extents, nonzeros: int | None
) -> Work:
    """What a layer's kernel has to do; ``nonzeros`` of the weight, None for all."""
    n, k = op.matrix
    count = n * k if nonzeros is None else nonzeros
    return Work(2.0 * count * elements(output) / n, bytes_of([*operands, output]))
