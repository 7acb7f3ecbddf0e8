"""What is computed of weights alone is computed when the model is compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_tvm
from sparse_tvm.frontends.onnx.simplify import input_specs, simplify
from sparse_tvm.reference import Reference

RNG = np.random.default_rng(0)


def model_of(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: tuple[str, ...] = ("y",)
) -> onnx.ModelProto:
    """A model of ``x [batch, 16]``."""
    graph = helper.make_graph(
        nodes,
        "folded",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", "n"]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def operators(model: onnx.ModelProto) -> list[str]:
    program, _ = simplify(model, input_specs(model))
    return [node.op_type for node in program.graph.node]


def relative_positions() -> onnx.ModelProto:
    """Scores of x and of positions that have a layer norm and a projection, as in DeBERTa."""
    nodes = [
        helper.make_node("LayerNormalization", ["positions", "gain"], ["normal"]),
        helper.make_node("MatMul", ["normal", "weight"], ["projected"]),
        helper.make_node("Transpose", ["projected"], ["keys"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "weight"], ["queries"]),
        helper.make_node("MatMul", ["queries", "keys"], ["y"]),
    ]
    weights = {"positions": values(24, 16), "gain": values(16), "weight": values(16, 16)}
    return model_of(nodes, weights)


def standardised() -> onnx.ModelProto:
    """A weight without its rows' mean and variance, by a batch norm in training."""
    nodes = [
        helper.make_node("Identity", ["shape"], ["other_shape"]),
        helper.make_node(
            "BatchNormalization",
            ["weight", "gain", "zeros", "zeros", "zeros"],
            ["standard", "mean", "variance"],
            training_mode=1,
        ),
        helper.make_node("Reshape", ["standard", "other_shape"], ["matrix"]),
        helper.make_node("Gemm", ["x", "matrix"], ["y"], transB=1),
    ]
    weights = {"weight": values(1, 32, 16), "gain": values(32), "zeros": np.zeros(32, np.float32)}
    return model_of(nodes, {**weights, "shape": np.array([32, 16])})


@pytest.mark.parametrize("make", [relative_positions, standardised])
def test_result_is_a_weight_like_others(make: object, tmp_path: Path) -> None:
    model = make()  # type: ignore[operator]
    assert set(operators(model)) <= {"MatMul", "Gemm", "Transpose"}
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    sparse_tvm.compile(path, tmp_path / "model.so")
    feed = {"x": values(3, 16)}
    found, expected = (
        sparse_tvm.load(tmp_path / "model.so").run(feed),
        Reference(path, threads=1).run(feed),
    )
    np.testing.assert_allclose(found["y"], expected["y"], rtol=1e-4, atol=1e-5)


def test_form_alone_stays() -> None:
    nodes = [
        helper.make_node("Transpose", ["weight"], ["transposed"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "transposed"], ["y"]),
    ]
    _, weights = simplify(model := model_of(nodes, {"weight": values(8, 16)}), input_specs(model))
    assert list(weights) == ["weight"]


def test_much_larger_result_stays() -> None:
    nodes = [
        helper.make_node("MatMul", ["column", "row"], ["matrix"]),
        helper.make_node("Gather", ["matrix", "rows"], ["some"]),
        helper.make_node("Add", ["x", "some"], ["y"]),
    ]
    weights = {"column": values(1 << 18, 1), "row": values(1, 16)}
    model = model_of(nodes, {**weights, "rows": np.array([3])})
    assert operators(model)[0] == "MatMul"


def test_chance_and_outputs_stay() -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["weight"], ["noise"]),
        helper.make_node("Mul", ["noise", "weight"], ["noisy"]),
        helper.make_node("MatMul", ["x", "noisy"], ["y"]),
        helper.make_node("Exp", ["weight"], ["z"]),
    ]
    model = model_of(nodes, {"weight": values(16, 16)}, ("y", "z"))
    assert {"RandomNormalLike", "Mul", "Exp"} <= set(operators(model))


def test_quantised_weight_stays() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["stored", "scale"], ["weight"], axis=1),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    stored = RNG.integers(-127, 128, (16, 64)).astype(np.int8)
    assert "DequantizeLinear" in operators(
        model_of(nodes, {"stored": stored, "scale": np.abs(values(64))})
    )
