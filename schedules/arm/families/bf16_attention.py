"""Attention in bf16 by Arm's dot products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_tvm.schedules.arm.units import BFDOT
from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.bf16_attention import DotAttentionFamily

if TYPE_CHECKING:
    from sparse_tvm.schedules.cpu.dot_products import MultiplyAdd


@dataclass(frozen=True)
class ArmDotAttentionFamily(DotAttentionFamily):
    """By ``bfdot``."""

    name: ClassVar[str] = "arm_dot_attention"
    dot: ClassVar[Dot] = BFDOT
    unit: ClassVar[str] = BFDOT.name

    def multiply_add(self) -> MultiplyAdd:
        from sparse_tvm.schedules.arm.instructions import bfdot

        return bfdot

    def code(self) -> str | None:
        from sparse_tvm.schedules.arm.instructions import CODE

        return CODE[self.dot.name]
