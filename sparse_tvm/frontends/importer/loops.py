"""``Loop`` and ``Scan``, where how often they run is known: once more for each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import onnx

from sparse_tvm.frontends.importer import sequences
from sparse_tvm.frontends.importer.branches import copied
from sparse_tvm.frontends.importer.forms import Form
from sparse_tvm.frontends.importer.known import Known

MOST_NODES = 4096
"""Nodes that a loop may become."""


_UNKNOWN = "depends on data, or on sizes of inputs, which --input-shape fixes"


class Graph(sequences.Graph, Protocol):
    """The function that is being built."""

    def carried(self, name: str) -> Form:
        """Return a value of the graph."""

    def define(self, name: str, value: Form) -> None:
        """Give a value a name."""

    def import_graph(self, graph: onnx.GraphProto) -> list[str]:
        """Import the nodes of a graph within a node, and return the names of its outputs."""


def unroll(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    """Import a loop's nodes for each time that they run.

    Raises
    ------
    ValueError
        When how often that is depends on data, or is too often.
    """
    (_unroll_loop if node.op_type == "Loop" else _unroll_scan)(node, attributes, graph)


def _unroll_loop(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    times, go_on, *states = node.input
    most = _integer(graph, times) if times else None
    if go_on and _integer(graph, go_on) is None:
        raise ValueError(f"whether it runs at all {_UNKNOWN}")
    if most is None and times:
        raise ValueError(f"how often it runs {_UNKNOWN}")
    count, running, parts = 0, not go_on or bool(_integer(graph, go_on)), _Parts(node, len(states))
    while running and (most is None or count < most):
        body = copied(node, "body", str(count))
        _limit(body, most if most is not None else count)
        index, condition, *taken = (value.name for value in body.input)
        graph.define(index, Known.of(np.array(count)))
        graph.define(condition, Known.of(np.array(True)))
        _hand_over(graph, taken, states)
        on, *results = graph.import_graph(body)
        again = _integer(graph, on)
        if again is None:
            raise ValueError("when it ends depends on data")
        states, running, count = results[: len(states)], bool(again), count + 1
        parts.add(results[len(states) :])
    _hand_over(graph, node.output[: len(states)], states)
    parts.define(graph, [0] * parts.count)


def _unroll_scan(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    scanned = attributes["num_scan_inputs"]
    states, inputs = list(node.input[:-scanned]), node.input[-scanned:]
    values = [graph.carried(name) for name in inputs]
    axes = attributes.get("scan_input_axes") or [0] * scanned
    axes = [axis % len(v.sizes_of_axes) for axis, v in zip(axes, values, strict=True)]
    backwards = attributes.get("scan_input_directions") or [0] * scanned
    count = values[0].sizes_of_axes[axes[0]]
    if not isinstance(count, int):
        raise ValueError(
            "how often it runs depends on the sizes of inputs: --input-shape fixes them"
        )
    parts = _Parts(node, len(states))
    for step in range(count):
        body = copied(node, "body", str(step))
        _limit(body, count)
        taken = [value.name for value in body.input]
        _hand_over(graph, taken[: len(states)], states)
        each = zip(taken[len(states) :], values, axes, backwards, strict=True)
        for name, value, axis, back in each:
            at = count - 1 - step if back else step
            graph.define(name, value.slice({axis: (at, at + 1, 1)}).squeeze([axis]))
        results = graph.import_graph(body)
        states = results[: len(states)]
        parts.add(results[len(states) :])
    _hand_over(graph, node.output[: len(states)], states)
    back = attributes.get("scan_output_directions") or [0] * parts.count
    parts.define(graph, attributes.get("scan_output_axes") or [0] * parts.count, back)


class _Parts:
    """What each run adds to a loop's other outputs."""

    def __init__(self, node: onnx.NodeProto, states: int) -> None:
        self.names = node.output[states:]
        self.count = len(self.names)
        self.rows: list[list[str]] = []

    def add(self, names: list[str]) -> None:
        """Take the results of a run."""
        self.rows.append(names)

    def define(self, graph: Graph, axes: Sequence[int], backwards: Sequence[int] = ()) -> None:
        """Stack them."""
        for place, name in enumerate(self.names):
            if not name:
                continue
            if not self.rows:
                raise ValueError("it never runs")
            values = [row[place] for row in self.rows]
            if any(backwards[place : place + 1]):
                values.reverse()
            sequences.join(graph, values, name, axes[place], new=True)


def _hand_over(graph: Graph, names: Sequence[str], values: Sequence[str]) -> None:
    for name, value in zip(names, values, strict=True):
        if name:
            graph.alias(name, value)


def _integer(graph: Graph, name: str) -> int | None:
    """A value's only element, if it is a number that is known."""
    known = graph.known.get(name)
    if known is None or not known.is_constant:
        return None
    return int(known.constant().item())


def _limit(body: onnx.GraphProto, count: int) -> None:
    if count * len(body.node) > MOST_NODES:
        raise ValueError(f"it becomes {count} times {len(body.node)} nodes: too many")
