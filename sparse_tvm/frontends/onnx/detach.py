"""A model without its weights: small enough to check, simplify and import in no time.

ONNX libraries serialise the whole model at every call, which costs gigabytes for a large
model and fails beyond 2 GB. They get a model whose weights have become inputs instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import numpy_helper

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.in_memory import find_array

MIN_WEIGHT_SIZE = 64
"""Float tensors with fewer elements are constants of the program, not weights."""

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


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


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that a node reads, and those that the graphs in it read, their own too."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from names_read(inner)
            yield from (value.name for value in graph.output)


def size_of(tensor: onnx.TensorProto) -> int:
    """Return the number of elements that the tensor's shape says it has."""
    return int(np.prod(tensor.dims, dtype=np.int64))


def is_weight(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor is large enough to stay outside of the program, and of floats."""
    return tensor.data_type in _FLOATS and size_of(tensor) >= MIN_WEIGHT_SIZE


def as_array(tensor: onnx.TensorProto) -> np.ndarray:
    """Return the values, read-only: as in memory, mapped from a file, or copied from the model."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if (array := find_array(tensor)) is not None:
            return array
        where = {entry.key: entry.value for entry in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).newbyteorder("<")
        return np.memmap(where["location"], dtype, "r", int(where["offset"]), tuple(tensor.dims))
    return numpy_helper.to_array(tensor)


def readable_array(tensor: onnx.TensorProto, where: str) -> np.ndarray:
    """Return the values as :func:`as_array` does, of a model that nobody has checked yet.

    Raises
    ------
    ModelError
        When the tensor holds other values than its shape and type say; `where` names the model.
    """
    try:
        return as_array(tensor)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: initializer {tensor.name} cannot be read: {error}") from error


def detach_weights(
    model: onnx.ModelProto, names: Collection[str] | None = None
) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """Return a copy of the model whose weights are inputs, and the weights.

    Parameters
    ----------
    model : onnx.ModelProto
        Left as it is.
    names : Collection[str] | None
        The initializers and Constant outputs to detach; all for which `is_weight` by default.

    Returns
    -------
    tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]
        The copy, whose last inputs are the weights, and the tensors in that order. They are
        still owned by `model`: nothing large was copied.
    """
    weights = {
        name: tensor
        for name, tensor in stored_tensors(model.graph)
        if (is_weight(tensor) if names is None else name in names)
    }
    skeleton = onnx.ModelProto()
    _copy_fields(model, skeleton, except_for=("graph",))
    # Before version 4, initializers had to be inputs too; few models kept to that.
    skeleton.ir_version = max(model.ir_version, 4)
    graph = skeleton.graph
    _copy_fields(model.graph, graph, except_for=("node", "initializer", "input"))
    graph.node.extend(
        n for n in model.graph.node if n.op_type != "Constant" or n.output[0] not in weights
    )
    graph.initializer.extend(
        _in_memory(t) for t in model.graph.initializer if t.name not in weights
    )
    graph.input.extend(model_inputs(model))
    graph.input.extend(
        onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
        for name, tensor in weights.items()
    )
    return skeleton, weights


def attach_weights(
    skeleton: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto]
) -> onnx.ModelProto:
    """Undo `detach_weights`, in place; tensors that were Constant nodes become initializers."""
    inputs = [value for value in skeleton.graph.input if value.name not in weights]
    del skeleton.graph.input[:]
    skeleton.graph.input.extend(inputs)
    for name, tensor in weights.items():
        initializer = skeleton.graph.initializer.add()
        initializer.CopyFrom(tensor)
        initializer.name = name
    return skeleton


def _in_memory(tensor: onnx.TensorProto) -> onnx.TensorProto:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor
    return numpy_helper.from_array(as_array(tensor), tensor.name)


def model_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs that a caller gives: old models list their initializers as inputs too."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initializers]


def _copy_fields(source: Message, target: Message, except_for: Collection[str]) -> None:
    for field, value in source.ListFields():
        if field.name in except_for:
            continue
        if isinstance(value, Message):
            getattr(target, field.name).CopyFrom(value)
        elif hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        else:
            setattr(target, field.name, value)
