"""Dense layers with weights in blocks of 32x32 on the warpgroups of Hopper's GPUs, in float16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel, WeightedFamily, Wish, Work
from sparse_tvm.operators import Dense, Layout
from sparse_tvm.schedules.cuda.band_tiles import HEIGHT, band_seconds, tile_for
from sparse_tvm.schedules.cuda.band_weights import LARGEST_INPUTS, SIDE, band_arrays
from sparse_tvm.schedules.cuda.families.dense import known_tokens, layer_work
from sparse_tvm.schedules.cuda.families.warpgroup import refused_on_warpgroups
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets.cuda import CudaTarget


class BandDenseFamily(WeightedFamily[Dense]):
    """Kernels of :mod:`sparse_tvm.schedules.cuda.band_matmul`."""

    name: ClassVar[str] = "band_dense"
    operator: ClassVar[type[Dense]] = Dense

    def refuses(self, op: Dense, target: CudaTarget) -> str | None:
        if op.matrix[1] > LARGEST_INPUTS:
            return f"{self.name} numbers inputs' blocks in 16 bits, not {op.matrix[1]} inputs"
        return refused_on_warpgroups(self.name, op, target)

    def candidates(
        self, op: Dense, weight: WeightStatistics, target: CudaTarget, wish: Wish | None = None
    ) -> Sequence[Layout]:
        fits = wish is None or (wish.format == "bsr" and _made_of_blocks(wish))
        return [Layout(self.name, "bsr", (SIDE, SIDE))] if fits else []

    def cost(
        self, op: Dense, layout: Layout, weight: WeightStatistics, tokens: int, target: CudaTarget
    ) -> float:
        return band_seconds(op.matrix, weight.stored_blocks(layout.block), tokens, target.gpu)

    def pack(
        self, op: Dense, w: np.ndarray, layout: Layout, target: CudaTarget
    ) -> dict[str, np.ndarray]:
        return band_arrays(w, HEIGHT)

    def build(
        self, op: Dense, operands: Sequence[Extents], output: Extents, target: CudaTarget
    ) -> Kernel:
        from sparse_tvm.schedules.cuda.band_matmul import BandProblem, band_matmul

        (n, k), (x, *_) = op.matrix, operands
        extras = operands[len(operands) - op.extras :] if op.extras else ()
        tile = tile_for(op.matrix, known_tokens(x), target.gpu)
        processors = target.gpu.processors
        problem = BandProblem(n, k, x, tuple(extras), output, tile, op.epilogue, processors)
        size = f"{tile.height * SIDE}x{tile.tokens}band"
        title = "_".join(["bsr_32x32", f"{n}x{k}", size, *op.step_titles])
        return Kernel(title, band_matmul(problem))

    def work(
        self, op: Dense, operands: Sequence[Extents], output: Extents, nonzeros: int | None = None
    ) -> Work:
        return layer_work(op, operands, output, nonzeros)


def _made_of_blocks(wish: Wish) -> bool:
    """Whether blocks of 32x32 are no larger than what is wished."""
    return wish.block is None or (wish.block[0] % SIDE == 0 and wish.block[1] % SIDE == 0)
