"""Rounding of activations into lines of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparse_tvm.families import Extents, Kernel, KernelFamily, Work, bytes_of
from sparse_tvm.schedules.cpu.families.extents import tiles_for
from sparse_tvm.schedules.cpu.operators import LineRound
from sparse_tvm.schedules.cpu.precision import PRECISIONS
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.targets import Target


@dataclass(frozen=True)
class LineRoundFamily(KernelFamily[LineRound]):
    """The kernels of :mod:`sparse_tvm.schedules.cpu.low_precision`."""

    name: ClassVar[str] = "line_round"
    operator: ClassVar[type[LineRound]] = LineRound

    def refuses(self, op: LineRound, target: Target) -> str | None:
        known = op.types.output in PRECISIONS and op.types.input == "float32"
        return None if known else f"{self.name} rounds float32 to {' or '.join(PRECISIONS)}"

    def build(
        self, op: LineRound, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.low_precision import quantise, quantise_by_steps

        precision, features = PRECISIONS[op.types.output], operands[0].shape[2]
        assert features is not None
        if len(operands) > 1:
            function = quantise_by_steps(tiles_for(operands[0]), features, Simd.of(target))
            return Kernel(f"round_{features}_by_steps", function)
        function = quantise(tiles_for(operands[0]), features, precision, Simd.of(target))
        return Kernel(f"round_{features}_to_{precision.name}", function)

    def work(
        self,
        op: LineRound,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        return Work(bytes=bytes_of([*operands, output]))
