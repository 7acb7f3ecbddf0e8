from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_tvm.frontends.onnx.detach import as_array
from sparse_tvm.frontends.onnx.weights import (
    WeightRef,
    canonical,
    find_weights,
    replace_data,
    stored,
)


def model_of(nodes: list[onnx.NodeProto], **initializers: np.ndarray) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in initializers.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "test", [x], [y], tensors))


def only(model: onnx.ModelProto) -> WeightRef:
    (ref,) = find_weights(model)
    return ref


W = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("nodes", "op", "transposed", "shape"),
    [
        ([("MatMul", ["x", "w"], {})], "MatMul", True, (3, 2)),
        ([("MatMul", ["w", "x"], {})], "MatMul", False, (2, 3)),
        ([("Gemm", ["x", "w"], {})], "Gemm", True, (3, 2)),
        ([("Gemm", ["x", "w"], {"transB": 1})], "Gemm", False, (2, 3)),
        ([("Transpose", ["w"], {}), ("MatMul", ["x", "t0"], {})], "MatMul", False, (2, 3)),
        (
            [("Transpose", ["w"], {"perm": [0, 1]}), ("MatMul", ["x", "t0"], {})],
            "MatMul",
            True,
            (3, 2),
        ),
        (
            [
                ("Identity", ["w"], {}),
                ("Transpose", ["t0"], {"perm": [1, 0]}),
                ("Gemm", ["x", "t1"], {"transB": 1}),
            ],
            "Gemm",
            True,
            (3, 2),
        ),
    ],
)
def test_orientation(
    nodes: list[tuple[str, list[str], dict[str, object]]],
    op: str,
    transposed: bool,
    shape: tuple[int, int],
) -> None:
    protos = [
        helper.make_node(kind, inputs, [f"t{index}"], **attributes)
        for index, (kind, inputs, attributes) in enumerate(nodes)
    ]
    ref = only(model_of(protos, w=W))
    assert (ref.op, ref.transposed, ref.shape, ref.initializer) == (op, transposed, shape, "w")
    matrix = canonical(ref, W)
    assert matrix.shape == shape
    assert matrix.flags.c_contiguous
    np.testing.assert_array_equal(matrix, W.T if transposed else W)
    np.testing.assert_array_equal(stored(ref, matrix, W.shape), W)


def test_conv_is_a_matrix_of_filters() -> None:
    kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    ref = only(model_of([helper.make_node("Conv", ["x", "w"], ["y"])], w=kernel))
    assert (ref.op, ref.shape, ref.transposed) == ("Conv", (2, 12), False)
    matrix = canonical(ref, kernel)
    assert np.shares_memory(matrix, kernel)
    np.testing.assert_array_equal(stored(ref, matrix, kernel.shape), kernel)


def test_weight_in_a_constant_node() -> None:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(W))
    ref = only(model_of([constant, helper.make_node("MatMul", ["x", "c"], ["y"], name="fc")]))
    assert (ref.initializer, ref.layer) == ("c", "c")


def test_what_is_no_weight() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "half"], ["a"]),
        helper.make_node("MatMul", ["x", "batched"], ["b"]),
        helper.make_node("MatMul", ["w", "w"], ["c"]),
        helper.make_node("Gather", ["w", "x"], ["d"]),
        helper.make_node("MatMul", ["x", "x"], ["e"]),
        helper.make_node("Transpose", ["kernel"], ["t"], perm=[1, 0, 2, 3]),
        helper.make_node("Transpose", ["t"], ["u"], perm=[0, 1, 3, 2]),
        helper.make_node("Conv", ["x", "u"], ["f"]),
        helper.make_node("MatMul", ["x", "w"], ["g"], domain="com.example"),
    ]
    tensors = {
        "w": np.ones((2, 2), np.float32),
        "half": W.astype(np.float16),
        "batched": W[None],
        "kernel": np.ones((2, 2, 3, 3), np.float32),
    }
    assert find_weights(model_of(nodes, **tensors)) == []


def test_tied_weight_is_listed_once() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Gemm", ["a", "w"], ["y"], transB=1),
    ]
    ref = only(model_of(nodes, w=W))
    assert ref.nodes == ("first", "y")
    assert (ref.op, ref.transposed) == ("MatMul", True)


@pytest.mark.parametrize(
    ("initializer", "node", "layer"),
    [
        ("encoder.layer.0.query.weight", "/q/MatMul", "encoder.layer.0.query"),
        ("dense/MatMul/ReadVariableOp:0", "n", "dense/MatMul/ReadVariableOp:0"),
        ("onnx::MatMul_123", "/encoder/query/MatMul", "/encoder/query/MatMul"),
        ("val_12", "node_MatMul_3", "node_MatMul_3"),
        ("const_fold_opt__7", "fc1", "fc1"),
        ("123", "fc1", "fc1"),
        ("/Constant_7_output_0", "fc1", "fc1"),
        (".weight", "fc1", "fc1"),
        ("onnx::Gemm_9", "", "MatMul_0"),
        ("v2", "n", "n"),
        ("vit", "n", "vit"),
    ],
)
def test_layer_names(initializer: str, node: str, layer: str) -> None:
    nodes = [helper.make_node("MatMul", ["x", initializer], ["y"], name=node)]
    assert only(model_of(nodes, **{initializer: W})).layer == layer


def test_layer_names_are_unique() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", name], [f"y{index}"], name="fc")
        for index, name in enumerate(["fc", "fc.weight", "onnx::MatMul_1"])
    ]
    refs = find_weights(model_of(nodes, **{n.input[1]: W for n in nodes}))
    assert [ref.layer for ref in refs] == ["fc", "fc_2", "fc_3"]


@pytest.mark.parametrize("storage", ["raw", "floats", "external"])
def test_replace_data(storage: str, tmp_path: Path) -> None:
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], w=W)
    tensor = model.graph.initializer[0]
    if storage == "floats":
        tensor.CopyFrom(helper.make_tensor("w", TensorProto.FLOAT, W.shape, W.ravel()))
    if storage == "external":
        path = tmp_path / "model.onnx"
        onnx.save(model, path, save_as_external_data=True, size_threshold=0)
        model = onnx.load(path, load_external_data=False)
        tensor = model.graph.initializer[0]
        assert only(model).shape == (3, 2)
    replace_data(tensor, W + 1)
    np.testing.assert_array_equal(as_array(tensor), W + 1)
