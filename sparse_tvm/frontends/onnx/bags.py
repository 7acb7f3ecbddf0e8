"""Sums of rows of a table, which PyTorch's exporter writes as a loop over the bags of rows.

``nn.EmbeddingBag`` of indices ``[bags, size]`` flattens them, counts where each bag begins, and
slices bag after bag out again. The loop is a gather of ``[bags, size, width]`` and its sum, mean or
maximum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sparse_tvm.frontends.onnx.detach import stored_tensors

_REDUCTIONS = frozenset({"ReduceSum", "ReduceMean", "ReduceMax"})
_SAME_NUMBERS = frozenset({"Cast", "Identity", "Squeeze", "Unsqueeze"})


class _NoBag(Exception):
    """Raised where a loop is another one."""


def sum_bags(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace loops over bags of one size; others are left.

    `model`, whose shapes are inferred, may be changed. What the loops counted with stays, and
    nothing reads it.
    """
    graph = model.graph
    if not any(node.op_type == "Loop" for node in graph.node):
        return model
    values = _Values(graph)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        try:
            nodes += _bag(node, values, graph) if node.op_type == "Loop" else [node]
        except _NoBag:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


class _Values:
    """What makes the values of a graph, and which of them are constants, its own or outer ones."""

    def __init__(self, graph: onnx.GraphProto, outer: _Values | None = None) -> None:
        self.makers = {name: node for node in graph.node for name in node.output}
        self.constants = dict(stored_tensors(graph))
        if outer is not None:
            self.constants |= outer.constants
        self.shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.value_info)
        }
        """Sizes, 0 where they are symbolic."""

    def origin(self, name: str) -> str:
        """Return the value whose numbers these are, in another shape or type."""
        while (node := self.makers.get(name)) is not None and node.op_type in _SAME_NUMBERS:
            name = node.input[0]
        return name

    def made(self, name: str, op: str) -> onnx.NodeProto:
        """Return the node that makes a value."""
        node: onnx.NodeProto | None = self.makers.get(self.origin(name))
        if node is None or node.op_type != op:
            raise _NoBag
        return node

    def numbers(self, name: str) -> list[int] | None:
        """Return the numbers of a constant."""
        tensor = self.constants.get(self.origin(name))
        return None if tensor is None else numpy_helper.to_array(tensor).ravel().tolist()

    def demand(self, name: str, *numbers: int) -> None:
        """Refuse a value that is not these numbers."""
        if self.numbers(name) != list(numbers):
            raise _NoBag


def _bag(loop: onnx.NodeProto, outer: _Values, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return what a loop over bags is, if it is one."""
    body = _body(loop)
    if [len(each) for each in (loop.input, body.input, body.output)] != [2, 2, 2]:
        raise _NoBag
    inner = _Values(body, outer)
    inner.demand(body.output[0].name, True)
    reduce = inner.makers.get(body.output[1].name)
    if reduce is None or reduce.op_type not in _REDUCTIONS or _attribute(reduce, "keepdims", 1):
        raise _NoBag
    axes = _attribute(reduce, "axes", None)
    if axes is None and len(reduce.input) > 1:
        inner.demand(reduce.input[1], 0)
    elif axes != [0]:
        raise _NoBag
    gather = inner.made(reduce.input[0], "Gather")
    own = inner.makers.keys() | dict(stored_tensors(body))
    if gather.input[0] in own or _attribute(gather, "axis", 0) != 0:
        raise _NoBag
    indices = _indices(loop, inner.made(gather.input[1], "Slice"), inner, outer)
    rows, result = f"{loop.output[0]}.rows", onnx.NodeProto()
    result.CopyFrom(reduce)
    result.output[:] = loop.output
    result.input[0] = rows
    if axes is None:
        result.input[1] = f"{loop.output[0]}.axis"
        graph.initializer.append(numpy_helper.from_array(np.array([1]), result.input[1]))
    else:
        next(a for a in result.attribute if a.name == "axes").ints[:] = [1]
    return [helper.make_node("Gather", [gather.input[0], indices], [rows], gather.name), result]


def _indices(loop: onnx.NodeProto, cut: onnx.NodeProto, inner: _Values, outer: _Values) -> str:
    """Return the indices ``[bags, size]`` of which a slice is one bag."""
    inner.demand(cut.input[3], 0)
    begin, end = (inner.made(name, "Gather") for name in cut.input[1:3])
    if {begin.input[1], end.input[1]} != {_body(loop).input[0].name}:
        raise _NoBag
    offsets = outer.made(begin.input[0], "Concat")
    rest = outer.made(end.input[0], "Slice")
    steps = outer.made(loop.input[0], "Gather")
    if not (
        outer.makers.get(rest.input[0]) is offsets
        and outer.made(steps.input[0], "Shape").input[0] == rest.output[0]
    ):
        raise _NoBag
    outer.demand(loop.input[1], True)
    outer.demand(rest.input[1], 1)
    outer.demand(rest.input[2], np.iinfo(np.int64).max)
    flat = outer.made(cut.input[0], "Reshape")
    outer.demand(flat.input[1], -1)
    indices = str(flat.input[0])
    shape = outer.shapes.get(indices, [])
    if outer.numbers(offsets.input[0]) is None:
        _demand_rows(outer.made(offsets.input[0], "Range"), indices, outer)
    elif len(shape) == 2:
        outer.demand(offsets.input[0], *(bag * shape[1] for bag in range(shape[0])))
    else:
        raise _NoBag
    return indices


def _demand_rows(offsets: onnx.NodeProto, indices: str, outer: _Values) -> None:
    """Refuse offsets other than those of the rows of `indices`."""
    start, count, size = offsets.input
    outer.demand(start, 0)
    elements, width = outer.made(count, "ReduceProd"), outer.made(size, "Gather")
    outer.demand(width.input[1], 1)
    for shape in (elements.input[0], width.input[0]):
        if outer.made(shape, "Shape").input[0] != indices:
            raise _NoBag


def _body(loop: onnx.NodeProto) -> onnx.GraphProto:
    body: onnx.GraphProto = next(a.g for a in loop.attribute if a.name == "body")
    return body


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = (helper.get_attribute_value(a) for a in node.attribute if a.name == name)
    return next(found, default)
