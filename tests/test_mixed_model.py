"""A model with sparse, block-sparse, dense and excluded layers becomes what was asked for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from amx_emulator import emulated_target

import sparse_tvm
from sparse_tvm.errors import OptionError
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.targets import TARGETS, runs_here

CONFIG = BertConfig(
    layers=2, hidden=192, heads=4, intermediate=384, vocabulary=100, max_positions=64
)
RULES = (r"0\..*attention\.output=dense", r"1\..*intermediate=csr", r"1\..*value=bsr:2x1")
TOKENS = 19


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention 90 % in 4x1 blocks, intermediate layers 95 % unstructured, the rest dense."""
    directory = tmp_path_factory.mktemp("mixed")
    onnx.save(build_bert(CONFIG, sequence=TOKENS), directory / "dense.onnx")
    sparse_tvm.prune(
        directory / "dense.onnx",
        directory / "attention.onnx",
        sparsity=0.9,
        structure="4x1",
        layers="attention",
    )
    path = directory / "mixed.onnx"
    sparse_tvm.prune(directory / "attention.onnx", path, sparsity=0.95, layers="intermediate")
    return path


@pytest.fixture(scope="module")
def compiled(model: Path) -> sparse_tvm.compiler.CompileResult:
    return sparse_tvm.compile(
        model, model.with_name("mixed.so"), target="x86-64-v3", layer_rules=RULES
    )


def layers_of(manifest: dict) -> dict[str, dict]:
    return {layer["name"]: layer for layer in manifest["layers"]}


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (1, TOKENS)
    mask = np.ones(shape, np.int64)
    mask[:, 15:] = 0
    return {
        "input_ids": rng.integers(0, CONFIG.vocabulary, shape),
        "attention_mask": mask,
        "token_type_ids": np.zeros(shape, np.int64),
    }


def expected_form(name: str) -> tuple[str, list[int] | None]:
    """What becomes of a layer by its name."""
    if re.search(RULES[0].removesuffix("=dense"), name):
        return "dense", None
    if re.search(r"1\..*value", name):
        return "bsr", [2, 1]
    if "attention" in name:
        return "bsr", [2, 1]  # AVX2: three tiles share registers with two rows, one with four
    return ("csr", None) if re.search(r"1\..*intermediate", name) else ("dense", None)


def test_every_layer_has_its_form(compiled):
    layers = layers_of(compiled.manifest)
    assert len(layers) == 12
    for name, layer in layers.items():
        if "0.intermediate" in name:  # the cost model's choice
            assert layer["format"] in ("csr", "bsr")
        else:
            assert (layer["format"], layer["block"]) == expected_form(name), name


def test_reasons(compiled):
    reasons = {name: layer["reason"] for name, layer in layers_of(compiled.manifest).items()}
    prefix = "encoder.layer"
    assert reasons[f"{prefix}.0.attention.output.dense"] == f"rule {RULES[0]}"
    assert reasons[f"{prefix}.1.intermediate.dense"].startswith(f"rule {RULES[1]}; ")
    assert reasons[f"{prefix}.1.attention.self.value"].startswith(f"rule {RULES[2]}; ")
    assert re.fullmatch(
        r"\d+\.\dx faster than dense \(predicted\)", reasons[f"{prefix}.0.attention.self.query"]
    )
    assert reasons[f"{prefix}.0.output.dense"] == "no zeros"


def test_manifest_agrees_with_inspect_of_the_model(model, compiled):
    found = {layer["name"]: layer for layer in sparse_tvm.inspect(model)["layers"]}
    layers = layers_of(compiled.manifest)
    assert set(found) == set(layers)
    for name, layer in layers.items():
        for key in ("shape", "sparsity", "nnz", "structure"):
            assert layer[key] == found[name][key], (name, key)
    structures = {name: layer["structure"] for name, layer in layers.items()}
    assert structures["encoder.layer.0.attention.self.key"].startswith("4x1 blocks")
    assert structures["encoder.layer.0.intermediate.dense"] == "unstructured"
    assert structures["encoder.layer.0.output.dense"] == "dense"


def test_manifest_is_what_inspect_says_of_the_artifact(compiled):
    assert sparse_tvm.inspect(compiled.path) == compiled.manifest


def test_stored_weights_take_the_bytes_reported(compiled):
    """Sparse layers shrink: four bytes a value, four an index, little else."""
    for layer in compiled.manifest["layers"]:
        n, k = layer["shape"]
        if layer["format"] == "dense":
            assert n * k * 4 <= layer["bytes"] <= (n + 16) * k * 4
        elif layer["format"] == "csr":
            assert layer["bytes"] <= 8 * layer["nnz"] + 4 * (n + 64)
    sizes = {weight["name"]: weight["nbytes"] for weight in compiled.manifest["weights"]}
    assert sum(layer["bytes"] for layer in compiled.manifest["layers"]) <= sum(sizes.values())


def test_kernels_name_every_layer_once(compiled):
    served = [
        layer
        for kernel in compiled.manifest["kernels"].values()
        if kernel["kind"] == "dense"
        for layer in kernel["layers"]
    ]
    assert sorted(served) == sorted(layers_of(compiled.manifest))


def test_outputs_were_verified(compiled):
    verification = compiled.manifest["verification"]
    assert set(verification["max_abs_diff"]) == {"last_hidden_state"}
    assert verification["max_abs_diff"]["last_hidden_state"] < 1e-4


def test_same_outputs_on_any_number_of_threads(model, compiled):
    session = onnxruntime.InferenceSession(model)
    (expected,) = session.run(None, inputs())
    results = []
    for threads in (1, 2, 3):
        loaded = sparse_tvm.load(compiled.path, threads=threads)
        assert loaded.threads == threads
        results.append(loaded.run(inputs())["last_hidden_state"])
    np.testing.assert_allclose(results[0], expected, atol=1e-4)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def compiled_with(model: Path, directory: Path, **options) -> dict[str, dict]:
    result = sparse_tvm.compile(model, directory / "model.so", target="x86-64-v3", **options)
    assert result.manifest["verification"] is not None
    return layers_of(result.manifest)


def test_threshold_keeps_layers_dense(model, tmp_path):
    layers = compiled_with(model, tmp_path, threshold=0.93)
    for name, layer in layers.items():
        assert (layer["format"] != "dense") == ("intermediate" in name), name
    query = layers["encoder.layer.0.attention.self.query"]
    assert re.fullmatch(r"sparsity 90\.\d% is below the threshold 0\.93", query["reason"])


@pytest.mark.parametrize(
    ("format", "block", "stored"),
    [("dense", None, None), ("csr", None, None), ("bsr", "4x1", [4, 1]), ("bsr", "3x5", [3, 5])],
)
def test_format_of_all_layers(model, tmp_path, format, block, stored):
    layers = compiled_with(model, tmp_path, format=format, block=block)
    assert {layer["format"] for layer in layers.values()} == {format}
    assert all(layer["block"] == stored for layer in layers.values())
    assert all(f"--format {format}" in layer["reason"] for layer in layers.values())


def test_rule_that_matches_nothing_is_refused(model, tmp_path):
    with pytest.raises(OptionError, match="'decoder=csr' matches no layer") as refusal:
        sparse_tvm.compile(model, tmp_path / "model.so", layer_rules=("decoder=csr",))
    assert "encoder.layer.0" in str(refusal.value.hint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", list(TARGETS))
def test_every_target_compiles_and_verifies(model, tmp_path, name, on_target):
    here = runs_here(TARGETS[name]) or TARGETS[name] is emulated_target()
    if here:
        on_target(name)
    result = sparse_tvm.compile(model, tmp_path / "model.so", target=name, verify=here)
    assert result.manifest["target"]["name"] == name
    assert (result.manifest["verification"] is not None) == here


def test_dump_ir_writes_the_module_after_each_phase(model, tmp_path):
    dumps = tmp_path / "ir"
    phases: list[str] = []
    result = sparse_tvm.compile(
        model, tmp_path / "model.so", dump_ir=dumps, verify=False, progress=phases.append
    )
    assert phases == [phase["name"] for phase in result.manifest["compile"]["phases"]]
    transforming = [name for name in phases if name != "link"]
    texts = {
        name: (dumps / f"{number:02}_{name.replace(' ', '_')}.py").read_text()
        for number, name in enumerate(transforming, start=1)
    }
    assert len(list(dumps.iterdir())) == len(texts)
    assert all("def main(" in text for text in texts.values())
    assert "R.matmul" in texts["import"]
    assert "sparse_tvm.dense" in texts["fuse"]
    assert "sparse_tvm.attention" in texts["fuse"]
    assert "layout" not in texts["fuse"]
    for format in ("dense", "csr", "bsr"):
        assert re.search(rf"format\W+{format}\W", texts["dense to sparse"]), format
    assert "sparse_tvm.lane_pack" not in texts["dense to sparse"]
    assert "sparse_tvm.lane_pack" in texts["lane layout"]
    assert "T.parallel" in texts["schedule"]
    assert "call_dps_packed" not in texts["schedule"]
