"""Models in low precision: what is rounded where, how close it comes, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import sparse_tvm
from sparse_tvm.errors import OptionError, SparseTvmError, VerificationError
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.verification import Similarity

SMALL = BertConfig(layers=1, hidden=64, heads=2, intermediate=128, vocabulary=100, max_positions=64)
BF16_TARGETS = {"sapphirerapids": "amx", "avx512-bf16": "avx512bf16"}
"""What attention multiplies bf16 by, on the targets that compute in it."""
INT8_TARGETS = ["sapphirerapids", "avx512-vnni", "avx-vnni", "x86-64-v3", "x86-64-v2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("precision") / "bert.onnx"
    onnx.save(build_bert(SMALL, batch="batch", sequence="sequence"), path)
    return path


def compiled(model, tmp_path, **options):
    return sparse_tvm.compile(model, tmp_path / "model.so", **options).manifest


def kernels(manifest):
    return {name: len(kernel["layers"]) for name, kernel in manifest["kernels"].items()}


@pytest.mark.parametrize("target", INT8_TARGETS)
@pytest.mark.parametrize(("sparsity", "structure"), [(0, ""), (0.8, "unstructured"), (0.8, "4x4")])
def test_int8_agrees_on_every_target(model, tmp_path, target, sparsity, structure, on_target):
    if sparsity:
        pruned = tmp_path / "pruned.onnx"
        sparse_tvm.prune(model, pruned, sparsity=sparsity, structure=structure)
        model = pruned
    manifest = compiled(
        model, tmp_path, precision="int8", target=on_target(target), min_cosine=0.99
    )
    similar = manifest["verification"]["similarity"]["last_hidden_state"]
    assert similar["cosine"] >= 0.99
    assert {layer["precision"] for layer in manifest["layers"]} == {"int8"}


@pytest.mark.parametrize("target", BF16_TARGETS)
def test_bf16_is_closer_than_int8_and_rounds_in_producers(model, tmp_path, target, on_target):
    bf16 = compiled(model, tmp_path, precision="bf16", target=on_target(target))
    int8 = compiled(model, tmp_path, precision="int8", target=target)
    cosines = [
        manifest["verification"]["similarity"]["last_hidden_state"]["cosine"]
        for manifest in (bf16, int8)
    ]
    assert 0.9999 < cosines[0] > cosines[1]
    found = kernels(int8)
    assert found[f"attention_bf16_{BF16_TARGETS[target]}_2x32_to_int8"] == 1
    assert any(name.endswith("gelu_to_int8") for name in found)
    assert sum("to_bf16" in name for name in found) == 1, "q, k and v share a kernel"
    assert found["round_64_to_int8"] == 2, "layer norms that a residual reads too"
    half = int8["totals"]["weight_bytes"] < bf16["totals"]["weight_bytes"]
    assert half


def test_rules_set_the_precision_of_layers(model, tmp_path):
    manifest = compiled(model, tmp_path, layer_rules=["query|key=@int8", "key=dense@fp32"])
    precisions = {layer["name"]: layer["precision"] for layer in manifest["layers"]}
    assert {name for name, value in precisions.items() if value == "int8"} == {
        name for name in precisions if "query" in name
    }


def test_parsing_of_rules():
    options = FormatOptions.parse(rules=["a=bsr:16x4@int8", "b=@bf16"], precision="int8")
    assert options.rules[0].block == (16, 4)
    assert options.precision_for("b") == "bf16"
    assert options.rule_for("b") is None
    assert options.precisions == ["int8", "bf16"]
    for bad in ("a=@", "a=@fp12", "a=bsr:16x4@"):
        with pytest.raises(OptionError):
            FormatOptions.parse(rules=[bad])


def test_what_the_target_lacks_is_refused(model, tmp_path):
    with pytest.raises(SparseTvmError, match=r"x86-64-v2 has no kernels for fp16.*F16C") as refused:
        compiled(model, tmp_path, precision="fp16", target="x86-64-v2")
    assert "--precision fp32 or bf16 or int8" in refused.value.hint
    with pytest.raises(SparseTvmError, match="unknown precision 'int4'"):
        compiled(model, tmp_path, precision="int4")
    assert not list(tmp_path.iterdir())


def test_a_worse_cosine_than_asked_for_is_refused(model, tmp_path):
    with pytest.raises(VerificationError, match=r"less than 1\.0"):
        compiled(model, tmp_path, precision="int8", min_cosine=1.0)
    assert not list(tmp_path.iterdir())


def test_verification_on_given_inputs(model, tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 100, (2, 9))
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    manifest = compiled(model, tmp_path, precision="int8", verify_inputs=inputs)
    assert manifest["verification"]["similarity"]["last_hidden_state"]["cosine"] > 0.99
    with pytest.raises(SparseTvmError):
        compiled(model, tmp_path, precision="int8", verify_inputs={"no_such_input": ids})


def test_similarity():
    ours = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    theirs = np.array([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    found = Similarity.of(ours, theirs).as_json()
    assert found["cosine"] == 0
    assert found["top1"] == pytest.approx(2 / 3)
    assert found["mean_abs_diff"] == pytest.approx(4 / 6)
    assert Similarity.of(theirs, theirs).cosine == 1
    assert "top1" not in Similarity.of(ours[None], theirs[None]).as_json()
