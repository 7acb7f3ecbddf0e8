"""One script, run against ONNX Runtime and against the session of the same name."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import artifacts
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_tvm
from sparse_tvm.errors import InputError
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
def session(tmp_path: Path) -> InferenceSession:
    return InferenceSession(artifacts.write(tmp_path / "small.so"))


def test_outputs_come_as_asked(session: InferenceSession) -> None:
    ids, y = session.run(["same_ids", "y"], artifacts.inputs())
    np.testing.assert_array_equal(ids, artifacts.inputs()["ids"])
    np.testing.assert_allclose(y, artifacts.expected(artifacts.inputs()), atol=1e-5)
    assert [arg.type for arg in session.get_inputs()] == ["tensor(float)", "tensor(int64)"]
    assert session.get_providers() == ["SparseTvmCpuExecutionProvider"]


def test_an_unknown_output_is_named(session: InferenceSession) -> None:
    with pytest.raises(InputError, match="no output 'z'"):
        session.run(["z"], artifacts.inputs())


def test_a_failed_asynchronous_run_says_why(session: InferenceSession) -> None:
    said: list[str] = []
    done = threading.Event()

    def callback(outputs: list[np.ndarray], _data: object, error: str) -> None:
        said.extend([error, *map(str, outputs)])
        done.set()

    session.run_async(None, {}, callback, None)
    assert done.wait(30)
    assert "missing input" in said[0]
    assert len(said) == 1
