"""Attention on matrix units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparse_tvm.families import Extents, Kernel, KernelFamily, Work, bytes_of, elements
from sparse_tvm.operators import Attention
from sparse_tvm.schedules.cpu.families.extents import tiles_for
from sparse_tvm.schedules.cpu.precision import BF16, HEAD_STEP, PRECISIONS
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.x86.units import AMX_FEATURES, AMX_RATE
from sparse_tvm.targets import Target


@dataclass(frozen=True)
class TileAttentionFamily(KernelFamily[Attention]):
    """The kernel of :mod:`sparse_tvm.schedules.x86.tile_attention`.

    Operands are q, k and v in lines of bf16, the mask if any (lane-tiled over its queries, if it
    has any), and the number of keys.
    """

    name: ClassVar[str] = "tile_attention"
    operator: ClassVar[type[Attention]] = Attention

    def refuses(self, op: Attention, target: Target) -> str | None:
        if PRECISIONS.get(op.types.input) is not BF16:
            return f"{self.name} computes bf16 only"
        if op.sizes is None or any(size % HEAD_STEP for size in op.sizes):
            return f"{self.name} takes heads of {HEAD_STEP}, {2 * HEAD_STEP}, ... features"
        if not target.has(*AMX_FEATURES):
            return f"{target.name} has no matrix unit (AMX)"
        return None

    def build(
        self, op: Attention, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.attention_operands import Mask
        from sparse_tvm.schedules.cpu.lane_tiles import Tiles
        from sparse_tvm.schedules.x86.instructions import Amx
        from sparse_tvm.schedules.x86.tile_attention import TileAttention, tile_attention

        q, k, *_, rows = operands
        assert op.sizes is not None
        queries = tiles_for(q)
        out = PRECISIONS.get(op.types.output)
        problem = TileAttention(
            queries,
            Tiles(queries.lead, tiles_for(k).per_lead),
            rows.shape[0],
            op.heads,
            *op.sizes,
            op.scale,
            Mask(*op.mask) if op.mask is not None else None,
            out,
        )
        title = f"attention_bf16_amx_{op.heads}x{op.sizes[0]}" + (f"_to_{out.name}" if out else "")
        return Kernel(title, tile_attention(problem, Simd.of(target), Amx()))

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
        return Work(flops, bytes_of([*operands, output]), rate=AMX_RATE * BF16.unit)
