"""A graph under way: its values, and their sizes in each run that is to come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

SIZES = ({"b": 2, "n": 7}, {"b": 1, "n": 20}, {"b": 3, "n": 5})
"""Of the symbolic dimensions, in each run of a graph."""
FIXED = (1, 2, 3, 4, 5, 8, 12, 16, 33)
MOST_ELEMENTS = 1 << 16

Dim = tuple[int, ...]
"""A size, in each of the runs: those of a fixed one are equal."""


def fixed(size: int) -> Dim:
    return (size,) * len(SIZES)


ONE = fixed(1)


def plus(*sizes: Dim) -> Dim:
    return tuple(map(sum, zip(*sizes, strict=True)))


def times(*sizes: Dim) -> Dim:
    return tuple(int(np.prod(run)) for run in zip(*sizes, strict=True))


def is_fixed(size: Dim) -> bool:
    return len(set(size)) == 1


@dataclass
class Value:
    """A float tensor of the graph."""

    name: str
    shape: list[Dim]

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass
class Graph:
    """What was drawn so far."""

    draw: Any
    values: list[Value] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def pick(self, *wanted: Any) -> Any:
        return self.draw(st.sampled_from(wanted))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def value(self, accepts: Callable[[Value], bool] = lambda _: True) -> Value:
        """Return one of the values, of the last ones rather than of the first."""
        found = [value for value in self.values if accepts(value)]
        if not found:
            raise NotApplicable
        return found[-1 - self.number(0, min(2, len(found) - 1))]

    def axis(self, value: Value, accepts: Callable[[Dim], bool] = lambda _: True) -> int:
        found = [axis for axis, size in enumerate(value.shape) if accepts(size)]
        if not found:
            raise NotApplicable
        return self.pick(*found)

    def store(self, array: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        scale = 1 / np.sqrt(max(1, shape[-1] if len(shape) > 1 else 1))
        random = np.random.default_rng(self.number(0, 9)).standard_normal(shape) * scale
        return self.store(np.where(random > 0.3, 0, random), np.float32)

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f"v{len(self.nodes)}_{output}" for output in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names[0]

    def add(self, name: str, shape: list[Dim]) -> None:
        if max(times(*shape) if shape else ONE) > MOST_ELEMENTS or len(shape) > 6:
            raise NotApplicable
        self.values.append(Value(name, list(shape)))


class NotApplicable(Exception):
    """Raised where what was drawn has no such node."""
