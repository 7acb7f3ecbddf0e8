"""Whole models for GPUs: compiled by the pipeline, run on the emulated GPU, compared with ONNX."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import build

import sparse_tvm
from sparse_tvm.errors import DeviceError, OptionError
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.models.gpt2 import Gpt2Config, build_gpt2
from sparse_tvm.models.vit import VitConfig, build_vit
from sparse_tvm.sparsity.masks import prune_array

TINY = BertConfig(layers=1, hidden=64, heads=2, intermediate=128, vocabulary=100, max_positions=64)


def mlp(w: np.ndarray, v: np.ndarray):
    """``gelu(x w^T + b) v^T`` over any number of rows."""
    arrays = {"w": w.T, "v": v.T, "b": np.linspace(-1, 1, len(w))}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["product", "b"], ["sum"]),
            helper.make_node("Gelu", ["sum"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "v"], ["y"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", w.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", len(v)])],
        [
            numpy_helper.from_array(np.ascontiguousarray(a, np.float32), n)
            for n, a in arrays.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def drawn(n: int, k: int) -> np.ndarray:
    return np.random.default_rng([n, k]).standard_normal((n, k)).astype(np.float32) * k**-0.5


@pytest.mark.usefixtures("gpu")
def test_bert(tmp_path):
    result = sparse_tvm.compile(
        build_bert(TINY, sequence=16), tmp_path / "model.so", target="cuda-sm80"
    )
    manifest = result.manifest
    assert (manifest["backend"], manifest["device"]) == ("cuda", "cuda")
    assert {layer["precision"] for layer in manifest["layers"]} == {"float16"}
    assert manifest["verification"]["max_abs_diff"]["last_hidden_state"] < 5e-3


@pytest.mark.usefixtures("gpu")
def test_bert_of_any_size(tmp_path):
    model = build_bert(TINY, batch="batch", sequence="sequence")
    result = sparse_tvm.compile(model, tmp_path / "model.so", target="cuda-sm90")
    assert result.manifest["verification"]["max_abs_diff"]["last_hidden_state"] < 5e-3


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("structure", "sparsity", "format"),
    [("32x32", 0.8, "bsr"), ("2:4", 0.5, "2:4"), ("unstructured", 0.95, "csr")],
)
def test_what_pays_is_sparse(tmp_path, structure, sparsity, format):
    w = prune_array(drawn(1024, 1024), sparsity, structure)
    model = mlp(w, drawn(40, 1024))
    result = sparse_tvm.compile(
        model, tmp_path / "model.so", target="cuda-sm89", input_shapes={"x": (16, 1024)}
    )
    layers = {layer["name"]: layer for layer in result.manifest["layers"]}
    assert (layers["w"]["format"], layers["v"]["format"]) == (format, "dense")
    assert "faster than dense (predicted)" in layers["w"]["reason"]
    assert layers["w"]["epilogue"] == ["bias", "gelu"]
    assert result.manifest["verification"] is not None


@pytest.mark.usefixtures("gpu")
def test_layouts_of_a_wish(tmp_path):
    w, v = prune_array(drawn(96, 64), 0.5, "16x16"), prune_array(drawn(40, 96), 0.9, "unstructured")
    result = sparse_tvm.compile(
        mlp(w, v),
        tmp_path / "model.so",
        target="cuda-sm90",
        layer_rules=["^w=bsr:16x16", "^v=csr"],
    )
    layers = {layer["name"]: layer for layer in result.manifest["layers"]}
    assert (layers["w"]["format"], layers["w"]["block"]) == ("bsr", [16, 16])
    assert layers["v"]["format"] == "csr"
    assert result.manifest["verification"] is not None


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm90"])
def test_an_input_is_added_in_float32(tmp_path, target, precision):
    model = build(
        "(float[200,64] x) => (float[200,64] y) { h = MatMul(x,w) s = Add(h,x) y = MatMul(s,v) }",
        w=drawn(64, 64),
        v=drawn(64, 64),
    )
    result = sparse_tvm.compile(model, tmp_path / "model.so", target=target, precision=precision)
    assert result.manifest["layers"][0]["epilogue"] == ["residual"]
    assert result.manifest["verification"] is not None


@pytest.mark.usefixtures("gpu")
def test_bfloat16_on_request(tmp_path):
    result = sparse_tvm.compile(
        build_bert(TINY, sequence=16),
        tmp_path / "model.so",
        target="cuda-sm90",
        precision="bf16",
        layer_rules=["intermediate=@fp16", "query=@fp32"],
    )
    layers = {layer["name"]: layer["precision"] for layer in result.manifest["layers"]}
    assert set(layers.values()) == {"bfloat16", "float16", "float32"}
    assert layers["encoder.layer.0.output.dense"] == "bfloat16"
    assert result.manifest["verification"]["max_abs_diff"]["last_hidden_state"] < 4e-2


@pytest.mark.usefixtures("gpu")
def test_numbers_beyond_float16_in_bfloat16(tmp_path):
    w, v = 1e6 * drawn(48, 32), 1e-6 * drawn(8, 48)
    sparse_tvm.compile(
        mlp(w, v), tmp_path / "model.so", target="cuda-sm80", precision="bf16", verify=False
    )
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    hidden = np.maximum(x @ w.T, 0)  # so large that GELU is ReLU
    assert hidden.max() > 1e5
    with sparse_tvm.load(tmp_path / "model.so") as model:
        y = model.run({"x": x})["y"]
    np.testing.assert_allclose(y, hidden @ v.T, atol=0.05)


@pytest.mark.usefixtures("gpu")
def test_float32_on_request(tmp_path):
    result = sparse_tvm.compile(
        mlp(drawn(33, 21), drawn(5, 33)),
        tmp_path / "model.so",
        target="cuda-sm80",
        precision="fp32",
    )
    assert {layer["precision"] for layer in result.manifest["layers"]} == {"float32"}
    assert result.manifest["verification"]["tolerance"] == 1e-4


@pytest.mark.usefixtures("gpu")
def test_runs_as_on_a_cpu(tmp_path):
    w, v = drawn(48, 32), drawn(8, 48)
    sparse_tvm.compile(mlp(w, v), tmp_path / "model.so", target="cuda-sm80", verify=False)
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    with sparse_tvm.load(tmp_path / "model.so") as model:
        y = model.run({"x": x})["y"]
        np.testing.assert_array_equal(model.run(x[::-1])["y"], y[::-1])


def test_every_architecture_and_no_driver(tmp_path):
    result = sparse_tvm.compile(
        mlp(drawn(48, 32), drawn(8, 48)), tmp_path / "model.so", target="cuda"
    )
    target = result.manifest["target"]
    assert target["architectures"] == ["sm_80", "sm_89", "sm_90", "sm_100"]
    assert "no driver" in result.manifest["unverified"]
    assert (tmp_path / "model.so").read_bytes().count(b"\x7fELF") >= 5  # the host's, four cubins
    with pytest.raises(DeviceError, match="needs an NVIDIA GPU, and there is no driver here"):
        sparse_tvm.load(tmp_path / "model.so")


def test_what_the_target_does_not_have(tmp_path):
    with pytest.raises(OptionError, match="no kernels for int8"):
        sparse_tvm.compile(
            mlp(drawn(48, 32), drawn(8, 48)),
            tmp_path / "model.so",
            target="cuda-sm80",
            precision="int8",
        )
    assert not (tmp_path / "model.so").exists()


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


OTHERS = {
    "convolution and pooling": lambda: build(
        "(float[N,3,12,12] x) => (float[N,5] y) {"
        " c = Conv<kernel_shape=[3,3],pads=[1,1,1,1]>(x,w,b) r = Relu(c)"
        " p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(r) g = GlobalAveragePool(p)"
        " f = Flatten(g) y = Gemm<transB=1>(f,v) }",
        w=random(8, 3, 3, 3),
        b=random(8),
        v=random(5, 8),
    ),
    "top k, a cumulative sum, an input handed through": lambda: build(
        "(float[N,16] x) => (float[N,3] v, int64[N,3] i, float[N,16] s, float[N,16] z) {"
        " m = MatMul(x,w) v, i = TopK(m,k) s = CumSum(m,a) z = Identity(x) }",
        w=random(16, 16),
        k=np.array([3]),
        a=np.array(1),
    ),
    "parts of an activation": lambda: build(
        "(float[N,16] x) => (float[N,8] y) { m = MatMul(x,w)"
        " a, b = Split<axis=1,num_outputs=2>(m) s = Sigmoid(b) y = Mul(a,s) }",
        opset=18,
        w=random(16, 16),
    ),
    "GPT-2": lambda: build_gpt2(
        Gpt2Config(layers=1, hidden=32, heads=2, vocabulary=64, max_positions=16), sequence=12
    ),
    "ViT": lambda: build_vit(
        VitConfig(layers=1, hidden=32, heads=2, intermediate=64, image=32, patch=16)
    ),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", OTHERS)
def test_what_has_no_kernel_of_ours(tmp_path, name):
    result = sparse_tvm.compile(OTHERS[name](), tmp_path / "model.so", target="cuda-sm80")
    assert result.manifest["verification"] is not None


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("sequence", [16, "sequence"])
def test_attention_is_one_kernel(tmp_path, sequence):
    model = build_bert(TINY, batch=2, sequence=sequence)
    result = sparse_tvm.compile(model, tmp_path / "model.so", target="cuda-sm90")
    kinds = [kernel["kind"] for kernel in result.manifest["kernels"].values()]
    assert kinds.count("attention") == 1
    assert not any("softmax" in name for name in result.manifest["kernels"])


def test_an_encoder_layer_is_nine_kernels(tmp_path):
    result = sparse_tvm.compile(
        build_bert(TINY, batch=2, sequence=16),
        tmp_path / "model.so",
        target="cuda-sm80",
        verify=False,
    )
    calls = [len(kernel["layers"]) for kernel in result.manifest["kernels"].values()]
    # Six dense layers, attention, three norms; besides, the mask's and the embedding's are TVM's.
    assert sum(calls) == 10
