"""Attention in float32 on lane tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparse_tvm.families import Extents, Kernel, KernelFamily, Work, bytes_of, elements
from sparse_tvm.operators import FLOAT32, Attention
from sparse_tvm.schedules.cpu.families.extents import tiles_for
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.targets import Target


@dataclass(frozen=True)
class AttentionFamily(KernelFamily[Attention]):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.attention`.

    Operands are lane tiles of q, k, v, the mask if any (lane-tiled over its queries, if it has
    any), and the number of keys.
    """

    name: ClassVar[str] = "attention"
    operator: ClassVar[type[Attention]] = Attention

    def refuses(self, op: Attention, target: Target) -> str | None:
        return None if op.types == FLOAT32 else f"{self.name} computes float32 only"

    def build(
        self, op: Attention, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.attention import Mask, attention
        from sparse_tvm.schedules.cpu.lane_tiles import Tiles

        q, k, v, *_, rows = operands
        head_size, value_size = (_features(operand) // op.heads for operand in (q, v))
        queries = tiles_for(q)
        keys = Tiles(queries.lead, tiles_for(k).per_lead)
        mask = Mask(*op.mask) if op.mask is not None else None
        function = attention(
            queries,
            keys,
            rows.shape[0],
            op.heads,
            head_size,
            value_size,
            op.scale,
            mask,
            Simd.of(target),
        )
        return Kernel(f"attention_{op.heads}x{head_size}", function)

    def work(
        self,
        op: Attention,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        keys = (operands[1].shape[1] or 0) * LANES
        flops = 2.0 * (elements(operands[0]) + elements(output)) * keys
        return Work(flops, bytes_of([*operands, output]))


def _features(operand: Extents) -> int:
    features = operand.shape[2]
    assert features is not None
    return features
