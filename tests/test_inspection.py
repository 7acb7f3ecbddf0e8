from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sample_manifest import sample_manifest

from sparse_tvm.artifact import write_artifact
from sparse_tvm.cli import main
from sparse_tvm.errors import ArtifactError, ModelError
from sparse_tvm.inspection import inspect
from sparse_tvm.sparsity.masks import prune_array


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    blocks = prune_array(rng.standard_normal((64, 32), dtype=np.float32), 0.75, "4x1")
    dense = rng.standard_normal((64, 10), dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "hidden.weight"], ["h"], name="fc1", transB=1),
            helper.make_node("MatMul", ["h", "onnx::MatMul_7"], ["g"], name="fc2"),
            helper.make_node("Add", ["g", "bias"], ["y"]),
        ],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [
            numpy_helper.from_array(blocks, "hidden.weight"),
            numpy_helper.from_array(dense, "onnx::MatMul_7"),
            numpy_helper.from_array(np.zeros(10, np.float32), "bias"),
        ],
    )
    path = tmp_path / "model.bin"  # what a file is does not depend on its name
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="pytest"
    )
    onnx.save(proto, path)
    return path


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    library = tmp_path / "library"
    library.write_bytes(b"\x7fELF and code")
    path = tmp_path / "model.onnx"
    write_artifact(path, library, {"w": np.ones(3, np.float32)}, sample_manifest())
    return path


def test_model(model: Path) -> None:
    found = inspect(model)
    first, second = found.pop("layers")
    assert found == {
        "file": str(model),
        "kind": "ONNX model",
        "opset": 17,
        "ir_version": 8,
        "producer": "pytest",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 32]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 10]}],
        "totals": {
            "parameters": 64 * 32 + 640,
            "nonzeros": 512 + 640,
            "sparsity": 1 - 1152 / 2688,
            "other_parameters": 10,
        },
    }
    fills = first.pop("block_fill")
    assert (fills["4x1"], fills["1x1"]) == (1.0, 1.0)
    assert fills["8x1"] < 0.7
    assert first == {
        "origin": "zeros in a dense weight",
        "name": "hidden",
        "op": "Gemm",
        "nodes": ["fc1"],
        "shape": [64, 32],
        "parameters": 2048,
        "nnz": 512,
        "sparsity": 0.75,
        "structure": "4x1 blocks (fill 1.00)",
        "block": [4, 1],
        "n_m": None,
    }
    assert (second["name"], second["shape"], second["structure"]) == ("fc2", [10, 64], "dense")


def test_model_on_the_command_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model)]) == 0
    printed = capsys.readouterr().out
    for text in ("hidden", "64x32", "75.0 %", "4x1 blocks (fill 1.00)", "x float32[batch, 32]"):
        assert text in printed


def test_json_is_all_that_stdout_gets(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == inspect(model)


def test_artifact(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = inspect(artifact)
    assert manifest["layers"] == sample_manifest()["layers"]
    assert main(["inspect", str(artifact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == manifest
    assert main(["inspect", str(artifact)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "input_ids int64[1, 128]",
        "last_hidden_state float32[1, 128, 768]",
        "bert_base",
        "znver3",
        "avx2, fma",
        "109.5 M",
        "build 21.5 s",
        "ONNX Runtime 1.31.1",
        "tvm 0.27.0.post1",
    ):
        assert text in printed


def test_files_that_are_neither(
    tmp_path: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match="no such file"):
        inspect(tmp_path / "missing.onnx")
    empty = tmp_path / "empty.so"
    empty.touch()
    with pytest.raises(ModelError, match="empty"):
        inspect(empty)
    truncated = tmp_path / "truncated.so"
    truncated.write_bytes(artifact.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="truncated"):
        inspect(truncated)
    assert main(["inspect", str(truncated), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
