"""Hugging Face directories of several heads compile as they are, for any batch and sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_models  # noqa: F401 (skips where a framework is missing)
import torch
import transformers

import sparse_tvm
from sparse_tvm.errors import ModelError

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "initializer_range": 0.2,
}
TOKENS = {"vocab_size": 100, "max_position_embeddings": 64}
DISTIL = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "initializer_range": 0.2}
CLIP = {k: v for k, v in TEXT.items() if k != "initializer_range"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForSequenceClassification": ("BertConfig", {**TEXT, **TOKENS}),
    "DistilBertForQuestionAnswering": ("DistilBertConfig", {**DISTIL, **TOKENS}),
    "CLIPTextModel": (
        "CLIPTextConfig",
        {**CLIP, **TOKENS, "initializer_factor": 10.0, "bos_token_id": 0, "eos_token_id": 1},
    ),
    "RobertaModel": ("RobertaConfig", {**TEXT, **TOKENS, "type_vocab_size": 1}),
    "ViTForImageClassification": ("ViTConfig", {**TEXT, "image_size": 32, "patch_size": 8}),
    "MobileNetV2ForImageClassification": (
        "MobileNetV2Config",
        {"image_size": 64, "depth_multiplier": 0.35, "initializer_range": 0.3},
    ),
}


def build(name: str) -> Any:
    config, values = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**values))
    if name.startswith("MobileNet"):  # batch norms that have seen data, or all outputs vanish
        model.train()
        with torch.no_grad():
            for _ in range(200):
                model(pixel_values=torch.randn(8, 3, 64, 64))
    return model.eval()


def feed(model: Any, inputs: list[Any], batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    if inputs[0].name == "pixel_values":
        shape = (batch, *inputs[0].shape[1:])
        return {"pixel_values": rng.standard_normal(shape).astype(np.float32)}
    shape = (batch, 4 + 3 * batch)
    mask = np.ones(shape, np.int64)
    mask[-1, shape[1] // 2 :] = 0
    values = {"attention_mask": mask, "token_type_ids": rng.integers(0, 2, shape)}
    ids = rng.integers(2, model.config.vocab_size, shape)
    return {spec.name: values.get(spec.name, ids) for spec in inputs}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "model")
    result = sparse_tvm.compile(tmp_path / "model", tmp_path / "model.so")
    assert result.manifest["verification"]["reference"].startswith("transformers")
    compiled = sparse_tvm.load(result.path)
    assert compiled.inputs[0].shape[0] == "batch"
    for batch in (1, 2, 5):
        inputs = feed(model, compiled.inputs, batch)
        with torch.no_grad():
            expected = model(**{key: torch.from_numpy(v) for key, v in inputs.items()})
        for key, values in compiled.run(inputs).items():
            reference = expected[key].numpy()
            assert values.shape == reference.shape
            largest = np.abs(reference).max()
            assert largest > 1e-3
            assert np.abs(values - reference).max() < 1e-4 * max(1.0, largest)


def test_outputs_that_need_missing_weights_are_left_out(tmp_path: Path) -> None:
    """Fine-tuned encoders are often saved without the pooler."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**TEXT, **TOKENS, architectures=["BertModel"])
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    result = sparse_tvm.compile(tmp_path / "model", tmp_path / "model.so")
    assert [output["name"] for output in result.manifest["outputs"]] == ["last_hidden_state"]
    assert any("pooler_output" in note for note in result.manifest["notes"])


def test_a_head_that_is_missing_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        **TEXT, **TOKENS, architectures=["BertForSequenceClassification"]
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    text = (tmp_path / "model" / "config.json").read_text()
    head = text.replace('"BertModel"', '"BertForSequenceClassification"')
    (tmp_path / "model" / "config.json").write_text(head)
    with pytest.raises(ModelError, match=r"all its outputs need them: classifier\.bias"):
        sparse_tvm.compile(tmp_path / "model", tmp_path / "model.so")


def test_tokens_that_see_none_are_not_compared(tmp_path: Path) -> None:
    """In a sliding window, tokens of the padding see no token at all."""
    sizes = {**TEXT, **TOKENS, "num_key_value_heads": 2, "sliding_window": 4}
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "mistral")
    compiled = sparse_tvm.compile(tmp_path / "mistral", tmp_path / "model.so", threads=1)
    assert "verification" in compiled.manifest

    mask = np.ones((2, 20), np.int64)
    mask[0, :9] = mask[1, 9:] = 0
    ids = np.random.default_rng(0).integers(0, 100, mask.shape)
    feeds = {"input_ids": ids, "attention_mask": mask}
    (logits,) = sparse_tvm.load(compiled.path).run(feeds).values()
    with torch.no_grad():
        expected = model(**{k: torch.from_numpy(v) for k, v in feeds.items()}).logits.numpy()
    np.testing.assert_allclose(logits[mask != 0], expected[mask != 0], atol=1e-4)
