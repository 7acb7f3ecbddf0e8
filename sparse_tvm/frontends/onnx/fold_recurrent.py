"""Compute the weights of recurrent operators that a model makes of its parameters at each run.

Exporters put a framework's parameters, by gate and direction, into ONNX's order by slices and
concatenations. Left in the graph, they would keep the weights from being layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.detach import as_array, names_read, stored_tensors
from sparse_tvm.frontends.onnx.weights import RECURRENT

_WEIGHTS = slice(1, 4)  # W, R and B among the inputs

_MOVES = frozenset(
    {
        *("Concat", "Constant", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze"),
        *("Transpose", "Unsqueeze"),
    }
)
"""What may stand between parameters and weights: nothing that takes or changes much."""


def fold_recurrent(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Return the model with such weights stored, each under the name of its first parameter.

    `model` is left as it is, and returned where there is nothing to compute.

    Raises
    ------
    ModelError
        When a weight cannot be computed; `where` names the model.
    """
    made = _made_of_parameters(model.graph)
    if not made:
        return model
    tensors = dict(stored_tensors(model.graph))
    try:
        values = {name: _computed(model, nodes, name, tensors) for name, nodes in made.items()}
    except Exception as error:  # whatever ONNX's reference raises at an invalid node
        raise ModelError(f"{where}: weight {next(iter(made))} cannot be computed: {error}") from (
            error
        )
    named = {name: next(_parameters(nodes, tensors), name) for name, nodes in made.items()}
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    for node in folded.graph.node:
        if node.op_type in RECURRENT:
            node.input[_WEIGHTS] = [
                f"{name}.folded" if name in made else name for name in node.input[_WEIGHTS]
            ]
    _drop_unread(folded.graph)
    taken = {tensor.name for tensor in folded.graph.initializer}
    for name, value in values.items():
        stored = name if named[name] in taken else named[name]
        taken.add(stored)
        folded.graph.initializer.append(numpy_helper.from_array(value, stored))
        for node in folded.graph.node:
            node.input[:] = [stored if i == f"{name}.folded" else i for i in node.input]
    return folded


def _made_of_parameters(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Return which weights follow from what is stored, and the nodes that make them, in order."""
    wanted = {
        name
        for node in graph.node
        if node.op_type in RECURRENT
        for name in node.input[_WEIGHTS]
        if name
    }
    if not wanted:
        return {}
    stored = {name for name, _ in stored_tensors(graph)}
    makers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        if node.op_type not in _MOVES:
            continue
        names = [name for name in node.input if name]
        if all(name in stored or name in makers for name in names) and not _is_stored(node, stored):
            before = [one for name in names for one in makers.get(name, [])]
            unique = {id(one): one for one in (*before, node)}
            for name in node.output:
                makers[name] = list(unique.values())
    return {name: makers[name] for name in sorted(wanted & makers.keys())}


def _is_stored(node: onnx.NodeProto, stored: set[str]) -> bool:
    return node.op_type == "Constant" and node.output[0] in stored


def _parameters(
    nodes: list[onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto]
) -> Iterator[str]:
    """Yield the names of the parameters that nodes read, which are of floats."""
    for name in (name for node in nodes for name in node.input):
        if name in tensors and tensors[name].data_type == onnx.TensorProto.FLOAT:
            yield name


def _computed(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    name: str,
    tensors: Mapping[str, onnx.TensorProto],
) -> np.ndarray:
    read = {i: tensors[i] for node in nodes for i in node.input if i in tensors}
    graph = onnx.helper.make_graph(
        nodes,
        "weights",
        [onnx.helper.make_tensor_value_info(i, t.data_type, t.dims) for i, t in read.items()],
        [onnx.ValueInfoProto(name=name)],
    )
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import)
    (value,) = ReferenceEvaluator(part).run(None, {i: as_array(t) for i, t in read.items()})
    return np.ascontiguousarray(value)


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes, and then tensors, that nothing reads."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(name in read for name in node.output):
            kept.append(node)
            read.update(names_read(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(tensors)
