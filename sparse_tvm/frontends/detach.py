"""A model without its weights: small enough to check, simplify and import in no time.

ONNX libraries serialise the whole model at every call, which costs gigabytes for a large
model and fails beyond 2 GB. They get a model whose weights have become inputs instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import numpy_helper

MIN_WEIGHT_SIZE = 64
"""Float tensors with fewer elements are constants of the program, not weights."""


def stored_tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield the name and tensor of all initializers and ``Constant`` nodes."""
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        tensor_attribute = constant_tensor(node)
        if tensor_attribute is not None:
            yield node.output[0], tensor_attribute


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the tensor that a ``Constant`` node holds, if it is one and does."""
    if node.op_type != "Constant":
        return None
    return next((a.t for a in node.attribute if a.name == "value"), None)


def size_of(tensor: onnx.TensorProto) -> int:
    """Return the number of elements that the tensor's shape says it has."""
    return int(np.prod(tensor.dims, dtype=np.int64))


def is_weight(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor stays outside of the program: float32, at least 64 elements."""
    return tensor.data_type == onnx.TensorProto.FLOAT and size_of(tensor) >= MIN_WEIGHT_SIZE


def as_array(tensor: onnx.TensorProto) -> np.ndarray:
    """Return the tensor's values, with at most one copy (read-only then)."""
    return numpy_helper.to_array(tensor)


def detach_weights(
    model: onnx.ModelProto, keep: Collection[str] = ()
) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """Return a copy of the model whose weights are inputs, and the weights.

    Parameters
    ----------
    model : onnx.ModelProto
        Left as it is.
    keep : Collection[str]
        Names of weights that stay initializers of the copy.

    Returns
    -------
    tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]
        The copy, whose last inputs are the weights, and the tensors in that order. They are
        still owned by `model`: nothing large was copied.
    """
    weights = {
        name: tensor
        for name, tensor in stored_tensors(model.graph)
        if is_weight(tensor) and name not in keep
    }
    skeleton = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _assign(skeleton, field.name, value)
    graph = skeleton.graph
    for field, value in model.graph.ListFields():
        if field.name not in ("node", "initializer", "input"):
            _assign(graph, field.name, value)
    for node in model.graph.node:
        if constant_tensor(node) is None or node.output[0] not in weights:
            graph.node.add().CopyFrom(node)
    for tensor in model.graph.initializer:
        if tensor.name not in weights:
            graph.initializer.add().CopyFrom(tensor)
    initializers = {tensor.name for tensor in model.graph.initializer}
    graph.input.extend(i for i in model.graph.input if i.name not in initializers)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
        for name, tensor in weights.items()
    )
    return skeleton, weights


def _assign(message: onnx.ModelProto | onnx.GraphProto, name: str, value: object) -> None:
    """Copy one protobuf field, whatever its kind."""
    target = getattr(message, name)
    if hasattr(target, "extend"):
        target.extend(value)
    elif hasattr(target, "CopyFrom"):
        target.CopyFrom(value)
    else:
        setattr(message, name, value)
