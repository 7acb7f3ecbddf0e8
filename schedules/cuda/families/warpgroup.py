"""Dense layers on the warpgroups of Hopper's GPUs, in float16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel, WeightedFamily, Wish, Work
from sparse_tvm.operators import PRECISIONS, Activation, Dense, Layout
from sparse_tvm.schedules.cuda.families.dense import known_tokens, layer_work, refused_step
from sparse_tvm.schedules.cuda.warpgroup_tiles import tile_for, warpgroup_seconds
from sparse_tvm.schedules.cuda.warpgroup_weights import SIDE, warpgroup_arrays
from sparse_tvm.schedules.cuda.weights import stacked
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets.cuda import CudaTarget

_CAPABILITY = 90
"""Of the only devices that have ``wgmma``."""

_BLOCK = (SIDE, SIDE)


class WarpgroupDenseFamily(WeightedFamily[Dense]):
    """Kernels of :mod:`sparse_tvm.schedules.cuda.warpgroup_matmul`."""

    name: ClassVar[str] = "warpgroup_dense"
    operator: ClassVar[type[Dense]] = Dense

    def refuses(self, op: Dense, target: CudaTarget) -> str | None:
        if {gpu.capability for gpu in target.gpus} != {_CAPABILITY}:
            return f"{self.name} needs a target of compute capability 9.0 alone"
        if op.types != PRECISIONS["fp16"]:
            return f"{self.name} computes fp16 only"
        if op.matrix[0] % 8 or op.matrix[1] % 8:
            return f"{self.name} takes eight inputs and outputs at a time, not {op.matrix}"
        return refused_step(op)

    def candidates(
        self, op: Dense, weight: WeightStatistics, target: CudaTarget, wish: Wish | None = None
    ) -> Sequence[Layout]:
        found = []
        if wish is None or wish.format == "dense":
            found.append(Layout(self.name, "dense"))
        if wish is None or (wish.format == "bsr" and _made_of_blocks(wish)):
            found.append(Layout(self.name, "bsr", _BLOCK))
        if wish is None and weight.n_m in ((1, 4), (2, 4)):
            found.append(Layout(self.name, "2:4", (1, 4)))
        return found

    def cost(
        self, op: Dense, layout: Layout, weight: WeightStatistics, tokens: int, target: CudaTarget
    ) -> float:
        stored = weight.stored_blocks(layout.block) if layout.format == "bsr" else None
        return warpgroup_seconds(op.matrix, layout, stored, tokens, target.gpu, _takes_powers(op))

    def pack(
        self, op: Dense, w: np.ndarray, layout: Layout, target: CudaTarget
    ) -> dict[str, np.ndarray]:
        return warpgroup_arrays(w, layout)

    def stacked(
        self, layers: Sequence[Sequence[np.ndarray]], layout: Layout
    ) -> list[np.ndarray] | None:
        return stacked(layers, layout)

    def build(
        self, op: Dense, operands: Sequence[Extents], output: Extents, target: CudaTarget
    ) -> Kernel:
        from sparse_tvm.schedules.cuda.warpgroup_matmul import Problem, warpgroup_matmul

        (n, k), layout = op.matrix, op.stored
        x, *_ = operands
        extras = operands[len(operands) - op.extras :] if op.extras else ()
        tile = tile_for(op.matrix, layout, known_tokens(x), target.gpu, _takes_powers(op))
        problem = Problem(
            n, k, x, tuple(extras), output, layout, tile, op.epilogue, target.gpu.processors
        )
        form = {"dense": "dense", "bsr": "bsr_64x64", "2:4": "sparse_2of4"}[layout.format]
        size = f"{tile.rows}x{tile.tokens}warpgroups"
        title = "_".join([form, f"{n}x{k}", size, *op.step_titles])
        return Kernel(title, warpgroup_matmul(problem))

    def work(
        self, op: Dense, operands: Sequence[Extents], output: Extents, nonzeros: int | None = None
    ) -> Work:
        return layer_work(op, operands, output, nonzeros)


def _made_of_blocks(wish: Wish) -> bool:
    """Whether blocks of 64x64 are no larger than what is wished."""
    return wish.block is None or (wish.block[0] % SIDE == 0 and wish.block[1] % SIDE == 0)


def _takes_powers(op: Dense) -> bool:
    """Whether an activation other than ReLU is computed of each output."""
    return any(isinstance(step, Activation) and step.function != "relu" for step in op.epilogue)
