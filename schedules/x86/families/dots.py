"""Dense layers in int8 and bf16 by x86's dot products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.low_precision import DotFamily
from sparse_tvm.schedules.cpu.precision import BF16, INT8, Precision
from sparse_tvm.schedules.x86.units import AMX_FEATURES, DOTS
from sparse_tvm.targets import Target

if TYPE_CHECKING:
    from sparse_tvm.schedules.cpu.dot_products import MultiplyAdd


@dataclass(frozen=True)
class X86DotFamily(DotFamily):
    """SSSE3, AVX2 and VNNI; AVX512-BF16 where there is no matrix unit.

    CPUs that have one multiply bf16 by dot products at half the speed of float32.
    """

    dots: ClassVar[tuple[Dot, ...]] = DOTS
    precisions: ClassVar[tuple[Precision, ...]] = (INT8, BF16)

    def dot(
        self, target: Target, precision: Precision = INT8, least: int = 0, depth: int = 1
    ) -> Dot | None:
        if precision is BF16 and target.has(*AMX_FEATURES):
            return None
        return super().dot(target, precision, least, depth)

    def multiply_add(self, dot: Dot) -> MultiplyAdd:
        from sparse_tvm.schedules.x86.instructions import MULTIPLY_ADD

        return MULTIPLY_ADD[dot.name]

    def code(self, dot: Dot) -> str | None:
        from sparse_tvm.schedules.x86.instructions import CODE

        return CODE.get(dot.name)
