"""Where a model's dense layers are: the nodes that multiply by their weights."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from sparse_tvm.frontends.onnx.detach import stored_tensors
from sparse_tvm.frontends.onnx.nodes import attribute_of
from sparse_tvm.frontends.onnx.weights import WeightRef, find_weights

_DENSE = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Site:
    """A node that multiplies by a layer's weight.

    Attributes
    ----------
    output : str
        The node's.
    ref : WeightRef
        The weight.
    tensor : str
        What it is multiplied by.
    x : int
        Which of the node's two operands that is.
    axis : int
        The axis of the features in it, -1 or -2.
    by_inputs : bool
        Whether the node wants its weight ``[K, N]``.
    """

    output: str
    ref: WeightRef
    tensor: str
    x: int
    axis: int
    by_inputs: bool

    @property
    def w(self) -> int:
        """Which operand the weight is."""
        return 1 - self.x


def dense_sites(model: onnx.ModelProto) -> list[Site]:
    """All nodes of dense layers, in the model's order."""
    refs = {name: ref for ref in find_weights(model) for name in ref.nodes if ref.op in _DENSE}
    stored = {name for name, _ in stored_tensors(model.graph)}
    producers = {name: node for node in model.graph.node for name in node.output}

    def is_weight(name: str, ref: WeightRef) -> bool:
        while name not in stored and name in producers:
            name = producers[name].input[0] if producers[name].input else ""
        return name == ref.initializer

    found = []
    for node in model.graph.node:
        ref = refs.get(node.name or next(iter(node.output), ""))
        if ref is None or node.op_type not in _DENSE:
            continue
        x = 0 if is_weight(node.input[1], ref) else 1
        across = x == 1 or bool(attribute_of(node, "transA", 0))
        by_inputs = x == 0 and not attribute_of(node, "transB", 0)
        axis = -2 if across else -1
        found.append(Site(node.output[0], ref, node.input[x], x, axis, by_inputs))
    return found
