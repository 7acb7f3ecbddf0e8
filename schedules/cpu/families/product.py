"""Products of two activations in float32, each operand in any order of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparse_tvm.families import Extents, Kernel, KernelFamily, Work, bytes_of, elements
from sparse_tvm.operators import FLOAT32, Product
from sparse_tvm.schedules.cpu.families.extents import known_or_symbols
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.targets import Target

FEW_ROWS = 4
"""Rows of the left operand for which the right one is read where it lies, without panels."""


@dataclass(frozen=True)
class ProductFamily(KernelFamily[Product]):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.batch_matmul`."""

    name: ClassVar[str] = "product"
    operator: ClassVar[type[Product]] = Product

    def refuses(self, op: Product, target: Target) -> str | None:
        if op.types != FLOAT32:
            return f"{self.name} computes float32 only"
        contiguous = op.right[-1] == len(op.right) - 1
        if op.rows is not None and op.rows <= FEW_ROWS and not contiguous:
            return "a few rows times a transposed matrix are dot products, which need no panels"
        return None

    def build(
        self, op: Product, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.batch_matmul import Operand, batch_matmul

        a, b = (
            Operand(known_or_symbols(operand, _names(operand, name)), axes)
            for operand, name, axes in zip(operands, "ab", (op.left, op.right), strict=True)
        )
        out = known_or_symbols(output, _names(output, "y"))
        size = "x".join("?" if dim is None else str(dim) for dim in output.shape)
        return Kernel(f"product_{size}", batch_matmul(a, b, out, Simd.of(target)))

    def work(
        self,
        op: Product,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        depth = operands[0].shape[op.left[-1]] or 0
        return Work(2.0 * elements(output) * depth, bytes_of([*operands, output]))


def _names(operand: Extents, prefix: str) -> list[str]:
    return [f"{prefix}{i}" for i in range(len(operand.shape))]
