"""Compute once what a model computes of its weights alone.

Such as the projected relative positions of DeBERTa and the standardised weights of NFNet, which
exporters leave in the graph. What results is a weight like others: a layer's, if it multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, prod

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from sparse_tvm.frontends.onnx.detach import as_array, constant_tensor, is_weight, names_read

_MOST_GROWTH, _SMALL_BYTES = 2, 4 << 20
"""How many times as large as what it is computed of a result may be, if it is not small."""

_LEFT = {
    *("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"),  # multiplied as they are
    *("If", "Loop", "Scan"),  # the importer's
    *("Bernoulli", "Dropout", "Multinomial", "RandomNormalLike", "RandomUniformLike"),
}

_FORMS = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""What gives a weight another form only: layers find theirs behind these."""


def fold_weights(skeleton: onnx.ModelProto, weights: dict[str, onnx.TensorProto]) -> None:
    """Replace what is computed of weights alone by its values, in place.

    Parameters
    ----------
    skeleton : onnx.ModelProto
        A model without its weights, which are its last inputs. Results become inputs behind them.
    weights : dict[str, onnx.TensorProto]
        The weights; the results are added. What nothing reads any more stays, and so does all
        that ONNX Runtime cannot compute.
    """
    graph = skeleton.graph
    nodes = _of_weights(graph, weights)
    if all(node.op_type in _FORMS for node in nodes):
        return
    program = _program(skeleton, nodes, weights)
    folded = _folded(program)
    kept = [node for node in graph.node if not folded & {*node.output}]
    read = {name for node in kept for name in names_read(node)}
    if not (results := sorted(folded & read)):
        return
    try:
        values = _evaluate(program, results, weights)
    except MemoryError:
        raise
    except Exception:  # its exceptions have no base of their own
        return  # an opset or a type that it lacks: computed at every run instead
    for name, value in values.items():
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        if is_weight(tensor):
            weights[name] = tensor
            graph.input.append(
                onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            )
        else:
            graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(kept)


def _of_weights(
    graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto]
) -> list[onnx.NodeProto]:
    """The nodes that compute something of weights, and of nothing that a run brings, in order."""
    of_weights = set(weights)
    constant = {"", *weights, *(tensor.name for tensor in graph.initializer)}
    outputs = {value.name for value in graph.output}
    found = []
    for node in graph.node:
        reads = set(names_read(node))
        known = node.domain in ("", "ai.onnx") and node.op_type not in _LEFT
        if constant_tensor(node) is not None:
            constant.update(node.output)
        elif known and reads <= constant and not outputs & {*node.output}:
            if reads & of_weights:
                of_weights.update(node.output)
            elif node.op_type not in _FORMS:
                continue  # a constant that need not be small
            found.append(node)
            constant.update(node.output)
    return found


def _program(
    skeleton: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, onnx.TensorProto],
) -> onnx.ModelProto:
    """A model of the nodes, whose inputs are weights, with the shapes of what they compute."""
    graph, read = skeleton.graph, {name for node in nodes for name in node.input}
    program = onnx.ModelProto(ir_version=skeleton.ir_version, opset_import=skeleton.opset_import)
    program.graph.name = "of_weights"
    program.graph.input.extend(v for v in graph.input if v.name in read and v.name in weights)
    stored = {tensor.name: tensor for tensor in graph.initializer if tensor.name in read}
    constants = [node for node in graph.node if constant_tensor(node) is not None]
    program.graph.node.extend(n for n in constants if n.output[0] in read)
    for node in nodes:
        if node.op_type == "Identity" and node.input[0] in stored:
            # The inference of shapes knows no values behind it.
            stored[node.output[0]] = copy = onnx.TensorProto()
            copy.CopyFrom(stored[node.input[0]])
            copy.name = node.output[0]
        else:
            program.graph.node.append(node)
    program.graph.initializer.extend(stored.values())
    return onnx.shape_inference.infer_shapes(program, data_prop=True)


def _folded(program: onnx.ModelProto) -> set[str]:
    """What the nodes compute, where it is known to be not much larger than what it is made of."""
    graph = program.graph
    sizes = {value.name: _bytes(value) for value in (*graph.input, *graph.value_info)}
    sources = {value.name: _bytes(value) for value in graph.input}
    refused: set[str] = set()
    folded: set[str] = set()
    for node in graph.node:
        if constant_tensor(node) is not None:
            continue
        source = sum(sources.get(name, 0) for name in {*node.input})
        sources.update(dict.fromkeys(node.output, source))
        made = sum(sizes.get(name, inf) for name in node.output if name)
        if refused & {*node.input} or made > max(_SMALL_BYTES, _MOST_GROWTH * source):
            refused.update(node.output)
        elif node.op_type not in _FORMS or folded & {*node.input}:
            folded.update(node.output)
    return folded - {""}


def _bytes(value: onnx.ValueInfoProto) -> float:
    """How large a tensor is; infinite where nobody knows."""
    kind = value.type.tensor_type
    if not kind.elem_type or not kind.HasField("shape"):
        return inf
    if any(not dim.HasField("dim_value") for dim in kind.shape.dim):
        return inf
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    return float(itemsize * prod(dim.dim_value for dim in kind.shape.dim))


def _evaluate(
    program: onnx.ModelProto, results: Sequence[str], weights: Mapping[str, onnx.TensorProto]
) -> dict[str, np.ndarray]:
    """Values of what the program computes, by ONNX Runtime."""
    program.graph.output.extend(onnx.ValueInfoProto(name=name) for name in results)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        program.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {entry.name: as_array(weights[entry.name]) for entry in session.get_inputs()}
    return dict(zip(results, session.run(list(results), feeds), strict=True))
