"""Checkpoints that compressed-tensors quantised to int8 compile with their own integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_models  # skips where a framework is missing
import torch
import transformers
from torch import nn

import sparse_tvm
from sparse_tvm.errors import ModelError

quantization = pytest.importorskip(
    "compressed_tensors.quantization", reason="scripts/test_sources.sh installs it"
)


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=100,
        max_position_embeddings=64,
        type_vocab_size=1,
        initializer_range=0.2,
    )
    return transformers.BertModel(config).eval()


def feeds() -> list[dict[str, torch.Tensor]]:
    rng = np.random.default_rng(0)
    mask = torch.ones(2, 7, dtype=torch.int64)
    return [
        {
            "input_ids": torch.from_numpy(rng.integers(0, 100, (2, 7))),
            "attention_mask": mask,
            "token_type_ids": torch.zeros_like(mask),
        }
        for _ in range(4)
    ]


def quantised(directory: Path, *, dynamic: bool, symmetric: bool = True) -> np.ndarray:
    """Write a checkpoint of W8A8; return what compressed-tensors computes of the first feed."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    model = bert()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    ranges: dict[str, list[Any]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        return lambda _, args: ranges[name].append(torch.aminmax(args[0]))

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for feed in feeds():
            model(**feed)
    for hook in hooks:
        hook.remove()

    weights = quantization.QuantizationArgs(num_bits=8, strategy="channel")
    inputs = quantization.QuantizationArgs(
        num_bits=8,
        strategy="token" if dynamic else "tensor",
        dynamic=dynamic,
        symmetric=symmetric,
    )
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs
    )
    quantization.apply_quantization_config(
        model,
        quantization.QuantizationConfig(config_groups={"group_0": scheme}, format="int-quantized"),
    )
    with torch.no_grad():
        for name, layer in layers.items():
            w = layer.weight
            scale, _ = calculate_qparams(w.amin(1, True), w.amax(1, True), weights)
            layer.weight_scale.copy_(scale)
            if not dynamic:
                low, high = (torch.stack(ends) for ends in zip(*ranges[name], strict=True))
                scale, zero = calculate_qparams(low.min()[None], high.max()[None], inputs)
                layer.input_scale.copy_(scale)
                if not symmetric:
                    layer.input_zero_point.copy_(zero)
            layer.quantization_status = quantization.QuantizationStatus.FROZEN
        expected = model(**feeds()[0]).last_hidden_state.numpy()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    return expected


@pytest.mark.parametrize(("dynamic", "symmetric"), [(True, True), (False, True), (False, False)])
def test_checkpoint(dynamic: bool, symmetric: bool, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    expected = quantised(directory, dynamic=dynamic, symmetric=symmetric)
    path = tmp_path / "model.so"
    manifest = sparse_tvm.compile(directory, path, min_cosine=0.999).manifest
    assert {layer["precision"] for layer in manifest["layers"]} == {source_models.INTEGERS}
    feed = {name: tensor.numpy() for name, tensor in feeds()[0].items()}
    model = sparse_tvm.load(path)
    output = model.run({each.name: feed[each.name] for each in model.inputs})["last_hidden_state"]
    # Values on the edge between two steps may fall to either side.
    difference = np.abs(output - expected)
    assert difference.max() < 0.2
    assert difference.mean() < (0.03 if dynamic else 0.01)


def test_it_is_not_pruned(tmp_path: Path) -> None:
    quantised(tmp_path / "model", dynamic=True)
    with pytest.raises(ModelError, match="stored as int8 cannot be pruned"):
        sparse_tvm.prune(tmp_path / "model", tmp_path / "pruned", sparsity=0.5)
    assert not (tmp_path / "pruned").exists()


CHANNELS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
TOKENS = {**CHANNELS, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("weights", "inputs", "message"),
    [
        ({**CHANNELS, "num_bits": 4}, TOKENS, "weights of 4 bits, int"),
        ({**CHANNELS, "type": "float"}, TOKENS, "weights of 8 bits, float"),
        ({**CHANNELS, "strategy": "group"}, TOKENS, "weights by group"),
        ({**CHANNELS, "symmetric": False}, TOKENS, "weights with zero points"),
        (CHANNELS, {**TOKENS, "strategy": "block"}, "inputs by block"),
        (CHANNELS, {**TOKENS, "symmetric": False}, "inputs with a zero point of each token"),
        (CHANNELS, {**TOKENS, "dynamic": False}, "inputs by token, static"),
    ],
)
def test_other_schemes_are_refused(
    weights: dict[str, Any], inputs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    bert().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    quantisation = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    config = {**json.loads(path.read_text()), "quantization_config": quantisation}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        sparse_tvm.compile(tmp_path, tmp_path / "model.so")
