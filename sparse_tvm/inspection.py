"""Look into a model or an artifact without compiling or running it."""

from __future__ import annotations

import os
from typing import Any

import onnx

from sparse_tvm.artifact import is_artifact, read_manifest
from sparse_tvm.frontends.detect import open_source
from sparse_tvm.frontends.onnx.detach import as_array, model_inputs, size_of, stored_tensors
from sparse_tvm.frontends.onnx.read import read_onnx
from sparse_tvm.frontends.onnx.specs import tensor_spec
from sparse_tvm.frontends.onnx.weights import WeightRef, canonical, find_weights
from sparse_tvm.frontends.source import Source, SourceOptions
from sparse_tvm.sparsity.analysis import analyse

DENSE_ORIGIN = "zeros in a dense weight"


def inspect(model: Any, **options: Any) -> dict[str, Any]:
    """Describe a model's weights, or return an artifact's manifest.

    Parameters
    ----------
    model : path or model
        Anything :func:`sparse_tvm.compile` takes, or an artifact; files are told by content.
    options
        Fields of `SourceOptions`, such as ``example_inputs`` for an ``nn.Module``.

    Returns
    -------
    dict[str, Any]
        Can be written as JSON. For a model: ``file``, ``kind``, ``opset``, ``ir_version``,
        ``producer``, ``inputs``, ``outputs``, ``layers`` (one per weight: sparsity, structure,
        ``origin`` of the zeros, and the fill of every candidate block) and ``totals``.

    Raises
    ------
    ModelError, ArtifactError
        When the file cannot be read.
    """
    if isinstance(model, str | os.PathLike) and is_artifact(model):
        return read_manifest(model)
    return _inspect_source(open_source(model, SourceOptions(**options)))


def _inspect_source(source: Source) -> dict[str, Any]:
    model = read_onnx(source.as_onnx())
    tensors = dict(stored_tensors(model.graph))
    origins = source.origins()
    layers = [
        _describe(ref, tensors[ref.initializer], origins.get(ref.initializer))
        for ref in find_weights(model)
    ]
    parameters = sum(layer["parameters"] for layer in layers)
    nonzeros = sum(layer["nnz"] for layer in layers)
    floats = sum(size_of(tensor) for tensor in tensors.values() if tensor.data_type == tensor.FLOAT)
    return {
        "file": source.name,
        "kind": source.kind,
        "opset": next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        "ir_version": model.ir_version,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": [_entry(value) for value in model_inputs(model)],
        "outputs": [_entry(value) for value in model.graph.output],
        "layers": layers,
        "totals": {
            "parameters": parameters,
            "nonzeros": nonzeros,
            "sparsity": 1 - nonzeros / parameters if parameters else 0.0,
            "other_parameters": floats - parameters,
        },
    }


def _entry(value: onnx.ValueInfoProto) -> dict[str, Any]:
    spec = tensor_spec(value)
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _describe(ref: WeightRef, tensor: onnx.TensorProto, origin: str | None) -> dict[str, Any]:
    found = analyse(canonical(ref, as_array(tensor)))
    return {
        "name": ref.layer,
        "op": ref.op,
        "nodes": list(ref.nodes),
        "shape": list(ref.shape),
        "parameters": ref.shape[0] * ref.shape[1],
        "nnz": found.nnz,
        "sparsity": found.sparsity,
        "structure": found.label,
        "origin": origin or (DENSE_ORIGIN if found.nnz < ref.shape[0] * ref.shape[1] else None),
        "block": list(found.block) if found.block else None,
        "n_m": list(found.n_m) if found.n_m else None,
        "block_fill": {f"{r}x{c}": fill for (r, c), fill in found.blocks.items()},
    }
