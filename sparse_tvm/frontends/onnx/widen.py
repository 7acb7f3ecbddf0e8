"""Models of 16-bit floats: the same graph in float32, with the values that the weights have.

No target computes everything in 16 bits, and sums are wanted in float32 anyway. What a model rounds
to 16 bits on its way is not rounded here. float16 inputs and outputs stay float16; bfloat16 ones
become float32, as NumPy has no bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from sparse_tvm.frontends.onnx.detach import readable_array, stored_tensors

HALF_TYPES = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
"""The types of 16 bits, by what they are called."""

WIDENED = "sparse_tvm.widened"
"""Key of the model's metadata that names the types that were widened."""

_NAMES_A_TYPE = {
    "dtype",
    "output_datatype",
    "output_dtype",
    "softmax_precision",
    "stash_type",
    "to",
}
"""Attributes whose integer is an element type."""


def half_types(model: onnx.ModelProto) -> list[str]:
    """Name the types of 16 bits that a model has in its weights, inputs and operators."""
    found = {tensor.data_type for graph in _graphs(model.graph) for tensor in _tensors(graph)}
    for graph in _graphs(model.graph):
        found |= {value.type.tensor_type.elem_type for value in _values(graph)}
        found |= {a.i for node in graph.node for a in node.attribute if a.name in _NAMES_A_TYPE}
    return [name for type_, name in HALF_TYPES.items() if type_ in found]


def widened_types(model: onnx.ModelProto) -> list[str]:
    """Name the types that `widen` has replaced."""
    listed = next((p.value for p in model.metadata_props if p.key == WIDENED), "")
    return listed.split()


def widen(model: onnx.ModelProto, where: str = "the model") -> onnx.ModelProto:
    """Return a model of 16-bit floats as one of float32; any other as it is.

    A model in memory is never changed. The values of the weights are the same.

    Raises
    ------
    ModelError
        When a weight of 16 bits cannot be read; `where` names the model.
    """
    types = half_types(model)
    if not types:
        return model
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    wide.metadata_props.add(key=WIDENED, value=" ".join(types))
    ends = _half_ends(wide.graph)
    for graph in _graphs(wide.graph):
        for tensor in _tensors(graph):
            _widen_tensor(tensor, where)
        for value in _values(graph):
            if value.type.tensor_type.elem_type in HALF_TYPES:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in _NAMES_A_TYPE and attribute.i in HALF_TYPES:
                    attribute.i = TensorProto.FLOAT
    _cast_ends(wide.graph, *ends)
    return wide


def _half_ends(graph: onnx.GraphProto) -> tuple[list[str], list[str]]:
    """Return the names of the inputs and of the outputs that are float16."""
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [v.name for v in graph.input if _is_float16(v) and v.name not in stored]
    return inputs, [v.name for v in graph.output if _is_float16(v) and v.name not in inputs]


def _is_float16(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == TensorProto.FLOAT16


def _cast_ends(graph: onnx.GraphProto, inputs: list[str], outputs: list[str]) -> None:
    """Convert where float16 comes in and goes out; inside, everything has another name."""
    taken = {name for each in _graphs(graph) for node in each.node for name in node.output}
    taken |= {value.name for value in graph.input} | {t.name for t in graph.initializer}
    names: dict[str, str] = {}
    for end in (*inputs, *outputs):
        name = f"{end}.float32"
        while name in taken:
            name += "_"
        taken.add(name)
        names[end] = name
    for value in (*graph.input, *graph.output):
        if value.name in names:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for each in _graphs(graph):
        for node in each.node:
            for listed in (node.input, node.output):
                for position, name in enumerate(listed):
                    listed[position] = names.get(name, name)
        inner = each.output if each is not graph else ()
        for renamed in (*inner, *each.initializer, *each.value_info):
            renamed.name = names.get(renamed.name, renamed.name)
    nodes = [_cast(end, names[end], TensorProto.FLOAT) for end in inputs]
    nodes += graph.node
    nodes += [_cast(names[end], end, TensorProto.FLOAT16) for end in outputs]
    del graph.node[:]
    graph.node.extend(nodes)


def _cast(source: str, target: str, type_: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], f"{target}/Cast", to=type_)


def _widen_tensor(tensor: TensorProto, where: str) -> None:
    if tensor.data_type not in HALF_TYPES:
        return
    values = np.asarray(readable_array(tensor, where), np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and all that its nodes hold."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterable[TensorProto]:
    """Yield initializers, constants, and values of attributes."""
    yield from (tensor for _, tensor in stored_tensors(graph))
    for node in graph.node:
        if node.op_type != "Constant":
            yield from (a.t for a in node.attribute if a.type == AttributeProto.TENSOR)


def _values(graph: onnx.GraphProto) -> Iterable[onnx.ValueInfoProto]:
    return (*graph.input, *graph.output, *graph.value_info)
