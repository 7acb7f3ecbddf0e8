"""Every spelling of the BERT graph against a NumPy reference, through ONNX Runtime."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.models.bert import (
    BertConfig,
    Style,
    build_bert,
    random_weights,
    weight_shapes,
)

TINY = BertConfig(
    layers=2, hidden=24, heads=3, intermediate=40, vocabulary=50, max_positions=16, epsilon=1e-6
)
TOKENS = (2, 7)  # batch, sequence


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def activate(config, x):
    if config.activation == "relu":
        return np.maximum(x, 0)
    if config.activation == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference(config, weights, feed):
    """Last hidden state and pooler output in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    ids = feed["input_ids"]
    batch, sequence = ids.shape

    def dense(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.epsilon)
        return normal * w[f"{name}.weight"] + w[f"{name}.bias"]

    def heads(name, x):
        return dense(name, x).reshape(batch, sequence, config.heads, -1).swapaxes(1, 2)

    x = layer_norm(
        "embeddings.LayerNorm",
        w["embeddings.word_embeddings.weight"][ids]
        + w["embeddings.position_embeddings.weight"][:sequence]
        + w["embeddings.token_type_embeddings.weight"][feed["token_type_ids"]],
    )
    for index in range(config.layers):
        layer = f"encoder.layer.{index}"
        query, key, value = (
            heads(f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(2, 3) / math.sqrt(config.head_size)
        if "attention_mask" in feed:
            scores = np.where(feed["attention_mask"][:, None, None, :] == 1, scores, -np.inf)
        context = (softmax(scores) @ value).swapaxes(1, 2).reshape(x.shape)
        attended = dense(f"{layer}.attention.output.dense", context)
        x = layer_norm(f"{layer}.attention.output.LayerNorm", attended + x)
        wide = activate(config, dense(f"{layer}.intermediate.dense", x))
        x = layer_norm(f"{layer}.output.LayerNorm", dense(f"{layer}.output.dense", wide) + x)
    return x, np.tanh(dense("pooler.dense", x[:, 0]))


def random_feed(config, shape=TOKENS, *, mask=True):
    generator = np.random.default_rng(1)
    feed = {
        "input_ids": generator.integers(0, config.vocabulary, shape),
        "token_type_ids": generator.integers(0, config.token_types, shape),
    }
    if mask:
        feed["attention_mask"] = np.ones(shape, np.int64)
        feed["attention_mask"][-1, -3:] = 0
    return feed


def run(model, feed):
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, feed)


def check(config, style, *, mask=True, pooler=True, **sizes):
    # Larger than BERT's 0.02, so that scores and activations leave their linear range.
    weights = {name: array * 5 for name, array in random_weights(config).items()}
    sizes = {"batch": TOKENS[0], "sequence": TOKENS[1], **sizes}
    model = build_bert(config, weights, style=style, pooler=pooler, attention_mask=mask, **sizes)
    feed = random_feed(config, mask=mask)
    expected = reference(config, weights, feed)
    for actual, wanted in zip(run(model, feed), expected, strict=False):
        np.testing.assert_allclose(actual, wanted, atol=2e-5)
    return model


@pytest.mark.parametrize(
    ("dense", "layer_norm", "scale"),
    list(itertools.product(("matmul", "gemm"), ("op", "decomposed"), ("div", "mul"))),
)
def test_spellings(dense, layer_norm, scale):
    check(TINY, Style(dense=dense, layer_norm=layer_norm, scale=scale))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("gelu", ["decomposed", "op"])
def test_activations(activation, gelu):
    check(replace(TINY, activation=activation), Style(gelu=gelu, opset=20))


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20, 21])
def test_opsets(opset):
    model = check(TINY, Style(layer_norm="decomposed", opset=opset))
    assert model.opset_import[0].version == opset


@pytest.mark.parametrize("dense", ["matmul", "gemm"])
@pytest.mark.parametrize(
    "sizes",
    [{"batch": "batch", "sequence": "sequence"}, {"batch": "batch"}, {"sequence": "sequence"}],
)
def test_symbolic_sizes(dense, sizes):
    model = check(TINY, Style(dense=dense), **sizes)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == [
        sizes.get("batch", TOKENS[0]),
        sizes.get("sequence", TOKENS[1]),
    ]


def test_without_mask_and_pooler():
    model = check(TINY, Style(), mask=False, pooler=False)
    assert [value.name for value in model.graph.input] == ["input_ids", "token_type_ids"]
    assert [value.name for value in model.graph.output] == ["last_hidden_state"]


def test_names_and_layout():
    name = "encoder.layer.0.intermediate.dense.weight"
    shape = weight_shapes(TINY)[name]
    assert shape == (TINY.intermediate, TINY.hidden)
    for style, stored in ((Style(), shape[::-1]), (Style(dense="gemm"), shape)):
        initializers = {
            i.name: i for i in build_bert(TINY, style=style, sequence=7).graph.initializer
        }
        assert tuple(initializers[name].dims) == stored


def test_seed_decides_the_weights():
    first, again, other = (build_bert(TINY, seed=seed, sequence=7) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_hugging_face_configuration(tmp_path):
    values = {
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 100,
        "max_position_embeddings": 20,
        "type_vocab_size": 1,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    expected = BertConfig(3, 32, 4, 64, 100, 20, 1, "gelu_tanh", 1e-5)
    assert BertConfig.from_json(path) == expected

    path.write_text(json.dumps(values | {"hidden_act": "silu"}))
    with pytest.raises(ModelError, match="unsupported hidden_act 'silu'"):
        BertConfig.from_json(path)
    path.write_text("{}")
    with pytest.raises(ModelError, match="not a BERT configuration: 'hidden_act'"):
        BertConfig.from_json(path)
    with pytest.raises(ModelError, match=r"missing\.json: not a readable JSON file"):
        BertConfig.from_json(tmp_path / "missing.json")


def test_bad_arguments():
    with pytest.raises(OptionError, match="5 heads do not divide the hidden size 24"):
        replace(TINY, heads=5)
    with pytest.raises(OptionError, match="needs opset 17"):
        Style(opset=13)
    with pytest.raises(OptionError, match="sequence 17 is longer than the model's 16 positions"):
        build_bert(TINY, sequence=17)
    weights = random_weights(TINY)
    name = "encoder.layer.1.output.dense.bias"
    with pytest.raises(ModelError, match=rf"weight {name} has shape \[3\], expected \[24\]"):
        build_bert(TINY, weights | {name: np.zeros(3, np.float32)}, sequence=7)
    del weights[name]
    with pytest.raises(ModelError, match=f"weight {name} is missing"):
        build_bert(TINY, weights, sequence=7)
