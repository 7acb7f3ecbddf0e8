"""Attention in float32 on lane tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sparse_tvm.families import Extents, Kernel, KernelFamily, Work, bytes_of, elements
from sparse_tvm.operators import FLOAT32, Attention
from sparse_tvm.schedules.cpu.attention_blocks import (
    KEYS,
    MOST_TILES,
    Blocks,
    offered_blocks,
    usual_blocks,
)
from sparse_tvm.schedules.cpu.families.extents import known_or_symbols, tiles_for
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.targets import Target


@dataclass(frozen=True)
class AttentionFamily(KernelFamily[Attention]):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.attention`.

    Operands are q, k and v, as lane tiles or by heads, the mask if any (lane-tiled over its
    queries, if it has any), and the numbers of keys and, where keys and values are by heads, of
    queries.
    """

    name: ClassVar[str] = "attention"
    operator: ClassVar[type[Attention]] = Attention

    def refuses(self, op: Attention, target: Target) -> str | None:
        return None if op.types == FLOAT32 else f"{self.name} computes float32 only"

    def build(
        self, op: Attention, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.attention import attention
        from sparse_tvm.schedules.cpu.attention_operands import AttentionProblem, Mask

        *_, numbers = operands
        names = ("key_rows", "query_rows")[: len(numbers.shape)]
        key_rows, *query_rows = known_or_symbols(numbers, names)
        queries = tiles_for(output)
        heads = (op.heads, *[op.key_heads or op.heads] * 2)
        q, k, v = (
            _heads(operand, by_heads, count, queries.lead)
            for operand, by_heads, count in zip(operands[:3], op.by_heads, heads, strict=True)
        )
        mask = Mask(*op.mask) if op.mask is not None else None
        rows = query_rows[0] if query_rows else None
        problem = AttentionProblem(q, k, v, queries, rows, key_rows, op.scale, mask)
        kernel = attention(problem, Simd.of(target), op.blocks)
        return Kernel(f"attention_{op.heads}x{q.size}", kernel)

    def forms(
        self, op: Attention, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Mapping[str, Attention]:
        simd, tiles = Simd.of(target), output.shape[1]
        offered = offered_blocks(simd, KEYS, MOST_TILES, tiles)
        return in_blocks(op, offered, usual_blocks(simd))

    def work(
        self,
        op: Attention,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        q, k, *_ = operands
        keys = (k.shape[2] if op.by_heads[1] else (k.shape[1] or 0) * LANES) or 0
        results = elements(output)
        if op.by_heads[0]:  # queries without padding
            results = (q.shape[0] or 0) * (q.shape[2] or 0) * (output.shape[2] or 0)
        flops = 2.0 * (elements(q) + results) * keys
        return Work(flops, bytes_of([*operands, output]))


def in_blocks(op: Attention, offered: Sequence[Blocks], usual: Blocks) -> Mapping[str, Attention]:
    """The operator in blocks that are not the usual ones, by names."""
    return {
        f"{keys}x{tiles}": replace(op, blocks=(keys, tiles))
        for keys, tiles in offered
        if (keys, tiles) != usual
    }


def _heads(operand: Extents, by_heads: bool, heads: int, lead: Any) -> Any:
    """Where the kernel finds q, k or v; all have the same batch."""
    from sparse_tvm.schedules.cpu.attention_operands import ByHeads, InTiles
    from sparse_tvm.schedules.cpu.lane_tiles import Tiles

    if by_heads:
        *_, rows, size = known_or_symbols(operand, ("lead", "heads", "rows", "size"))
        return ByHeads(lead, rows, heads, size)
    features = operand.shape[2]
    assert features is not None
    return InTiles(Tiles(lead, tiles_for(operand).per_lead), heads, features // heads)
