"""Graphs within nodes: copies of them, to be put in the node's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from tvm import te, tirx

from sparse_tvm.frontends.importer.sizes import Size
from sparse_tvm.frontends.onnx.rewrite import constants_to_initializers


def branch(node: onnx.NodeProto, taken: bool) -> onnx.GraphProto:
    """Return a copy of a branch of ``If``."""
    wanted = "then_branch" if taken else "else_branch"
    return copied(node, wanted, wanted)


def one_of(sizes: Sequence[Size], which: te.Tensor, yes: te.Tensor, no: te.Tensor) -> te.Tensor:
    """Copy one of two tensors, which has these sizes."""

    def element(*at: Any) -> Any:
        return tirx.if_then_else(which(), yes(*at), no(*at))

    return te.compute(tuple(sizes), element, name="one_of", tag="injective")


def copied(node: onnx.NodeProto, attribute: str, name: str) -> onnx.GraphProto:
    """Return a copy of a node's graph, called by `name`.

    What it takes and computes has names of its own: other copies use the same.
    """
    first = next(output for output in node.output if output)
    graph = onnx.GraphProto()
    graph.CopyFrom(next(a.g for a in node.attribute if a.name == attribute))
    constants_to_initializers(graph)
    taken = {value.name for value in graph.input}
    names = {own: f"{first}.{name}.{own}" for own in _defined(graph) | taken}
    for tensor in (*graph.initializer, *graph.input):
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
