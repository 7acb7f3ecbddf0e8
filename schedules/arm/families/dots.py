"""Dense layers in int8 by Arm's dot products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_tvm.schedules.arm.units import DOTS
from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.low_precision import DotFamily

if TYPE_CHECKING:
    from sparse_tvm.schedules.cpu.dot_matmul import MultiplyAdd


@dataclass(frozen=True)
class ArmDotFamily(DotFamily):
    """CPUs with ``sdot``."""

    name: ClassVar[str] = "arm_dot"
    dots: ClassVar[tuple[Dot, ...]] = DOTS

    def multiply_add(self, dot: Dot) -> MultiplyAdd:
        from sparse_tvm.schedules.arm.instructions import MULTIPLY_ADD

        return MULTIPLY_ADD[dot.name]
