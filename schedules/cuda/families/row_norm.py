"""Layer norm by warps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sparse_tvm.families import Extents, Kernel, KernelFamily, Work, bytes_of
from sparse_tvm.operators import LayerNorm
from sparse_tvm.targets.cuda import CudaTarget

LARGEST_WIDTH = 4096
"""Features beyond which a row would not fit into a warp's registers."""


class RowNormFamily(KernelFamily[LayerNorm]):
    """The kernel of :mod:`sparse_tvm.schedules.cuda.row_norm`.

    Operands are x in rows of float16, bfloat16 or float32, gamma and beta in float32, and another
    tensor of rows if there is a residual, and one more in uint8 if that comes with its remainder.
    """

    name: ClassVar[str] = "row_norm"
    operator: ClassVar[type[LayerNorm]] = LayerNorm

    def build(
        self, op: LayerNorm, operands: Sequence[Extents], output: Extents, target: CudaTarget
    ) -> Kernel:
        from sparse_tvm.schedules.cuda.row_norm import layer_norm

        x, _, _, *residual = operands
        title = f"layer_norm_{x.shape[-1]}" + "_residual" * op.residual + "_whole" * op.remainder
        title += f"_{op.second}" if op.second else ""
        return Kernel(title, layer_norm(x, output, op.epsilon, op.second, *residual))

    def work(
        self,
        op: LayerNorm,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        return Work(0.0, bytes_of([*operands, output]))
