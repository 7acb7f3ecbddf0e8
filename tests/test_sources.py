"""The same models from every source: they compile, and agree with their own framework."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_models as models  # skips where a framework is missing
import torch

import sparse_tvm

SOURCES = ("onnx", "pt2", "module", "keras", "savedmodel", "tflite")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("bert")
    model = models.bert()
    inputs = models.bert_inputs()
    tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=models.POSITIONS)
    dynamic = dict.fromkeys(tensors, (batch, sequence))
    program = torch.export.export(model, (), tensors, dynamic_shapes=dynamic, strict=False)
    torch.export.save(program, directory / "bert.pt2")
    names = ["last_hidden_state", "pooler_output"]
    torch.onnx.export(
        model,
        (),
        directory / "bert.onnx",
        kwargs=tensors,
        dynamic_shapes=dynamic,
        dynamo=True,
        output_names=names,
        input_names=list(tensors),
    )
    model.save_pretrained(directory / "bert")
    with torch.no_grad():
        outputs = model(**tensors)
    return {
        "onnx": directory / "bert.onnx",
        "pt2": directory / "bert.pt2",
        "module": model,
        "huggingface": directory / "bert",
        **models.save_keras(models.keras_bert(model), directory),
        "options": {"example_inputs": tensors, "dynamic_shapes": dynamic},
        "inputs": inputs,
        "expected": {name: outputs[name].numpy() for name in names},
    }


@pytest.mark.parametrize("source", [*SOURCES, "huggingface"])
def test_bert(source: str, bert: dict[str, Any], tmp_path: Path) -> None:
    artifact = tmp_path / "bert.so"
    options = bert["options"] if source == "module" else {}
    result = sparse_tvm.compile(bert[source], artifact, **options)
    differences = result.manifest["verification"]["max_abs_diff"]
    assert max(differences.values()) < 1e-4
    outputs = sparse_tvm.load(artifact).run(bert["inputs"])
    for name, expected in bert["expected"].items():
        difference = np.abs(outputs[name] - expected).max()
        show(f"bert {source}", result, f"{name} {difference:.1e}")
        assert difference < 1e-4


def test_bert_takes_any_batch_and_sequence(bert: dict[str, Any], tmp_path: Path) -> None:
    result = sparse_tvm.compile(bert["huggingface"], tmp_path / "bert.so")
    assert result.manifest["inputs"][0]["shape"] == ["batch", "sequence"]
    compiled = sparse_tvm.load(result.path)
    for batch, sequence in ((1, 1), (3, 7), (2, 32)):
        inputs = models.bert_inputs(batch, sequence)
        with torch.no_grad():
            expected = bert["module"](**{k: torch.from_numpy(v) for k, v in inputs.items()})
        outputs = compiled.run(inputs)
        for name, values in outputs.items():
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("mobilenet")
    model = models.mobilenet()
    image = models.mobilenet_input()
    dynamic = ({0: torch.export.Dim("batch")},)
    arguments = (torch.from_numpy(image),)
    program = torch.export.export(model, arguments, dynamic_shapes=dynamic, strict=False)
    torch.export.save(program, directory / "mobilenet.pt2")
    torch.onnx.export(
        model, arguments, directory / "mobilenet.onnx", dynamic_shapes=dynamic, dynamo=True
    )
    with torch.no_grad():
        expected = model(*arguments).numpy()
    return {
        "onnx": directory / "mobilenet.onnx",
        "pt2": directory / "mobilenet.pt2",
        "module": model,
        **models.save_keras(models.keras_mobilenet(model), directory),
        "options": {"example_inputs": arguments, "dynamic_shapes": dynamic},
        "image": image,
        "expected": expected,
    }


@pytest.mark.parametrize("source", SOURCES)
def test_mobilenet(source: str, mobilenet: dict[str, Any], tmp_path: Path) -> None:
    artifact = tmp_path / "mobilenet.so"
    options = mobilenet["options"] if source == "module" else {}
    result = sparse_tvm.compile(mobilenet[source], artifact, **options)
    assert max(result.manifest["verification"]["max_abs_diff"].values()) < 1e-4
    compiled = sparse_tvm.load(artifact)
    image = mobilenet["image"]
    if compiled.inputs[0].shape[-1] == 3:
        image = image.transpose(0, 2, 3, 1)
    (output,) = compiled.run({compiled.inputs[0].name: image}).values()
    difference = np.abs(output - mobilenet["expected"]).max()
    show(f"mobilenet {source}", result, f"{difference:.1e}")
    assert np.abs(mobilenet["expected"]).max() > 0.01
    assert difference < 1e-4


def show(what: str, result: Any, difference: str) -> None:
    manifest = result.manifest
    compiled = manifest["compile"]
    sys.stderr.write(
        f"{what}: against {manifest['verification']['reference']} "
        f"{max(manifest['verification']['max_abs_diff'].values()):.1e}, against PyTorch "
        f"{difference}; {compiled['seconds']:.1f} s, "
        f"{compiled['peak_memory_bytes'] / 2**20:.0f} MiB\n"
    )
