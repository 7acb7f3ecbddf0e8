"""Dense layers in int8 and bf16 by Arm's dot products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_tvm.schedules.arm.units import DOTS
from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.low_precision import DotFamily
from sparse_tvm.schedules.cpu.precision import BF16, INT8, Precision

if TYPE_CHECKING:
    from sparse_tvm.schedules.cpu.dot_products import MultiplyAdd


@dataclass(frozen=True)
class ArmDotFamily(DotFamily):
    """CPUs with ``sdot``, and with ``bfdot``."""

    name: ClassVar[str] = "arm_dot"
    precisions: ClassVar[tuple[Precision, ...]] = (INT8, BF16)
    dots: ClassVar[tuple[Dot, ...]] = DOTS

    def multiply_add(self, dot: Dot) -> MultiplyAdd:
        from sparse_tvm.schedules.arm.instructions import MULTIPLY_ADD

        return MULTIPLY_ADD[dot.name]

    def code(self, dot: Dot) -> str | None:
        from sparse_tvm.schedules.arm.instructions import CODE

        return CODE.get(dot.name)
