"""What residuals are stored as between norms, on the emulated GPU against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_tvm
from sparse_tvm.models.bert import BertConfig, build_bert

pytestmark = pytest.mark.usefixtures("gpu")

CONFIG = BertConfig(
    layers=2, hidden=64, heads=2, intermediate=128, vocabulary=100, max_positions=16
)


def norms(model, tmp_path, **options) -> tuple[set[str], float]:
    """The kernels of a model's norms, and how far its output is from ONNX Runtime's."""
    result = sparse_tvm.compile(
        model, tmp_path / "model.so", target="cuda-sm80", verify=True, **options
    )
    (difference,) = result.manifest["verification"]["max_abs_diff"].values()
    return {
        name for name in result.manifest["kernels"] if name.startswith("layer_norm")
    }, difference


def test_norms_hand_on_remainders(tmp_path):
    found, difference = norms(build_bert(CONFIG, batch=2, sequence=8), tmp_path)
    assert found == {
        "layer_norm_64_uint8",
        "layer_norm_64_residual_whole_uint8",
        "layer_norm_64_residual_whole",
    }
    assert difference < 4e-3


def test_bfloat16_hands_on_float32(tmp_path):
    model = build_bert(CONFIG, batch=2, sequence=8)
    found, _ = norms(model, tmp_path, precision="bf16")
    assert found == {
        "layer_norm_64_float32",
        "layer_norm_64_residual_float32",
        "layer_norm_64_residual",
    }


def test_a_residual_that_a_layer_adds_stays_float32(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "gamma": np.ones(64),
        "beta": np.zeros(64),
        **{f"w{i}": rng.standard_normal((64, 64)) / 8 for i in range(2)},
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["normed"], axis=-1),
        helper.make_node("MatMul", ["normed", "w0"], ["product"]),
        helper.make_node("Add", ["product", "normed"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["positive"]),
        helper.make_node("MatMul", ["positive", "w1"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [6, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [6, 64])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    found, _ = norms(model, tmp_path)
    assert found == {"layer_norm_64_float32"}


def test_what_a_norm_reads_otherwise_stays_float32(tmp_path):
    rng = np.random.default_rng(1)
    arrays = {"gamma": np.ones(64), "beta": np.zeros(64), "w": rng.standard_normal((64, 64)) / 8}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["normed"], axis=-1),
        helper.make_node("LayerNormalization", ["normed", "gamma", "beta"], ["again"], axis=-1),
        helper.make_node("MatMul", ["normed", "w"], ["product"]),
        helper.make_node("Add", ["product", "again"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "twice",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [6, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [6, 64])],
        [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    opset = helper.make_opsetid("", 17)
    found, _ = norms(helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path)
    assert not any("uint8" in name for name in found)
