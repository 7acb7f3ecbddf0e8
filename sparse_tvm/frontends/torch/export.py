"""From ``torch.export`` to ONNX in memory, weights attached under their own names."""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx

from sparse_tvm.collection import without_collection
from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.detach import is_weight
from sparse_tvm.frontends.onnx.in_memory import InMemoryTensors
from sparse_tvm.frontends.onnx.read import first_few, one_line
from sparse_tvm.frontends.onnx.weights import RECURRENT
from sparse_tvm.frontends.source import require
from sparse_tvm.frontends.torch.bags import with_summed_bags
from sparse_tvm.frontends.torch.decompose import without_second_trace
from sparse_tvm.frontends.torch.quantised import with_real_numbers

OPSET = 20

_SYMBOL = re.compile(r"\b[su]\d+\b")


def to_onnx(
    program: Any,
    name: str,
    outputs: Sequence[str],
    weights: Mapping[str, Callable[[], np.ndarray]],
    arrays: InMemoryTensors,
    *,
    strip: str = "",
) -> onnx.ModelProto:
    """Translate an exported program.

    Weights take no part in constant folding: it would make transposed copies with other names.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        What to translate.
    name : str
        Goes to the graph, and so to messages.
    outputs : Sequence[str]
        Names of the outputs.
    weights : Mapping[str, Callable[[], np.ndarray]]
        What returns the values of weights that are placeholders in `program`.
    arrays : InMemoryTensors
        Keeps the weights that the model refers to.
    strip : str
        Prefix that weights have in the program and not in the model.

    Raises
    ------
    ModelError
        When the program holds operators that cannot be translated.
    """
    torch = require("torch", "torch", "a PyTorch model")
    optimizer = require("onnxscript.optimizer", "torch", "a PyTorch model")
    import onnx_ir

    try:
        with quiet(), without_collection():
            exported = torch.onnx.export(
                without_second_trace(with_summed_bags(with_real_numbers(program))),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                output_names=list(outputs),
            )
    except Exception as error:
        raise ModelError(f"{name}: cannot be translated: {_cause(error)}") from error
    graph = exported.model.graph
    tensors = {key: value.const_value for key, value in graph.initializers.items()}
    for value in graph.initializers.values():
        value.const_value = None  # what has no value cannot be folded
    graph.initializers.clear()
    optimizer.fold_constants(exported.model)
    _name_layers(graph)
    proto: onnx.ModelProto = onnx_ir.serde.serialize_model(exported.model)
    proto.graph.name = name
    for key, tensor in tensors.items():
        values = weights[key]() if key in weights else _values(name, key, tensor)
        referred = arrays.tensor(values, key)
        large = is_weight(referred)
        proto.graph.initializer.append(
            referred if large else onnx.numpy_helper.from_array(values, key)
        )
    _strip(proto.graph, strip)
    _name_dimensions(proto.graph)
    return proto


@contextmanager
def quiet() -> Iterator[None]:
    """Keep PyTorch's and transformers' remarks about their own insides from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def _name_layers(graph: Any) -> None:
    """Name the nodes of layers after their modules, and drop what else is noted of nodes.

    That counts where the weight's own name says nothing, such as ``0.weight`` in a Sequential.
    """
    taken: set[str] = set()
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module = scopes[-2] if len(scopes) > 1 else ""
        layer = node.op_type in ("Conv", "Gemm", "MatMul", *RECURRENT)
        if module and layer and module not in taken:
            taken.add(module)
            node.name = module
        node.metadata_props.clear()  # stack traces, with the exporting machine's paths


def _values(model: str, name: str, tensor: Any) -> np.ndarray:
    dtype = tensor.dtype.name.lower()
    if dtype == "double":
        raise ModelError(
            f"{model}: weights are float32 or of 16 bits, but {name} is {dtype}",
            hint="convert the model with .float() and export it again",
        )
    values: np.ndarray = np.asarray(tensor.numpy(), order="C")  # a scalar stays one
    return values


def _strip(graph: onnx.GraphProto, prefix: str) -> None:
    """Remove a prefix from the names of weights, and of nothing else."""
    if not prefix:
        return
    names = {
        tensor.name: tensor.name.removeprefix(prefix)
        for tensor in graph.initializer
        if tensor.name.startswith(prefix)
    }
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)


def _name_dimensions(graph: onnx.GraphProto) -> None:
    """Call the symbols ``batch``, ``sequence`` or after the input that has them first."""
    names: dict[str, str] = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        integer = value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT
        for axis, dim in enumerate(dims):
            if dim.dim_param and dim.dim_param not in names:
                names[dim.dim_param] = _dimension(value.name, axis, integer and len(dims) == 2)
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = _SYMBOL.sub(lambda m: names.get(m[0], m[0]), dim.dim_param)


def _dimension(name: str, axis: int, tokens: bool) -> str:
    if axis == 0:
        return "batch"
    return "sequence" if tokens and axis == 1 else f"{name}_dim{axis}"


def _cause(error: BaseException) -> str:
    """Find, in a chain of errors, what a user can act on."""
    while error.__cause__ is not None:
        error = error.__cause__
    operators = sorted(set(re.findall(r"torch\.ops\.[\w.]+|<OpOverload\([^)]*\)>", str(error))))
    if operators:
        return f"no translation of {first_few(operators)}"
    return one_line(error)
