"""Which values a model's integer inputs may have: those that its tables have rows for.

And which they are meant to have: those that they are compared with, as one-hot encodings do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import onnx
from onnx import numpy_helper

from sparse_tvm.frontends.importer.graph import Importer

_SAME_VALUES = frozenset(
    {
        *("Cast", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"),
        *("Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
_MOVES_FIRST_INPUT = _SAME_VALUES - {"Concat"}

Range = tuple[int, int]
"""The smallest value, and one more than the largest."""


def input_ranges(importer: Importer) -> dict[str, Range]:
    """Find the values that integer inputs may have, by the tables that they index, and by the
    branches that were imported.

    Parameters
    ----------
    importer : Importer
        What imported the graph. Where positions are counted from a mask, as RoBERTa's are, a
        symbolic dimension is bounded by the table of positions.

    Returns
    -------
    dict[str, tuple[int, int]]
        By input; those that are no indices are left out.
    """
    return _Search(importer).ranges()


def typical_ranges(importer: Importer) -> dict[str, Range]:
    """Find the values that integer inputs are meant to have, but need not.

    Parameters
    ----------
    importer : Importer
        What imported the graph.

    Returns
    -------
    dict[str, tuple[int, int]]
        By input; those that are compared with no row of numbers are left out.
    """
    return _Comparisons(importer).ranges()


class _Search:
    """Carries what outputs may be back to what inputs may be."""

    def __init__(self, importer: Importer) -> None:
        self.importer = importer
        nodes = importer.graph.node
        self.producers = {output: node for node in nodes for output in node.output}
        self.found: dict[str, Range] = {}

    def ranges(self) -> dict[str, Range]:
        """Return what is found of the graph's inputs."""
        graph = self.importer.graph
        self.found |= {name: (n, n + 1) for name, n in self.importer.only_values.items()}
        for node in reversed(graph.node):
            self.demand(node)
            for output in node.output:
                if output in self.found:
                    self.carry(node, *self.found[output])
        names = [value.name for value in graph.input]
        return {name: self.found[name] for name in names if name in self.found}

    def demand(self, node: onnx.NodeProto) -> None:
        """Narrow a node's inputs by what it indexes."""
        if node.op_type in ("Gather", "GatherElements"):
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            rows = self.importer.shape(node.input[0])[axis]
            if isinstance(rows, int):
                self.narrow(node.input[1], 0, rows)
        if node.op_type in ("LSTM", "GRU", "RNN") and node.input[4:5] not in ([], [""]):
            steps = self.importer.shape(node.input[0])[self.step_axis(node)]
            if isinstance(steps, int):
                self.narrow(node.input[4], 1, steps + 1)

    def step_axis(self, node: onnx.NodeProto) -> int:
        """Which axis of its input a recurrent operator steps along."""
        return next((a.i for a in node.attribute if a.name == "layout"), 0)

    def narrow(self, name: str, low: int, high: int) -> None:
        """Demand ``low <= value < high`` of a tensor's elements."""
        if name in self.importer.known or name in self.importer.index_expressions:
            return
        known_low, known_high = self.found.get(name, (low, high))
        low, high = max(low, known_low), min(high, known_high)
        if low < high:
            self.found[name] = low, high

    def carry(self, node: onnx.NodeProto, low: int, high: int) -> None:
        """Demand of a node's inputs what makes its outputs lie between `low` and `high`."""
        if node.op_type in _MOVES_FIRST_INPUT:
            self.narrow(node.input[0], low, high)
        elif node.op_type in ("Concat", "Max", "Min", "Clip"):
            for name in node.input:
                self.narrow(name, low, high)
        elif node.op_type == "Where":
            for name in node.input[1:]:
                self.narrow(name, low, high)
        elif node.op_type in _ARITHMETIC:
            self.carry_arithmetic(node, low, high)
        elif node.op_type == "CumSum" and self.is_zero_or_one(node.input[0]):
            axis = self.importer.known[node.input[1]].sizes()[0]
            self.importer.sizes.limit(self.importer.shape(node.input[0])[axis], high - 1)

    def carry_arithmetic(self, node: onnx.NodeProto, low: int, high: int) -> None:
        left, right = node.input
        undo = _ARITHMETIC[node.op_type]
        if (number := self.number(right)) is not None:
            self.narrow(left, *undo(number, low, high))
        elif (number := self.number(left)) is not None and node.op_type != "Sub":
            self.narrow(right, *undo(number, low, high))
        elif node.op_type == "Mul":
            for kept, factor in ((left, right), (right, left)):
                if self.is_zero_or_one(factor):
                    self.narrow(kept, low, high)

    def number(self, name: str) -> int | None:
        """Return the integer that a tensor is."""
        known = self.importer.known.get(name)
        if known is None or known.elements.size != 1:
            return None
        value = known.elements.item()
        return value if isinstance(value, int) else None

    def is_zero_or_one(self, name: str) -> bool:
        """Whether a tensor was a bool, or is a mask that the model takes."""
        node = self.producers.get(name)
        while node is not None and node.op_type == "Cast":
            name = node.input[0]
            node = self.producers.get(name)
        is_mask = node is None and "mask" in name.lower()
        return is_mask or self.importer.dtype(name) == "bool"


class _Comparisons(_Search):
    """Finds what is compared with a row of numbers, and what of that inputs are meant to be."""

    def demand(self, node: onnx.NodeProto) -> None:
        """Narrow what a one-hot encoding tells apart."""
        if node.op_type == "OneHot" and (depth := self.number(node.input[1])) is not None:
            self.narrow(node.input[0], 0, depth)
        elif node.op_type == "Equal":
            for name, other in (node.input, reversed(node.input)):
                if other in self.constants and (row := self.row(other)) is not None:
                    self.narrow(name, *row)

    def carry(self, node: onnx.NodeProto, low: int, high: int) -> None:
        """As for indices, but sums limit no sizes."""
        if node.op_type != "CumSum":
            super().carry(node, low, high)

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        """The constants of the graph."""
        return {tensor.name: tensor for tensor in self.importer.graph.initializer}

    def row(self, name: str) -> Range | None:
        """Return the range of a constant's integers, if they differ."""
        numbers = numpy_helper.to_array(self.constants[name])
        if not np.issubdtype(numbers.dtype, np.integer) or numbers.size < 2:
            return None
        low, high = int(numbers.min()), int(numbers.max())
        return (low, high + 1) if low < high else None


_ARITHMETIC: Mapping[str, Callable[[int, int, int], Range]] = {
    "Add": lambda number, low, high: (low - number, high - number),
    "Sub": lambda number, low, high: (low + number, high + number),
    "Mul": lambda number, low, high: (
        (-(-low // number), -(-high // number)) if number > 0 else (low, high)
    ),
}
