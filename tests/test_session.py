"""One script, run against ONNX Runtime and against the session of the same name."""

from __future__ import annotations

import runpy
import subprocess
import sys
import threading
from pathlib import Path

import artifacts
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_tvm
from sparse_tvm import session
from sparse_tvm.errors import InputError, OptionError
from sparse_tvm.models import bert
from sparse_tvm.session import InferenceSession

SCRIPT = """
import sys
import threading

import numpy as np
import onnxruntime as ort

options = ort.SessionOptions()
options.intra_op_num_threads = 2
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feeds = {}
for arg in session.get_inputs():
    print(arg.name, arg.type, arg.shape)
    shape = [size if isinstance(size, int) else 3 for size in arg.shape]
    feeds[arg.name] = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
names = [arg.name for arg in session.get_outputs()]
print(names, [(arg.type, arg.shape) for arg in session.get_outputs()])
(all_of_them,) = session.run(None, feeds)
(named,) = session.run(names, feeds)
assert np.array_equal(all_of_them, named)
done = threading.Event()


def callback(outputs, user_data, error):
    assert not error and user_data == "mine"
    assert np.array_equal(outputs[0], named)
    done.set()


session.run_async(None, feeds, callback, "mine")
assert done.wait(30)
print((np.round(named, 2) + 0.0).tolist())
"""
OURS = SCRIPT.replace("import onnxruntime as ort", "from sparse_tvm import session as ort")


def sparse_model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 32), dtype=np.float32) * (rng.random((64, 32)) < 0.1)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def said_by(script: str, model: Path) -> str:
    command = [sys.executable, "-c", script, str(model)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_for_onnx_runtime_runs_with_only_its_import_changed(tmp_path: Path) -> None:
    assert OURS != SCRIPT
    onnx.save(sparse_model(), tmp_path / "model.onnx")
    sparse_tvm.compile(tmp_path / "model.onnx", tmp_path / "model.so")
    theirs = said_by(SCRIPT, tmp_path / "model.onnx")
    assert theirs == said_by(OURS, tmp_path / "model.so")
    assert "x tensor(float) ['batch', 64]" in theirs


@pytest.fixture
def small(tmp_path: Path) -> InferenceSession:
    return InferenceSession(artifacts.write(tmp_path / "small.so"))


def test_outputs_come_as_asked(small: InferenceSession) -> None:
    ids, y = small.run(["same_ids", "y"], artifacts.inputs())
    np.testing.assert_array_equal(ids, artifacts.inputs()["ids"])
    np.testing.assert_allclose(y, artifacts.expected(artifacts.inputs()), atol=1e-5)
    assert [arg.type for arg in small.get_inputs()] == ["tensor(float)", "tensor(int64)"]
    assert small.get_providers() == ["CPUExecutionProvider"]


def test_an_unknown_output_is_named(small: InferenceSession) -> None:
    with pytest.raises(InputError, match="no output 'z'"):
        small.run(["z"], artifacts.inputs())


def test_a_failed_asynchronous_run_says_why(small: InferenceSession) -> None:
    said: list[str] = []
    done = threading.Event()

    def callback(outputs: list[np.ndarray], _data: object, error: str) -> None:
        said.extend([error, *map(str, outputs)])
        done.set()

    small.run_async(None, {}, callback, None)
    assert done.wait(30)
    assert "missing input" in said[0]
    assert len(said) == 1


IMPORT = "import onnxruntime as onnxrt"


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, Path]:
    """ONNX Runtime's own test tool as it ships, and again with nothing but its import changed."""
    theirs = Path(onnxruntime.__file__).parent / "tools" / "onnxruntime_test.py"
    text = theirs.read_text(encoding="utf-8")
    assert text.count(IMPORT) == 1
    ours = tmp_path / "tool.py"
    ours.write_text(text.replace(IMPORT, "from sparse_tvm import session as onnxrt"))
    return {"model.onnx": theirs, "model.so": ours}


def test_the_test_tool_of_onnx_runtime_runs(tools: dict[str, Path], tmp_path: Path) -> None:
    onnx.save(sparse_model(), tmp_path / "model.onnx")
    sparse_tvm.compile(tmp_path / "model.onnx", tmp_path / "model.so")
    for model, tool in tools.items():
        command = [sys.executable, tool, tmp_path / model, "5", "--symbolic_dims", "batch=3"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "iterations: 5\navg latency: " in done.stdout


def test_the_test_tool_of_onnx_runtime_gets_the_same_outputs(
    tools: dict[str, Path], tmp_path: Path
) -> None:
    config = bert.BertConfig(layers=1, hidden=32, heads=2, intermediate=32)
    model = bert.build_bert(config, batch="batch", sequence="sequence")
    onnx.save(model, tmp_path / "model.onnx")
    sparse_tvm.compile(tmp_path / "model.onnx", tmp_path / "model.so", verify=False)
    ids = np.arange(16).reshape(2, 8)
    feeds = {arg.name: np.ones_like(ids) for arg in model.graph.input} | {"input_ids": ids}
    outputs = [
        runpy.run_path(str(tool))["run_model"](str(tmp_path / name), feeds=feeds)[2]
        for name, tool in tools.items()
    ]
    for expected, ours in zip(*outputs, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_options_that_optimise_a_graph_change_nothing(tmp_path: Path) -> None:
    options = session.SessionOptions()
    options.graph_optimization_level = session.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.execution_mode = session.ExecutionMode.ORT_PARALLEL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = 1
    path = artifacts.write(tmp_path / "small.so")
    opened = InferenceSession(path, options, providers=session.get_available_providers())
    outputs = opened.run(None, artifacts.inputs(), session.RunOptions())
    assert len(outputs) == len(opened.get_outputs())
    assert opened.get_session_options().intra_op_num_threads == 1
    assert opened.get_modelmeta().graph_name


@pytest.mark.parametrize(
    ("option", "value"), [("enable_profiling", True), ("optimized_model_filepath", "to.onnx")]
)
def test_options_that_ask_for_a_file_are_refused(tmp_path: Path, option: str, value: object):
    options = session.SessionOptions(**{option: value})
    with pytest.raises(OptionError):
        InferenceSession(artifacts.write(tmp_path / "small.so"), options)


def test_a_model_in_memory_is_refused() -> None:
    with pytest.raises(OptionError, match="takes the path"):
        InferenceSession(b"not a path")
