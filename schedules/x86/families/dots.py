"""Dense layers in int8 by x86's dot products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.low_precision import DotFamily
from sparse_tvm.schedules.x86.units import DOTS

if TYPE_CHECKING:
    from sparse_tvm.schedules.cpu.dot_matmul import MultiplyAdd


@dataclass(frozen=True)
class X86DotFamily(DotFamily):
    """SSSE3, AVX2 and VNNI."""

    dots: ClassVar[tuple[Dot, ...]] = DOTS

    def multiply_add(self, dot: Dot) -> MultiplyAdd:
        from sparse_tvm.schedules.x86.instructions import MULTIPLY_ADD

        return MULTIPLY_ADD[dot.name]
