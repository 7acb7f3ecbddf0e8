"""Attention in bf16 on matrix units, and by dot products where there are none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_tvm.schedules.cpu.attention_blocks import Blocks
from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.bf16_attention import Bf16AttentionFamily, DotAttentionFamily
from sparse_tvm.schedules.cpu.precision import BF16
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.x86.units import AMX_FEATURES, AMX_RATE, AVX512_BF16
from sparse_tvm.targets import Target

if TYPE_CHECKING:
    from tvm import tirx

    from sparse_tvm.schedules.cpu.bf16_attention import Bf16Attention
    from sparse_tvm.schedules.cpu.dot_products import MultiplyAdd


@dataclass(frozen=True)
class TileAttentionFamily(Bf16AttentionFamily):
    """The kernel of :mod:`sparse_tvm.schedules.x86.tile_attention`."""

    name: ClassVar[str] = "tile_attention"
    unit: ClassVar[str] = "amx"
    rate: ClassVar[float] = AMX_RATE * BF16.unit

    def lacks(self, target: Target) -> str | None:
        return None if target.has(*AMX_FEATURES) else f"{target.name} has no matrix unit (AMX)"

    def kernel(
        self, problem: Bf16Attention, target: Target, blocks: Blocks | None
    ) -> tirx.PrimFunc:
        from sparse_tvm.schedules.x86.instructions import Amx
        from sparse_tvm.schedules.x86.tile_attention import tile_attention

        return tile_attention(problem, Simd.of(target), Amx())


@dataclass(frozen=True)
class X86DotAttentionFamily(DotAttentionFamily):
    """By ``vdpbf16ps``."""

    name: ClassVar[str] = "dot_attention"
    dot: ClassVar[Dot] = AVX512_BF16
    unit: ClassVar[str] = AVX512_BF16.name

    def lacks(self, target: Target) -> str | None:
        if target.has(*AMX_FEATURES):
            return f"{target.name} has a matrix unit, which is faster"
        return super().lacks(target)

    def multiply_add(self) -> MultiplyAdd:
        from sparse_tvm.schedules.x86.instructions import vdpbf16ps

        return vdpbf16ps

    def code(self) -> str | None:
        from sparse_tvm.schedules.x86.instructions import CODE

        return CODE[self.dot.name]
