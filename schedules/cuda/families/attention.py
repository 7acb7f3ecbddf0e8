"""Attention on tensor cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sparse_tvm.families import Extents, Kernel, KernelFamily, Work, bytes_of
from sparse_tvm.operators import Attention
from sparse_tvm.schedules.cuda.families.dense import HALVES
from sparse_tvm.targets.cuda import CudaTarget

LARGEST_HEAD = 128
"""Features of a head, beyond which a warp's sums would not fit into its registers."""


class TensorAttentionFamily(KernelFamily[Attention]):
    """The kernel of :mod:`sparse_tvm.schedules.cuda.attention`.

    Operands are q, k and v in rows of 16-bit floats, and the mask in float32 if there is one.
    """

    name: ClassVar[str] = "tensor_attention"
    operator: ClassVar[type[Attention]] = Attention

    def refuses(self, op: Attention, target: CudaTarget) -> str | None:
        if op.types not in HALVES:
            return f"{self.name} computes fp16 and bf16 only"
        if op.sizes is None or any(size % 8 or size > LARGEST_HEAD for size in op.sizes):
            return f"{self.name} takes heads of 8, 16, ... {LARGEST_HEAD} features"
        return None

    def build(
        self, op: Attention, operands: Sequence[Extents], output: Extents, target: CudaTarget
    ) -> Kernel:
        from sparse_tvm.schedules.cuda.attention import AttentionProblem, attention

        q, k, v, *rest = operands
        problem = AttentionProblem(op, q, k, v, rest[0] if rest else None, output)
        assert op.sizes is not None
        title = f"attention_{op.heads}x{op.sizes[0]}" + ("_mask" if rest else "")
        return Kernel(title, attention(problem))

    def work(
        self,
        op: Attention,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        assert op.sizes is not None
        (batch, queries, _), keys = output.shape, operands[1].shape[1]
        scores = (batch or 1) * (queries or 1) * (keys or 1) * op.heads
        # Two products, of which each reads q, k and v as often as blocks of queries need them.
        return Work(2.0 * scores * sum(op.sizes), bytes_of([*operands, output]))
