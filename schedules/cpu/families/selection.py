"""Results as long as the data wants them, with :mod:`sparse_tvm.schedules.cpu.selection`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sparse_tvm.families import Extents, Kernel
from sparse_tvm.operators import (
    HoldSize,
    LargestElements,
    SelectNonzero,
    SuppressBoxes,
    UniqueRows,
)
from sparse_tvm.schedules.cpu.families.extents import known_or_symbols
from sparse_tvm.schedules.cpu.families.rows import MovesOnly
from sparse_tvm.targets import Target


def _sizes(operand: Extents) -> list[Any]:
    return known_or_symbols(operand, [f"size_{axis}" for axis in range(len(operand.shape))])


@dataclass(frozen=True)
class SelectNonzeroFamily(MovesOnly[SelectNonzero]):
    """Positions of what is not zero."""

    name: ClassVar[str] = "select_nonzero"
    operator: ClassVar[type[SelectNonzero]] = SelectNonzero

    def build(
        self, op: SelectNonzero, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.selection import select_nonzero

        [x] = operands
        return Kernel(self.name, select_nonzero(_sizes(x), x.dtype))


@dataclass(frozen=True)
class HoldSizeFamily(MovesOnly[HoldSize]):
    """A size, or an error."""

    name: ClassVar[str] = "hold_size"
    operator: ClassVar[type[HoldSize]] = HoldSize

    def build(
        self, op: HoldSize, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.selection import hold_size

        return Kernel(self.name, hold_size(op.least, op.reader))


@dataclass(frozen=True)
class SuppressBoxesFamily(MovesOnly[SuppressBoxes]):
    """Non-maximum suppression."""

    name: ClassVar[str] = "suppress_boxes"
    operator: ClassVar[type[SuppressBoxes]] = SuppressBoxes

    def build(
        self, op: SuppressBoxes, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.selection import suppress_boxes

        batch, classes, boxes = known_or_symbols(operands[1], ("batch", "classes", "boxes"))
        return Kernel(
            self.name, suppress_boxes(batch, classes, boxes, op.most or boxes, op.centred)
        )


@dataclass(frozen=True)
class UniqueRowsFamily(MovesOnly[UniqueRows]):
    """Different rows, by sorting."""

    name: ClassVar[str] = "unique_rows"
    operator: ClassVar[type[UniqueRows]] = UniqueRows

    def build(
        self, op: UniqueRows, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.selection import unique_rows

        [x] = operands
        rows, size = _sizes(x)
        return Kernel(self.name, unique_rows(rows, size, x.dtype, op.ascending))


@dataclass(frozen=True)
class LargestElementsFamily(MovesOnly[LargestElements]):
    """The first of a sorted axis, with :mod:`sparse_tvm.schedules.cpu.top_k`."""

    name: ClassVar[str] = "largest_elements"
    operator: ClassVar[type[LargestElements]] = LargestElements

    def build(
        self, op: LargestElements, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.lane_tiles import symbol
        from sparse_tvm.schedules.cpu.top_k import top_k

        [x] = operands
        count = output.shape[op.axis]
        wanted = symbol("count") if count is None else count
        return Kernel(self.name, top_k(_sizes(x), op.axis, wanted, op.largest, x.dtype, "int64"))
