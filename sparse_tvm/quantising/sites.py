"""Where a model's layers are: the nodes that multiply by their weights, and images between them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx

from sparse_tvm.frontends.onnx.detach import stored_tensors
from sparse_tvm.frontends.onnx.nodes import attribute_of
from sparse_tvm.frontends.onnx.weights import WeightRef, find_weights
from sparse_tvm.operators import QuantisedConvolution

LAYERS = ("MatMul", "Gemm", "Conv")
"""Operators of layers that may multiply integers."""

_IMAGE_RANK = 4
_ELEMENTWISE = ("Relu", "Clip", "BatchNormalization")
"""What kernels do to each pixel as they compute it, or fold into weights."""


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
        The axis of the features in it, -1 or -2; of images, 1.
    by_inputs : bool
        Whether the node wants its weight ``[K, N]``.
    convolution : QuantisedConvolution | None
        What it would be in int8, over images of any size, if it is a convolution.
    """

    output: str
    ref: WeightRef
    tensor: str
    x: int
    axis: int
    by_inputs: bool
    convolution: QuantisedConvolution | None = None

    @property
    def w(self) -> int:
        """Which operand the weight is."""
        return 1 - self.x


def sites_of(model: onnx.ModelProto) -> list[Site]:
    """All nodes of dense layers, and of convolutions of images, in the model's order."""
    refs = {name: ref for ref in find_weights(model) for name in ref.nodes if ref.op in LAYERS}
    tensors = dict(stored_tensors(model.graph))
    producers = _producers(model)

    def is_weight(name: str, ref: WeightRef) -> bool:
        while name not in tensors and name in producers:
            name = producers[name].input[0] if producers[name].input else ""
        return name == ref.initializer

    found = []
    for node in model.graph.node:
        ref = refs.get(node.name or next(iter(node.output), ""))
        if ref is None or node.op_type not in LAYERS:
            continue
        if node.op_type == "Conv":
            dims = tuple(tensors[ref.initializer].dims)
            if len(dims) == _IMAGE_RANK:
                op = _in_int8(node, ref, dims)
                found.append(Site(node.output[0], ref, node.input[0], 0, 1, False, op))
            continue
        x = 0 if is_weight(node.input[1], ref) else 1
        across = x == 1 or bool(attribute_of(node, "transA", 0))
        by_inputs = x == 0 and not attribute_of(node, "transB", 0)
        axis = -2 if across else -1
        found.append(Site(node.output[0], ref, node.input[x], x, axis, by_inputs))
    return found


def _in_int8(node: onnx.NodeProto, ref: WeightRef, dims: tuple[int, ...]) -> QuantisedConvolution:
    out, of_group, *kernel = dims
    groups = int(attribute_of(node, "group", 1))
    ones = (1,) * len(kernel)
    return QuantisedConvolution(
        layer=ref.layer,
        matrix=ref.shape,
        channels=of_group * groups,
        out_channels=out,
        size=(None,) * len(kernel),
        kernel=tuple(kernel),
        stride=tuple(attribute_of(node, "strides", ones)),
        dilation=tuple(attribute_of(node, "dilations", ones)),
        pads=tuple(attribute_of(node, "pads", ones * 2)),
        groups=groups,
    )


def image_tensors(model: onnx.ModelProto, sites: Collection[Site]) -> set[str]:
    """Name the images that are bytes where convolutions multiply bytes.

    Those that the convolutions read; and where one is the sum of two that convolutions make, those
    two, and so on: the sum is of bytes then.
    """
    producers = _producers(model)
    made = {site.output for site in sites if site.convolution is not None}
    found = {site.tensor for site in sites if site.convolution is not None}

    def origin(name: str) -> onnx.NodeProto | None:
        node = producers.get(name)
        while node is not None and node.op_type in _ELEMENTWISE:
            node = producers.get(node.input[0])
        return node

    def addends(name: str) -> Sequence[str]:
        """What an image is the sum of, if convolutions make all of that."""
        node = origin(name)
        if node is None or node.op_type != "Add":
            return ()
        return node.input if all(map(is_image, node.input)) else ()

    def is_image(name: str) -> bool:
        node = origin(name)
        if name in found or (node is not None and node.output[0] in made):
            return True
        return bool(addends(name))

    waiting = list(found)
    while waiting:
        for name in addends(waiting.pop()):
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def _producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}
