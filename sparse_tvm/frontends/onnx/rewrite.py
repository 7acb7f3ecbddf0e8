"""Spell an ONNX graph, of any opset, with the operators and attributes that TVM imports best."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import cast

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx.version_converter

from sparse_tvm.frontends.onnx.detach import stored_tensors

_OLDEST_IMPORTED = 11  # operators before that are converted, or refused


def modernise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Infer shapes, and spell old Softmax and its like as opset 13 does, where that is possible."""
    model = onnx.shape_inference.infer_shapes(model)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < 13:
        try:
            model = onnx.version_converter.convert_version(model, 13)
        except RuntimeError:
            if opset < _OLDEST_IMPORTED:
                raise
            # Not all operators can be converted; the old ones are imported too.
    return onnx.shape_inference.infer_shapes(model)


def expand(model: onnx.ModelProto, ops: Collection[str]) -> onnx.ModelProto:
    """Replace operators by their definitions in the standard, which may hold some of them again.

    `model` may be changed.
    """
    while found := [n for n in all_nodes(model.graph) if n.domain == "" and n.op_type in ops]:
        for node in found:
            _write_defaults(node)
        # The definitions depend on types, which inlining looks up in value_info alone.
        model.graph.value_info.extend(
            onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            for name, tensor in stored_tensors(model.graph)
        )
        inlined = onnx.inliner.inline_selected_functions(
            model, sorted({("", node.op_type) for node in found}), inline_schema_functions=True
        )
        del inlined.graph.value_info[:]
        model = onnx.shape_inference.infer_shapes(inlined)
    return model


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph, and of the graphs within them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


def _write_defaults(node: onnx.NodeProto) -> None:
    """Spell out attributes that were left out: inlining a definition loses their defaults."""
    given = {attribute.name for attribute in node.attribute}
    for name, attribute in onnx.defs.get_schema(node.op_type).attributes.items():
        if name not in given and attribute.default_value.name:
            node.attribute.add().CopyFrom(attribute.default_value)


def constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Replace ``Constant`` nodes: TVM knows only one of the ways they store their value."""
    nodes = []
    for node in graph.node:
        tensor = _constant(node)
        if tensor is None:
            nodes.append(node)
        else:
            initializer = graph.initializer.add()
            initializer.CopyFrom(tensor)
            initializer.name = node.output[0]
    del graph.node[:]
    graph.node.extend(nodes)


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    if node.op_type != "Constant":
        return None
    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return cast(onnx.TensorProto, value)
    dtypes = {"value_float": np.float32, "value_int": np.int64}
    dtype = dtypes.get(attribute.name.removesuffix("s"))
    return None if dtype is None else onnx.numpy_helper.from_array(np.array(value, dtype))
