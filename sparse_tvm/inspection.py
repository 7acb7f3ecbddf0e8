"""Look into a model or an artifact without compiling or running it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx

from sparse_tvm.artifact import read_manifest
from sparse_tvm.frontends.detach import as_array, model_inputs, size_of, stored_tensors
from sparse_tvm.frontends.read import read_onnx
from sparse_tvm.frontends.specs import tensor_spec
from sparse_tvm.frontends.weights import WeightRef, canonical, find_weights
from sparse_tvm.sparsity.analysis import analyse

ELF_MAGIC = b"\x7fELF"


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Tell by its content whether a file is a shared library, whatever its name."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(ELF_MAGIC)) == ELF_MAGIC
    except OSError:
        return False


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe an ONNX model's weights, or return an artifact's manifest.

    Parameters
    ----------
    path : path
        A ``.onnx`` file or an artifact; what it is is told by its content.

    Returns
    -------
    dict[str, Any]
        Can be written as JSON. For a model: ``file``, ``opset``, ``ir_version``, ``producer``,
        ``inputs``, ``outputs``, ``layers`` (one per weight: sparsity, structure, and the fill of
        every candidate block) and ``totals``.

    Raises
    ------
    ModelError, ArtifactError
        When the file cannot be read.
    """
    return read_manifest(path) if is_artifact(path) else _inspect_onnx(path)


def _inspect_onnx(path: str | os.PathLike[str]) -> dict[str, Any]:
    model = read_onnx(path)
    tensors = dict(stored_tensors(model.graph))
    layers = [_describe(ref, tensors[ref.initializer]) for ref in find_weights(model)]
    parameters = sum(layer["parameters"] for layer in layers)
    nonzeros = sum(layer["nnz"] for layer in layers)
    floats = sum(size_of(tensor) for tensor in tensors.values() if tensor.data_type == tensor.FLOAT)
    return {
        "file": str(path),
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


def _describe(ref: WeightRef, tensor: onnx.TensorProto) -> dict[str, Any]:
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
        "block": list(found.block) if found.block else None,
        "n_m": list(found.n_m) if found.n_m else None,
        "block_fill": {f"{r}x{c}": fill for (r, c), fill in found.blocks.items()},
    }
