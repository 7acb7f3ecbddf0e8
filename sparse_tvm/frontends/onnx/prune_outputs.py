"""Leave outputs out of a graph, with all that only they need."""

from __future__ import annotations

from collections.abc import Iterable

import onnx


def drop_outputs_of(graph: onnx.GraphProto, tensors: Iterable[str]) -> list[str]:
    """Remove the outputs that are computed from certain tensors, and return their names."""
    reached = set(tensors)
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
    dropped = [value for value in graph.output if value.name in reached]
    for value in dropped:
        graph.output.remove(value)
    if dropped:
        drop_unread(graph)
    return [value.name for value in dropped]


def drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output needs."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
