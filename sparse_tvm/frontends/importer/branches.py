"""``If``: the branch that is taken, where that is known; both, and a choice, where it is not."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from sparse_tvm.frontends.onnx.rewrite import constants_to_initializers


def branch(node: onnx.NodeProto, taken: bool) -> onnx.GraphProto:
    """Return a copy of a branch, to be put in the node's place.

    What it computes has names of its own: both branches may use the same.
    """
    wanted = "then_branch" if taken else "else_branch"
    graph = onnx.GraphProto()
    graph.CopyFrom(next(a.g for a in node.attribute if a.name == wanted))
    constants_to_initializers(graph)
    names = {name: f"{node.output[0]}.{wanted}.{name}" for name in _defined(graph)}
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    _rename(graph, names)
    return graph


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                inner = _defined(attribute.g)
                _rename(attribute.g, {k: v for k, v in names.items() if k not in inner})
    for value in graph.output:
        value.name = names.get(value.name, value.name)


def _defined(graph: onnx.GraphProto) -> set[str]:
    stored = {tensor.name for tensor in graph.initializer}
    return stored | {name for node in graph.node for name in node.output if name}
