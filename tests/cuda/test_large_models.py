"""BERT-base, ViT and ResNet-50 for all four architectures, without a device."""

from __future__ import annotations

import onnx
import pytest

import sparse_tvm
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.models.convnets import build_resnet50
from sparse_tvm.models.vit import VitConfig, build_vit
from sparse_tvm.sparsity.pruning import prune

MODELS = {
    "bert": lambda: build_bert(BertConfig()),
    "vit": lambda: build_vit(VitConfig()),
    "resnet50": build_resnet50,
}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "structure", "formats"),
    [
        ("bert", None, {"dense"}),
        ("bert", "32x32", {"bsr"}),
        ("bert", "2:4", {"2:4", "dense"}),
        ("vit", None, {"dense"}),
        ("resnet50", None, {"dense"}),
    ],
)
def test_compiles(tmp_path, name, structure, formats):
    model = tmp_path / "model.onnx"
    onnx.save(MODELS[name](), model)
    if structure is not None:
        pruned = tmp_path / "pruned.onnx"
        prune(model, pruned, sparsity=None if ":" in structure else 0.9, structure=structure)
        model = pruned
    result = sparse_tvm.compile(model, tmp_path / "model.so", target="cuda")
    assert {layer["format"] for layer in result.manifest["layers"]} == formats
    assert result.manifest["target"]["architectures"] == ["sm_80", "sm_89", "sm_90", "sm_100"]
