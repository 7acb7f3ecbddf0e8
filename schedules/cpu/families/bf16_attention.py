"""Attention in bf16: what its families share, and dot products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from sparse_tvm.families import Extents, Kernel, KernelFamily, Work, bytes_of, elements
from sparse_tvm.operators import Attention
from sparse_tvm.schedules.cpu.attention_blocks import (
    DOT_KEYS,
    MOST_DOT_TILES,
    Blocks,
    offered_blocks,
    usual_dot_blocks,
)
from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.attention import in_blocks
from sparse_tvm.schedules.cpu.families.extents import tiles_for
from sparse_tvm.schedules.cpu.precision import BF16, HEAD_STEP, PRECISIONS
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.targets import Target

if TYPE_CHECKING:
    from tvm import tirx

    from sparse_tvm.schedules.cpu.bf16_attention import Bf16Attention
    from sparse_tvm.schedules.cpu.dot_products import MultiplyAdd


class Bf16AttentionFamily(KernelFamily[Attention]):
    """The kernels of :mod:`sparse_tvm.schedules.cpu.bf16_attention`.

    Operands are q, k and v in lines of bf16, the mask if any (lane-tiled over its queries, if it
    has any), and the number of keys.
    """

    operator: ClassVar[type[Attention]] = Attention
    unit: ClassVar[str]
    """What multiplies, in a kernel's name."""
    rate: ClassVar[float]
    """Of the unit (see :class:`Work`)."""

    @abstractmethod
    def lacks(self, target: Target) -> str | None:
        """What the target's CPUs miss; None if nothing."""

    @abstractmethod
    def kernel(
        self, problem: Bf16Attention, target: Target, blocks: Blocks | None
    ) -> tirx.PrimFunc:
        """Build the kernel itself, in blocks if it has some to choose among."""

    def refuses(self, op: Attention, target: Target) -> str | None:
        if PRECISIONS.get(op.types.input) is not BF16:
            return f"{self.name} computes bf16 only"
        if op.sizes is None or any(size % HEAD_STEP for size in op.sizes):
            return f"{self.name} takes heads of {HEAD_STEP}, {2 * HEAD_STEP}, ... features"
        return self.lacks(target)

    def build(
        self, op: Attention, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.attention_operands import Mask
        from sparse_tvm.schedules.cpu.bf16_attention import Bf16Attention
        from sparse_tvm.schedules.cpu.lane_tiles import Tiles

        q, k, *_, rows = operands
        assert op.sizes is not None
        queries = tiles_for(q)
        out = PRECISIONS.get(op.types.output)
        problem = Bf16Attention(
            queries,
            Tiles(queries.lead, tiles_for(k).per_lead),
            rows.shape[0],
            op.heads,
            *op.sizes,
            op.scale,
            Mask(*op.mask) if op.mask is not None else None,
            out,
        )
        to = f"_to_{out.name}" if out else ""
        title = f"attention_bf16_{self.unit}_{op.heads}x{op.sizes[0]}{to}"
        return Kernel(title, self.kernel(problem, target, op.blocks))

    def work(
        self,
        op: Attention,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        assert op.sizes is not None
        queries, keys = (elements(Extents(o.shape[:2])) * LANES for o in operands[:2])
        flops = 2.0 * queries * keys * op.heads * sum(op.sizes)
        flops /= max(1, operands[0].shape[0] or 1)
        return Work(flops, bytes_of([*operands, output]), rate=self.rate)


class DotAttentionFamily(Bf16AttentionFamily):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.dot_attention` for a kind of CPU."""

    dot: ClassVar[Dot]
    rate: ClassVar[float] = BF16.unit  # products in a word

    @abstractmethod
    def multiply_add(self) -> MultiplyAdd:
        """The instruction itself."""

    @abstractmethod
    def code(self) -> str | None:
        """What kernels with it bring in LLVM's own words."""

    def forms(
        self, op: Attention, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Mapping[str, Attention]:
        simd, tiles = Simd.of(target), operands[0].shape[1]
        offered = offered_blocks(simd, DOT_KEYS, MOST_DOT_TILES, tiles)
        return in_blocks(op, offered, usual_dot_blocks(simd))

    def lacks(self, target: Target) -> str | None:
        able = target.has(*self.dot.features)
        return None if able else f"{target.name} has no dot products of bf16"

    def kernel(
        self, problem: Bf16Attention, target: Target, blocks: Blocks | None
    ) -> tirx.PrimFunc:
        from sparse_tvm.schedules.cpu.bf16_dot import with_code
        from sparse_tvm.schedules.cpu.dot_attention import dot_attention

        kernel = dot_attention(problem, Simd.of(target), self.multiply_add(), blocks)
        return with_code(kernel, self.code())
