"""Sparse weights of every origin: shown by inspect, and multiplied by the sparse kernels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import source_models  # noqa: F401 (skips where a framework is missing)
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparse_tvm
from sparse_tvm.sparsity.masks import prune_array

SIZE = 256
ROWS = 16


def weight(structure: str = "unstructured", seed: int = 0) -> torch.Tensor:
    dense = np.random.default_rng(seed).standard_normal((SIZE, SIZE)).astype(np.float32)
    return torch.from_numpy(prune_array(dense, 0.9, structure) / SIZE**0.5)


def network(w: Any) -> nn.Module:
    """A network whose first layer has the weight `w`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, 8)).eval()
    model[0].weight = nn.Parameter(w, requires_grad=False)
    return model


def from_csr(_: Path) -> Any:
    return network(weight().to_sparse_csr())


def from_bsr(_: Path) -> Any:
    return network(weight("4x1").to_sparse_bsr((4, 1)))


def from_semi_structured(_: Path) -> Any:
    from torch.sparse import SparseSemiStructuredTensorCUTLASS
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
    )

    w = weight("2:4").half()
    packed, meta = sparse_semi_structured_from_dense_cutlass(w)
    # The public constructor wants a GPU; what it makes there is this.
    tensor = SparseSemiStructuredTensorCUTLASS(
        w.shape, packed, meta, None, None, None, requires_grad=False
    )
    return network(tensor)


def from_prune_mask(_: Path) -> Any:
    model = network(weight("unstructured", seed=3) + 0.001)
    torch_prune.l1_unstructured(model[0], "weight", 0.9)
    return model


def from_prune_permanent(_: Path) -> Any:
    model = from_prune_mask(_)
    torch_prune.remove(model[0], "weight")
    return model


def from_sparsifier(_: Path) -> Any:
    try:
        from torchao.sparsity import WeightNormSparsifier
    except ImportError:
        from torch.ao.pruning import WeightNormSparsifier

    model = network(torch.randn(SIZE, SIZE))
    sparsifier = WeightNormSparsifier(sparsity_level=0.9, sparse_block_shape=(1, 4))
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    return model


def from_masked_program(directory: Path) -> Path:
    path = directory / "masked.pt2"
    batch = torch.export.Dim("batch")
    examples = (torch.zeros(ROWS, SIZE),)
    program = torch.export.export(
        from_prune_mask(directory), examples, dynamic_shapes=({0: batch},), strict=False
    )
    torch.export.save(program, path)
    return path


def from_sparse_initializer(directory: Path) -> Path:
    w, v = weight().numpy().T, np.random.default_rng(1).standard_normal((SIZE, 8)) / 16
    indices = np.flatnonzero(w)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(w.ravel()[indices], "first.weight"),
        numpy_helper.from_array(indices, "first.indices"),
        list(w.shape),
    )
    nodes = [
        helper.make_node("MatMul", ["x", "first.weight"], ["h"]),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("MatMul", ["a", "second.weight"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "sparse",
        [helper.make_tensor_value_info("x", 1, ["batch", SIZE])],
        [helper.make_tensor_value_info("y", 1, ["batch", 8])],
        [numpy_helper.from_array(v.astype(np.float32), "second.weight")],
        sparse_initializer=[sparse],
    )
    path = directory / "sparse.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def from_tflite(directory: Path) -> Path:
    import keras
    import tensorflow as tf

    model = keras.Sequential(
        [keras.Input((SIZE,)), keras.layers.Dense(SIZE, "relu"), keras.layers.Dense(8)]
    )
    model.layers[0].kernel.assign(weight("1x4").numpy().T)
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.EXPERIMENTAL_SPARSITY]
    path = directory / "sparse.tflite"
    path.write_bytes(converter.convert())
    return path


def huggingface(directory: Path, structure: str, sparsity_format: str) -> Path:
    """A checkpoint as llm-compressor writes it, stored by compressed-tensors' own code."""
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=SIZE,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=SIZE,
        vocab_size=64,
        max_position_embeddings=32,
        architectures=["BertModel"],
    )
    path = directory / sparsity_format
    BertModel(config).save_pretrained(path)
    from safetensors.torch import load_file

    state = load_file(path / "model.safetensors")
    for name in [n for n in state if n.startswith("encoder") and n.endswith("dense.weight")]:
        dense = torch.from_numpy(prune_array(state.pop(name).numpy(), 0.9, structure))
        state |= compress(name, dense, sparsity_format)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {"format": sparsity_format, "global_sparsity": 0.5},
    }
    (path / "config.json").write_text(json.dumps(values))
    return path


def compress(name: str, dense: torch.Tensor, sparsity_format: str) -> dict[str, torch.Tensor]:
    """Compress by compressed-tensors, if it is of a release that still writes these formats."""
    try:
        from compressed_tensors.compressors import BaseCompressor

        compressor = BaseCompressor.load_from_registry(sparsity_format)
        parts = dict(compressor.compress_weight(name, dense))
        return {key: value.contiguous() for key, value in parts.items()}
    except (ImportError, AttributeError, KeyError):
        bits = dense != 0
        return {
            f"{name}.compressed": dense[bits],
            f"{name}.bitmask": torch.from_numpy(np.packbits(bits.numpy(), -1, "little")),
            f"{name}.shape": torch.tensor(dense.shape),
        }


def from_bitmask(directory: Path) -> Path:
    return huggingface(directory, "unstructured", "sparse-bitmask")


def from_bitmask_2_4(directory: Path) -> Path:
    return huggingface(directory, "2:4", "sparse-24-bitmask")


SOURCES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "csr": (from_csr, "torch sparse CSR", "csr"),
    "bsr": (from_bsr, "torch sparse BSR 4x1", "bsr"),
    "semi-structured": (from_semi_structured, "torch semi-structured 2:4", "csr"),
    "prune mask": (from_prune_mask, "torch.nn.utils.prune mask", "csr"),
    "prune permanent": (from_prune_permanent, "zeros in a dense weight", "csr"),
    "sparsifier": (from_sparsifier, "parametrised mask", "csr"),
    "masked program": (from_masked_program, "torch.nn.utils.prune mask", "csr"),
    "bitmask": (from_bitmask, "compressed-tensors bitmask", "csr"),
    "2:4 bitmask": (from_bitmask_2_4, "compressed-tensors 2:4 bitmask", "csr"),
    "sparse initializer": (from_sparse_initializer, "ONNX sparse initializer", "csr"),
    "tflite": (from_tflite, "TFLite sparse tensor", "csr"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_source(source: str, tmp_path: Path) -> None:
    make, origin, form = SOURCES[source]
    model = make(tmp_path)
    options: dict[str, Any] = {}
    if isinstance(model, nn.Module):
        options = {
            "example_inputs": (torch.randn(ROWS, SIZE),),
            "dynamic_shapes": ({0: torch.export.Dim("batch")},),
        }
    sparse = [layer for layer in sparse_tvm.inspect(model, **options)["layers"] if layer["origin"]]
    assert {layer["origin"] for layer in sparse} == {origin}
    before = set(tmp_path.rglob("*"))
    Path("/proc/self/clear_refs").write_text("5")
    result = sparse_tvm.compile(model, tmp_path / "model.so", format=form, **options)
    assert set(tmp_path.rglob("*")) - before == set(outputs(tmp_path))
    layers = {layer["name"]: layer for layer in result.manifest["layers"]}
    used = [layers[layer["name"]]["format"] for layer in sparse]
    assert set(used) == {form}
    manifest = result.manifest
    sys.stderr.write(
        f"{source}: {sparse[0]['name']} {sparse[0]['sparsity']:.0%} zero, {origin}; {used[0]}; "
        f"differs from {manifest['verification']['reference']} by "
        f"{max(manifest['verification']['max_abs_diff'].values()):.1e}; "
        f"peak {manifest['compile']['peak_memory_bytes'] / 2**20:.0f} MiB\n"
    )


def outputs(directory: Path) -> list[Path]:
    tokenizer = directory / "model.tokenizer"
    extra = [tokenizer, tokenizer / "config.json"] if tokenizer.exists() else []
    return [directory / "model.so", *extra]
