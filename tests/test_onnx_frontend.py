"""ONNX models as Relax programs: same results as ONNX Runtime, clear refusals."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_models import (
    ORT_NEWEST_OPSET,
    assert_same_as_onnxruntime,
    build,
    calls,
    executor,
    normal,
)

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.importer.model import import_onnx
from sparse_tvm.frontends.onnx.read import NEWEST_OPSET
from sparse_tvm.models.bert import BertConfig, Style, build_bert
from sparse_tvm.spec import TensorSpec

TINY = BertConfig(layers=1, hidden=32, heads=2, intermediate=64, vocabulary=50, max_positions=16)


def test_parameters_are_inputs_and_then_weights():
    imported = assert_same_as_onnxruntime(build_bert(TINY, sequence=8, pooler=True))
    main = imported.module["main"]
    names = [*(spec.name for spec in imported.inputs), *imported.weights]
    assert [parameter.name for parameter in main.params] == names
    assert int(main.attrs["num_input"]) == 3
    assert imported.inputs[0] == TensorSpec("input_ids", "int64", (1, 8))
    assert [str(spec) for spec in imported.outputs] == [
        "last_hidden_state float32[1, 8, 32]",
        "pooler_output float32[1, 32]",
    ]
    layer = "encoder.layer.0.intermediate.dense"
    assert imported.layers[f"{layer}.weight"] == layer
    assert set(imported.layers) < set(imported.weights)


def test_weights_are_not_copied_into_the_program():
    model = build_bert(TINY, sequence=8)
    imported = import_onnx(model)
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    computed = {"/embeddings/Gather_2_output_0"}  # the embeddings of positions
    for name, array in imported.weights.items():
        if name not in computed:
            np.testing.assert_array_equal(array, stored[name])
        assert array.dtype == np.float32
        assert array.flags.c_contiguous


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm(trans_a, trans_b):
    graph = f"""(float[{"5,9" if trans_a else "9,5"}] x) => (float[9,7] y) {{
        y = Gemm<transA={trans_a}, transB={trans_b}, alpha=0.5, beta=2.0>(x, w, b)
    }}"""
    weight = normal(7, 5) if trans_b else normal(5, 7)
    imported = assert_same_as_onnxruntime(build(graph, w=weight, b=normal(7)))
    assert imported.layers == {"w": "w"}
    assert calls(imported).count("permute_dims") == trans_a + trans_b


def test_weight_behind_a_transpose_is_a_layer():
    graph = "(float[9,5] x) => (float[9,7] y) { t = Transpose(w)  y = MatMul(x, t) }"
    imported = assert_same_as_onnxruntime(build(graph, w=normal(7, 5)))
    assert imported.layers == {"w": "w"}
    assert calls(imported) == ["permute_dims", "matmul"]


def test_weight_in_a_constant_node():
    model = build("(float[9,5] x) => (float[9,7] y) { y = MatMul(x, w) }", w=normal(5, 7))
    constant = onnx.helper.make_node("Constant", [], ["w"], value=model.graph.initializer.pop())
    model.graph.node.insert(0, constant)
    assert assert_same_as_onnxruntime(model).layers == {"w": "w"}


def test_weight_with_a_made_up_name_is_named_after_its_node():
    graph = '(float[9,5] x) => (float[9,7] y) { ["/head/MatMul"] y = MatMul(x, w) }'
    model = build(graph, w=normal(5, 7))
    model.graph.initializer[0].name = model.graph.node[0].input[1] = "onnx::MatMul_12"
    assert import_onnx(model).layers == {"onnx::MatMul_12": "/head/MatMul"}


def test_batch_norm_is_folded_and_the_layer_keeps_its_name():
    graph = """(float[1,3,8,8] x) => (float[1,8,6,6] y) {
        ["/stem/conv"] c = Conv(x, w)
        n = BatchNormalization(c, scale, shift, mean, variance)
        y = Clip(n, low, high)
    }"""
    imported = assert_same_as_onnxruntime(
        build(
            graph,
            w=normal(8, 3, 3, 3),
            scale=normal(8),
            shift=normal(8),
            mean=normal(8),
            variance=np.abs(normal(8)) + 1,
            low=np.float32(0),
            high=np.float32(6),
        )
    )
    assert calls(imported)[0] == "nn.conv2d"
    assert calls(imported)[-2:] == ["maximum", "minimum"]
    assert "nn.batch_norm" not in calls(imported)
    assert list(imported.layers.values()) == ["w"]


@pytest.mark.parametrize("opset", [11, 12, 13, 18, 21, 26, NEWEST_OPSET])
def test_opsets(opset):
    axes = "<axes=[-1]>(z)" if opset < 18 else "(z, axes)"
    graph = f"""(float[2,3,8] x) => (float[2,3,12] y, float[2,3,1] m, float[2,3,12] s) {{
        z = MatMul(x, w)
        m = ReduceMean {axes}
        s = Softmax<axis=2>(z)
        c = Clip(z, low, high)
        y = Sum(c, s, z)
    }}"""
    tensors = {"axes": np.array([-1])} if opset >= 18 else {}
    imported = assert_same_as_onnxruntime(
        build(graph, opset=opset, w=normal(8, 12), low=np.float32(0), high=np.float32(6), **tensors)
    )
    names = ["add", "add", "matmul", "maximum", "mean", "minimum", "nn.softmax"]
    assert sorted(calls(imported)) == names


@pytest.mark.parametrize(
    "style",
    [
        Style(),
        Style(dense="gemm", layer_norm="decomposed", opset=11),
        Style(dense="gemm", layer_norm="decomposed", scale="mul", opset=13),
        Style(gelu="op", opset=20),
    ],
)
def test_exporters_spellings(style):
    model = build_bert(TINY, batch="batch", sequence="sequence", style=style)
    sizes = [{"batch": 1, "sequence": 7}, {"batch": 2, "sequence": 16}]
    imported = assert_same_as_onnxruntime(model, sizes=sizes)
    assert [spec.shape for spec in imported.inputs] == [("batch", "sequence")] * 3
    assert imported.bounds == {"sequence": (1, 16)}
    assert "nn.softmax" in calls(imported)


@pytest.mark.parametrize(
    ("graph", "opset", "expected"),
    [
        ('(float[4] x) => (float[4] y) { y = Gelu<approximate="tanh">(x) }', 20, ["nn.gelu_tanh"]),
        ("(float[4] x) => (float[4] y) { y = Gelu(x) }", 20, ["nn.gelu"]),
        ("(float[4] x) => (float[4] y) { y = Pow(x, two) }", 17, ["multiply"]),
        ("(float[4] x) => (float[4] y) { y = Max(x, two) }", 17, ["maximum"]),
        ("(float[4] x) => (float[4] y) { y = Swish(x) }", 24, None),
        ("(float[4] x) => (float[4] y) { y = Celu(x) }", 17, None),
        ("(float[4] x, float[4] z) => (float[4] y) { y = SwiGLU(x, z) }", 28, None),
        (
            "(float[1,2,3,4] q, float[1,2,5,4] k, float[1,2,5,4] v) => (float[1,2,3,4] y)"
            "{ y = Attention(q, k, v) }",
            23,
            None,
        ),
    ],
)
def test_operators(graph, opset, expected):
    if opset > ORT_NEWEST_OPSET:  # there is nothing to compare with
        imported = import_onnx(build(graph, opset=opset))
    else:
        tensors = {"two": np.float32(2)} if "two" in graph else {}
        imported = assert_same_as_onnxruntime(build(graph, opset=opset, **tensors))
    assert expected is None or calls(imported) == expected


def test_gather_wraps_negative_indices_and_clamps_the_others():
    graph = "(int64[4] ids) => (float[4,16] y) { y = Gather(w, ids) }"
    table = normal(10, 16)
    imported = import_onnx(build(graph, w=table))
    [rows] = executor(imported)({"ids": np.array([0, -1, 9, 10**12])})
    np.testing.assert_array_equal(rows, table[[0, 9, 9, 9]])


@pytest.mark.parametrize(
    "graph",
    [
        "(float[3,4,16] x) => (float[2,16] y) { y = GatherND(x, ids) }",
        "(double[4,16] x) => (bool[4,16] y) { y = IsInf<detect_negative=0>(x) }",
    ],
    ids=["negative constant indices", "double"],
)
def test_constants_keep_their_types(graph):
    tensors = {"ids": np.array([[-1, 2], [0, -4]])} if "ids" in graph else {}
    assert_same_as_onnxruntime(build(graph, opset=20, **tensors))


def test_constant_subgraphs_are_folded():
    graph = """(float[2,16] x) => (float[32] y) {
        shape = Shape(x)
        size = ReduceProd<keepdims=1>(shape)
        z = Reshape(x, size)
        branch = Greater(size, zero)
        y = Relu(z)
    }"""
    assert calls(import_onnx(build(graph, zero=np.array([0])))) == ["reshape", "nn.relu"]


def test_unsupported_operators_are_all_listed():
    graph = """(float[2,16] x, float[3,4,4] s) => (float[2,8] y, float[3] o, float[3] p) {
        ["/head"] y = MatMul(x, w)
        ["/size_1"] o = Det(s)
        ["/size_2"] p = Det(s)
    }"""
    with pytest.raises(ModelError) as caught:
        import_onnx(build(graph, opset=19, w=normal(16, 8)))
    message = str(caught.value)
    assert message.startswith("g: ")
    assert "Det (node /size_1, /size_2)" in message
    assert "\n" not in message


def test_operators_of_onnxruntime():
    imports = ', "com.microsoft" : 1'
    gelu = "(float[2,16] x) => (float[2,16] y) { y = com.microsoft.FastGelu(x) }"
    assert_same_as_onnxruntime(build(gelu, imports=imports))
    fused = '(float[2,16] x) => (float[2,8] y) { ["/f"] y = com.microsoft.FusedMatMul(x, w) }'
    with pytest.raises(ModelError, match=r"com\.microsoft\.FusedMatMul \(node /f\)"):
        import_onnx(build(fused, imports=imports, w=normal(16, 8)))


def test_other_failures_name_the_node(capfd):
    graph = '(float[2,16] x) => (float[4] y) { ["/pad"] y = Pad(x, pads) }'
    with pytest.raises(ModelError, match=r"node /pad \(Pad\)") as caught:
        import_onnx(build(graph, pads=np.array([0, 0])))
    assert caught.value.__cause__ is not None
    assert capfd.readouterr().out == ""


def test_external_data(tmp_path):
    path = tmp_path / "model.onnx"
    model = build("(float[9,64] x) => (float[9,7] y) { y = MatMul(x, w) }", w=normal(64, 7))
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    imported = import_onnx(path)
    assert imported.source == path
    np.testing.assert_array_equal(imported.weights["w"], normal(64, 7))
    assert isinstance(imported.weights["w"], np.memmap)


def test_inputs_that_are_not_tensors():
    model = build("(float[2] x) => (float[2] y) { y = Relu(x) }")
    sequence = onnx.helper.make_tensor_sequence_value_info("s", onnx.TensorProto.FLOAT, None)
    model.graph.input.append(sequence)
    with pytest.raises(ModelError, match="s is a sequence_type, not a tensor"):
        import_onnx(model)
