"""ViT, GPT-2 and DistilBERT graphs: what ONNX Runtime and the compiler make of them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

import sparse_tvm
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.models.gpt2 import Gpt2Config, build_gpt2, gpt2_weight_shapes
from sparse_tvm.models.graph import draw_weights
from sparse_tvm.models.vit import VitConfig, build_vit, vit_weight_shapes

VIT = VitConfig(layers=2, hidden=48, heads=4, intermediate=80, image=24, patch=8)
GPT2 = Gpt2Config(layers=2, hidden=48, heads=4, vocabulary=60, max_positions=32)
DISTILBERT = BertConfig(
    layers=2, hidden=48, heads=4, intermediate=80, vocabulary=60, max_positions=32, token_types=0
)


def build(name: str, batch: int | str, sequence: int | str) -> onnx.ModelProto:
    if name == "vit":
        return build_vit(VIT, batch=batch)
    if name == "gpt2":
        return build_gpt2(GPT2, batch=batch, sequence=sequence)
    return build_bert(DISTILBERT, batch=batch, sequence=sequence)


def feed(name: str, batch: int, sequence: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    if name == "vit":
        return {"pixel_values": rng.standard_normal((batch, 3, 24, 24), np.float32)}
    ids = rng.integers(0, 60, (batch, sequence))
    if name == "gpt2":
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(["last_hidden_state"], inputs)[0]


def layer_norm(x, w, name, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return normal * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(query, key, value, heads, mask=0.0):
    batch, rows, hidden = query.shape
    q, k, v = (x.reshape(batch, rows, heads, -1).swapaxes(1, 2) for x in (query, key, value))
    scores = q @ k.swapaxes(2, 3) / np.sqrt(hidden / heads) + mask
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(batch, rows, hidden)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_gpt2_computes_what_its_paper_says():
    inputs = feed("gpt2", 2, 7)
    w = draw_weights(gpt2_weight_shapes(GPT2), 0)
    w = {name: array.astype(np.float64) for name, array in w.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][inputs["input_ids"]] + w["wpe.weight"][:7]
    mask = np.triu(np.full((7, 7), -np.inf), 1)
    for index in range(GPT2.layers):
        name = f"h.{index}"
        projected = linear(f"{name}.attn.c_attn", layer_norm(x, w, f"{name}.ln_1", 1e-5))
        context = attend(*np.split(projected, 3, -1), GPT2.heads, mask)
        x = x + linear(f"{name}.attn.c_proj", context)
        wide = gelu_tanh(linear(f"{name}.mlp.c_fc", layer_norm(x, w, f"{name}.ln_2", 1e-5)))
        x = x + linear(f"{name}.mlp.c_proj", wide)
    expected = layer_norm(x, w, "ln_f", 1e-5)
    np.testing.assert_allclose(run(build("gpt2", 2, 7), inputs), expected, atol=1e-5)


def test_vit_embeds_patches_behind_a_class_token():
    config = VitConfig(layers=0, hidden=48, heads=4, intermediate=80, image=24, patch=8)
    inputs = feed("vit", 2, 0)
    w = draw_weights(vit_weight_shapes(config), 0)
    patches = inputs["pixel_values"].reshape(2, 3, 3, 8, 3, 8).transpose(0, 2, 4, 1, 3, 5)
    projection = "embeddings.patch_embeddings.projection"
    x = patches.reshape(2, 9, -1) @ w[f"{projection}.weight"].reshape(48, -1).T
    x = np.concatenate(
        [np.repeat(w["embeddings.cls_token"], 2, 0), x + w[f"{projection}.bias"]], axis=1
    )
    x = layer_norm(x + w["embeddings.position_embeddings"], w, "layernorm", 1e-12)
    np.testing.assert_allclose(run(build_vit(config, batch=2), inputs), x, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "gpt2", "distilbert"])
def test_symbolic_sizes_give_what_fixed_ones_do(name):
    inputs = feed(name, 2, 7)
    symbolic = run(build(name, "batch", "sequence"), inputs)
    np.testing.assert_allclose(run(build(name, 2, 7), inputs), symbolic, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "gpt2", "distilbert"])
def test_pruned_models_compile(name, tmp_path):
    model, path = build(name, 2, 7), tmp_path / "model.so"
    onnx.save(model, tmp_path / "model.onnx")
    sparse_tvm.prune(tmp_path / "model.onnx", tmp_path / "pruned.onnx", sparsity=0.8)
    result = sparse_tvm.compile(tmp_path / "pruned.onnx", path)
    kinds = {kernel["kind"] for kernel in result.manifest["kernels"].values()}
    assert {"attention", "dense", "layer_norm"} <= kinds
    assert any(layer["format"] != "dense" for layer in result.manifest["layers"])
