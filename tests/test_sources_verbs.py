"""``prune``, ``bench --against``, ``--save-ir`` and tokenizers, for models of every source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_models as models  # skips where a framework is missing
import torch

import sparse_tvm
from sparse_tvm.cli import main
from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.sparsity.pruning import prune


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tokenizer."""
    path = tmp_path_factory.mktemp("bert") / "bert"
    models.bert().save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text("{}")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("{}")
    return path


def weight_zeros(model: Any) -> float:
    found = sparse_tvm.inspect(model)["layers"]
    return float(np.mean([layer["sparsity"] for layer in found if "encoder" in layer["name"]]))


def test_prune_writes_a_huggingface_directory(directory: Path, tmp_path: Path) -> None:
    prune(directory, tmp_path / "pruned", sparsity=0.8, layers="encoder")
    assert weight_zeros(tmp_path / "pruned") == pytest.approx(0.8, abs=0.01)
    assert (tmp_path / "pruned" / "tokenizer.json").exists()
    from transformers import BertModel

    weights = dict(BertModel.from_pretrained(tmp_path / "pruned").named_parameters())
    weight = weights["encoder.layer.0.intermediate.dense.weight"]
    assert float((weight == 0).float().mean()) == pytest.approx(0.8, abs=0.01)


def test_prune_of_renamed_weights_keeps_the_checkpoints_names(tmp_path: Path) -> None:
    """transformers gives ViT's weights other names than its checkpoints have."""
    from safetensors.numpy import load_file
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(intermediate_size=64, image_size=32, patch_size=8, **sizes)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    prune(tmp_path / "vit", tmp_path / "pruned", sparsity=0.5)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("vit", "pruned"))
    assert set(before) == set(after)
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert len(changed) >= 6


def test_prune_writes_a_program(tmp_path: Path) -> None:
    examples = (torch.zeros(2, 3, models.SIZE, models.SIZE),)
    torch.export.save(torch.export.export(models.mobilenet(), examples), tmp_path / "m.pt2")
    prune(tmp_path / "m.pt2", tmp_path / "pruned.pt2", sparsity=0.5)
    layers = sparse_tvm.inspect(tmp_path / "pruned.pt2")["layers"]
    assert all(layer["sparsity"] == pytest.approx(0.5, abs=0.03) for layer in layers)


def test_prune_of_keras_writes_onnx(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    models.keras_mobilenet(models.mobilenet()).save(path)
    with pytest.raises(OptionError, match=r"\.onnx"):
        prune(path, tmp_path / "pruned.keras", sparsity=0.5)
    prune(path, tmp_path / "pruned.onnx", sparsity=0.5)
    layers = sparse_tvm.inspect(tmp_path / "pruned.onnx")["layers"]
    assert all(layer["sparsity"] == pytest.approx(0.5, abs=0.03) for layer in layers)


def test_bench_against_transformers_and_the_tokenizer(directory: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "model.so"
    sparse_tvm.compile(directory, artifact)
    kept = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert kept == {
        "model.so",
        "model.tokenizer/1_Pooling/config.json",
        "model.tokenizer/config.json",
        "model.tokenizer/tokenizer.json",
        "model.tokenizer/tokenizer_config.json",
    }
    arguments = ["bench", str(artifact), "--against", str(directory)]
    timings = tmp_path / "bench.json"
    assert main([*arguments, "--duration", "0.1", "--warmup", "0", "--json", str(timings)]) == 0
    assert json.loads(timings.read_text())["reference"]["engine"] == "transformers"


def test_saved_ir(directory: Path, tmp_path: Path) -> None:
    pruned, ir = tmp_path / "pruned", tmp_path / "model.json"
    prune(directory, pruned, sparsity=0.9, layers="encoder")
    first = sparse_tvm.compile(pruned, tmp_path / "first.so", save_ir=ir)
    second = sparse_tvm.compile(ir, tmp_path / "second.so")
    assert second.manifest["verification"]["reference"].startswith("TVM")
    assert second.manifest["layers"] == first.manifest["layers"]
    inputs = models.bert_inputs(3, 5)
    outputs = [sparse_tvm.load(result.path).run(inputs) for result in (first, second)]
    for name, values in outputs[0].items():
        np.testing.assert_array_equal(values, outputs[1][name])
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert stored < 0.8 * (pruned / "model.safetensors").stat().st_size

    document = json.loads(ir.read_text())
    document["versions"]["tvm"] = "0.1"
    ir.write_text(json.dumps(document))
    with pytest.raises(ModelError, match="saved with TVM"):
        sparse_tvm.compile(ir, tmp_path / "third.so")
