"""Quantised models import with their own scales, and agree with ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import sparse_tvm
from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.quantised import spell_quantised
from sparse_tvm.frontends.onnx.quantised_numbers import dequantise, quantise
from sparse_tvm.frontends.onnx.read import read_onnx
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.reference import Reference

RNG = np.random.default_rng(0)


def integers(*shape, dtype=np.int8):
    """Of seven bits where they are signed: ONNX Runtime saturates sums of two products of more,
    on CPUs without VNNI."""
    limits = np.iinfo(dtype)
    part = 2 if limits.min < 0 else 1
    return RNG.integers(limits.min // part, limits.max // part + 1, shape, dtype)


def scales(count):
    return RNG.uniform(0.01, 0.03, count).astype(np.float32)


def build(graph, *, opset=21, **tensors):
    imports = f'opset_import: ["" : {opset}, "com.microsoft" : 1]'
    model = parser.parse_model(f"<ir_version: 10, {imports}> g {graph}")
    for name, array in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


W = integers(64, 24)
IMAGE_W = integers(16, 8, 3, 3)
S, ONE = np.float32(0.0213), np.float32(0.0437)
X8, X4 = "(float[4,64] x) => (float[4,24] y)", "(float[2,8,9,9] x) => (float[2,16,9,9] y)"
SAME = "(float[4,64] x) => (float[4,64] y)"
IMAGE = "(float[2,8,9,9] x) => (float[2,8,c,d] y)"
TO_X = "q = QuantizeLinear(x, s, z)"
TO_Y = "y = DequantizeLinear(r, t, v)"
COMMON = {"s": S, "z": np.uint8(120), "t": ONE, "v": np.uint8(100)}
SIGNED = {"s": S, "z": np.int8(-3), "t": ONE, "v": np.int8(5)}

MODELS = {
    "QDQ per channel": (
        X8,
        f"{TO_X} p = DequantizeLinear(q, s, z) f = DequantizeLinear<axis = 1>(w, ws) "
        "h = MatMul(p, f) r = QuantizeLinear(h, t, v)",
        {"w": W, "ws": scales(24), "t": np.float32(0.2)},
    ),
    "QDQ asymmetric weight": (
        X8,
        f"{TO_X} p = DequantizeLinear(q, s, z) f = DequantizeLinear<axis = 1>(w, ws, wz) "
        "h = MatMul(p, f) r = QuantizeLinear(h, t, v)",
        {
            "w": integers(64, 24, dtype=np.uint8),
            "ws": scales(24),
            "wz": integers(24, dtype=np.uint8),
            "t": np.float32(0.2),
        },
    ),
    "weights by block": (
        X8,
        f"{TO_X} p = DequantizeLinear(q, s, z) "
        "f = DequantizeLinear<axis = 0, block_size = 16>(w, ws) "
        "h = MatMul(p, f) r = QuantizeLinear(h, t, v)",
        {"w": W, "ws": scales((4, 24)), "t": np.float32(0.2)},
    ),
    "rounding of float weights": (
        X8,
        f"{TO_X} p = DequantizeLinear(q, s, z) i = QuantizeLinear<axis = 0>(w, ws, wz) "
        "j = DequantizeLinear<axis = 0>(i, ws, wz) k = Transpose<perm = [1, 0]>(j) "
        "h = MatMul(p, k) r = QuantizeLinear(h, t, v)",
        {
            "w": RNG.uniform(-0.6, 0.6, (24, 64)).astype(np.float32),
            "ws": scales(24),
            "wz": np.zeros(24, np.int8),
        },
    ),
    "activations per channel": (
        SAME,
        "q = QuantizeLinear<axis = 1>(x, s, z) r = Identity(q)",
        {"s": scales(64), "z": integers(64), "t": ONE, "v": np.int8(5)},
    ),
    "activations of 16 bits": (
        SAME,
        "q = QuantizeLinear(x, s, z) r = Identity(q)",
        {"s": np.float32(1e-4), "z": np.uint16(30000), "t": np.float32(1e-4), "v": np.uint16(7)},
    ),
    "integers that move": (
        SAME,
        f"{TO_X} a, b = Split<axis = 1, num_outputs = 2>(q) r = Concat<axis = 1>(b, a)",
        {},
    ),
    "QLinearMatMul": (
        X8,
        f"{TO_X} r = QLinearMatMul(q, s, z, w, ws, wz, t, v)",
        {"w": W, "ws": scales(24), "wz": np.zeros(24, np.int8), "t": np.float32(0.2)},
    ),
    "QLinearMatMul of activations": (
        "(float[4,64] x) => (float[4,4] y)",
        f"{TO_X} k = Transpose<perm = [1, 0]>(q) r = QLinearMatMul(q, s, z, k, s, z, t, v)",
        {"t": np.float32(0.5)},
    ),
    "QLinearConv": (
        X4,
        f"{TO_X} r = QLinearConv<pads = [1,1,1,1]>(q, s, z, w, ws, wz, t, v, b)",
        {
            "w": IMAGE_W,
            "ws": scales(16),
            "wz": np.zeros(16, np.int8),
            "b": RNG.integers(-999, 999, 16, np.int32),
            "t": np.float32(0.3),
        },
    ),
    "MatMulInteger": (
        X8,
        f"{TO_X} i = MatMulInteger(q, w, z, wz) h = Cast<to = 1>(i) y = Mul(h, s)",
        {"w": W, "wz": np.int8(2)},
    ),
    "ConvInteger": (
        X4,
        f"{TO_X} i = ConvInteger<pads = [1,1,1,1]>(q, w, z) h = Cast<to = 1>(i) y = Mul(h, s)",
        {"w": integers(16, 8, 3, 3, dtype=np.uint8)},
    ),
    "dynamic": (
        X8,
        "q, a, c = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, c, wz) "
        "h = Cast<to = 1>(i) f = Mul(a, ws) g = Mul(h, f) y = Add(g, b)",
        {"w": W, "wz": np.zeros(24, np.int8), "ws": scales(24), "b": scales(24)},
    ),
    "dynamic convolution": (
        X4,
        "q, a, c = DynamicQuantizeLinear(x) i = ConvInteger<pads = [1,1,1,1]>(q, w, c, wz) "
        "h = Cast<to = 1>(i) f = Mul(ws, a) y = Mul(h, f)",
        {"w": integers(16, 8, 3, 3, dtype=np.uint8), "wz": np.uint8(120), "ws": S},
    ),
    "DynamicQuantizeMatMul": (
        X8,
        "y = com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz, b)",
        {"w": W, "ws": scales(24), "wz": np.zeros(24, np.int8), "b": scales(24)},
    ),
    "MatMulIntegerToFloat": (
        X8,
        f"{TO_X} y = com.microsoft.MatMulIntegerToFloat(q, w, s, ws, z, wz, b)",
        {"w": W, "ws": scales(24), "wz": np.zeros(24, np.int8), "b": scales(24)},
    ),
    "QGemm": (
        X8,
        f"{TO_X} r = com.microsoft.QGemm<transB = 1>(q, s, z, w, ws, wz, b, t, v)",
        {
            "w": integers(24, 64),
            "ws": S,
            "wz": np.int8(0),
            "b": RNG.integers(-999, 999, 24, np.int32),
            "t": np.float32(0.2),
        },
    ),
    "QLinearAdd": (
        SAME,
        f"{TO_X} p = QuantizeLinear(x, t, v) r = com.microsoft.QLinearAdd(q, s, z, p, t, v, t, v)",
        {},
    ),
    "QLinearMul": (
        SAME,
        f"{TO_X} p = QuantizeLinear(x, t, v) r = com.microsoft.QLinearMul(q, s, z, p, t, v, t, v)",
        {},
    ),
    "QLinearSigmoid": (SAME, f"{TO_X} r = com.microsoft.QLinearSigmoid(q, s, z, t, v)", {}),
    "QLinearLeakyRelu": (
        SAME,
        f"{TO_X} r = com.microsoft.QLinearLeakyRelu<alpha = 0.2>(q, s, z, t, v)",
        {},
    ),
    "QLinearSoftmax": (
        SAME,
        f"{TO_X} r = com.microsoft.QLinearSoftmax<axis = -1, opset = 13>(q, s, z, t, v)",
        {"t": np.float32(1 / 256), "v": np.uint8(0)},
    ),
    "QLinearConcat": (
        "(float[4,64] x) => (float[8,64] y)",
        f"{TO_X} p = QuantizeLinear(x, t, v) "
        "r = com.microsoft.QLinearConcat<axis = 0>(t, v, q, s, z, p, t, v)",
        {},
    ),
    "QLinearGlobalAveragePool": (
        IMAGE,
        f"{TO_X} r = com.microsoft.QLinearGlobalAveragePool<channels_last = 0>(q, s, z, t, v)",
        {},
    ),
    "QLinearAveragePool": (
        IMAGE,
        f"{TO_X} r = com.microsoft.QLinearAveragePool<kernel_shape = [3,3]>(q, s, z, t, v)",
        {},
    ),
}
EIGHT_BITS_ALONE = {"weights by block", "activations of 16 bits", "activations per channel"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("signed", [False, True], ids=["u8", "s8"])
def test_operators_agree_with_onnx_runtime(name, signed, tmp_path):
    signature, body, tensors = MODELS[name]
    if signed and ("Integer" in name or name in EIGHT_BITS_ALONE or "QGemm" in name):
        pytest.skip("ONNX Runtime has it with unsigned activations only")
    common = SIGNED if signed else COMMON
    tensors = {**common, **tensors}
    if signed and "Softmax" in name:
        tensors["v"] = np.int8(-128)
    dequantised = "y = " in body
    read = {word.strip(",()") for word in f"{body} {TO_Y}".replace("(", " ( ").split()}
    used = {key: value for key, value in tensors.items() if key in read}
    model = build(f"{signature} {{ {body} {'' if dequantised else TO_Y} }}", **used)
    x = {"x": RNG.standard_normal([d.dim_value for d in _dims(model)]).astype(np.float32)}
    expected = Reference(model.SerializeToString(), threads=1).run(x)["y"]
    sparse_tvm.compile(model, tmp_path / "model.so", verify=False)
    found = sparse_tvm.load(tmp_path / "model.so").run(x)["y"]
    # Sums in another order may round the other way: one step, and seldom.
    step = 1e-4 * np.abs(expected).max() if dequantised else float(tensors["t"])
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= step * 1.01
    assert np.mean(np.abs(found - expected) > step / 2) < 0.02


def _dims(model):
    return model.graph.input[0].type.tensor_type.shape.dim


@pytest.mark.parametrize("name", ["QDQ per channel", "QLinearMatMul", "dynamic", "MatMulInteger"])
def test_zeros_of_quantised_weights_are_found_and_used(name, tmp_path):
    _, body, tensors = MODELS[name]
    w = integers(256, 256)
    w[np.kron(RNG.random((256, 64)) < 0.9, np.ones((1, 4), bool))] = 0
    tensors = {**COMMON, **tensors, "query_quantized": w}
    tensors |= {key: np.resize(tensors[key], 256) for key in ("ws", "b") if key in tensors}
    if np.ndim(tensors.get("wz")):
        tensors["wz"] = np.zeros(256, np.int8)
    elif "wz" in tensors:
        tensors["wz"] = np.int8(0)
    body = body.replace("(w,", "(query_quantized,").replace(" w,", " query_quantized,")
    end = "" if "y = " in body else TO_Y
    read = {word.strip(",") for word in f"{body} {end}".replace("(", " ").replace(")", " ").split()}
    used = {key: value for key, value in tensors.items() if key in read}
    model = build(f"(float[16,256] x) => (float[16,256] y) {{ {body} {end} }}", **used)
    [layer] = sparse_tvm.inspect(model)["layers"]
    assert layer["name"] == "query"
    assert layer["nnz"] == np.count_nonzero(w)
    manifest = sparse_tvm.compile(model, tmp_path / "model.so", precision="fp32").manifest
    [layer] = manifest["layers"]
    assert layer["format"] == "bsr"
    assert manifest["verification"]["similarity"]["y"]["cosine"] > 0.999


BAD_SCALES = {"0": 0.0, "-0.5": -0.5, "nan": np.nan, "inf": np.inf}


@pytest.mark.parametrize("value", BAD_SCALES)
@pytest.mark.parametrize("where", ["s", "ws", "t"])
def test_scales_that_are_not_positive_numbers(where, value):
    scale = np.full(24 if where == "ws" else (), BAD_SCALES[value], np.float32)
    tensors = {**COMMON, "w": W, "ws": scales(24), "wz": np.zeros(24, np.int8), where: scale}
    graph = f'{TO_X} ["fc"] r = QLinearMatMul(q, s, z, w, ws, wz, t, v) {TO_Y}'
    with pytest.raises(ModelError) as refused:
        read_onnx(build(f"{X8} {{ {graph} }}", **tensors))
    assert f"its scale {where} is {value}, not a positive number" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wz": np.zeros(7, np.int8)}, "its zero point wz has 7 values, and its scale 24"),
        ({"wz": np.full(24, 200, np.uint8)}, "its zero point wz is uint8, out of the range of w"),
        ({"ws": scales(7), "wz": np.zeros(7, np.int8)}, "its scale ws does not fit w"),
        ({"b": np.ones(24, np.int32), "bz": np.ones((), np.int32)}, "bz must be 0"),
    ],
)
def test_parameters_that_do_not_fit(changes, message):
    tensors = {**COMMON, "w": W, "ws": scales(24), "wz": np.zeros(24, np.int8), **changes}
    graph = f'{TO_X} ["fc"] r = QLinearMatMul(q, s, z, w, ws, wz, t, v) {TO_Y}'
    if "b" in changes:
        tensors |= {"b": changes["b"], "bz": changes["bz"]}
        graph = '["fc"] c = DequantizeLinear(b, s, bz) y = MatMul(x, c)'
        tensors = {key: tensors[key] for key in ("b", "bz", "s")}
    with pytest.raises(ModelError) as refused:
        read_onnx(build(f"{X8} {{ {graph} }}", **tensors))
    assert "fc (" in str(refused.value)
    assert message in str(refused.value)


def _cut_short(model, name):
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.raw_data = tensor.raw_data[:-1]


def _replace(model, **arrays):
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))


def _transpose(model, name, perm):
    for node in model.graph.node:
        node.input[:] = ["moved" if given == name else given for given in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Transpose", [name], ["moved"], perm=perm))


DAMAGED = {
    "a weight cut short": ("QDQ per channel", lambda model: _cut_short(model, "w"), "w cannot be"),
    "a scale cut short": ("QLinearMatMul", lambda model: _cut_short(model, "ws"), "ws cannot be"),
    "a rounding whose scale does not fit": (
        "rounding of float weights",
        lambda model: _replace(model, ws=scales(7), wz=np.zeros(7, np.int8)),
        "its scale ws does not fit w",
    ),
    "a transposition of too many axes": (
        "QDQ per channel",
        lambda model: _transpose(model, "w", perm=[1, 0, 2]),
        "(Transpose): it does not fit w",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_weights_are_refused_in_one_line(damage):
    name, do, message = DAMAGED[damage]
    signature, body, tensors = MODELS[name]
    model = build(f"{signature} {{ {body} {TO_Y} }}", **{**COMMON, **tensors})
    do(model)
    with pytest.raises(ModelError) as refused:
        spell_quantised(model, "model.onnx")
    assert str(refused.value).startswith("model.onnx: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rounding_and_its_undoing():
    x = np.float32([[0.5, 1.5, -2.5, 300], [0, 1, -1, 2]])
    scale, zero = np.float32([1, 0.5]), np.int8([0, 3])
    q = quantise(x, scale, zero, axis=0)
    assert q.tolist() == [[0, 2, -2, 127], [3, 5, 1, 7]]
    assert dequantise(q, scale, zero, axis=0).tolist() == [[0, 2, -2, 127], [0, 1, -1, 2]]
    blocks = dequantise(q, np.float32([[1, 2], [3, 4]]), None, axis=1, block=3)
    assert blocks.tolist() == [[0, 2, -2, 254], [9, 15, 3, 28]]


class Calibration(CalibrationDataReader):
    def __init__(self, make, count=4):
        self._inputs = iter([make(np.random.default_rng(seed)) for seed in range(count)])

    def get_next(self):
        return next(self._inputs, None)


SMALL = BertConfig(layers=1, hidden=64, heads=2, intermediate=128, vocabulary=100, max_positions=64)


def bert_inputs(rng):
    ids = rng.integers(0, 100, (1, 16))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def convnet():
    """A little of a ResNet and of a MobileNet: strided, residual, depthwise, pooled."""
    graph = """(float[1,3,32,32] x) => (float[1,10] y) {
        a0 = Conv<pads = [1,1,1,1], strides = [2,2]>(x, w0, b0) a = Relu(a0)
        b1 = Conv<pads = [1,1,1,1]>(a, w1, b1) b2 = Relu(b1)
        b3 = Conv(b2, w2, b2w) c0 = Add(a, b3) c = Relu(c0)
        d0 = Conv<pads = [1,1,1,1], group = 16, strides = [2,2]>(c, w3, b3w) d = Clip(d0, lo, hi)
        e = MaxPool<kernel_shape = [2,2], strides = [2,2]>(d)
        f = GlobalAveragePool(e) g = Flatten(f) y = Gemm<transB = 1>(g, w4, b4)
    }"""
    graph = graph.replace("b1 = Conv", "p1 = Conv").replace("Relu(b1)", "Relu(p1)")
    graph = graph.replace("b3 = Conv", "p3 = Conv").replace("Add(a, b3)", "Add(a, p3)")
    rng = np.random.default_rng(1)
    shapes = {"w0": (16, 3, 3, 3), "w1": (16, 16, 3, 3), "w2": (16, 16, 1, 1), "w3": (16, 1, 3, 3)}
    shapes["w4"] = (10, 16)
    tensors = {
        name: (rng.standard_normal(s) / np.sqrt(np.prod(s[1:]))).astype(np.float32)
        for name, s in shapes.items()
    }
    biases = ("b0", "b1", "b2w", "b3w")
    tensors |= {n: rng.standard_normal(16).astype(np.float32) for n in biases}
    tensors |= {"b4": rng.standard_normal(10).astype(np.float32)}
    return build(graph, opset=17, lo=np.float32(0), hi=np.float32(6), **tensors)


NETWORKS = {
    "bert": (lambda: build_bert(SMALL, batch=1, sequence=16), bert_inputs),
    "convnet": (
        convnet,
        lambda rng: {"x": rng.standard_normal((1, 3, 32, 32)).astype(np.float32)},
    ),
}
WAYS = {
    "dynamic": None,
    "QDQ u8s8 per channel": (QuantFormat.QDQ, QuantType.QUInt8, True),
    "QDQ s8s8 per tensor": (QuantFormat.QDQ, QuantType.QInt8, False),
    "QOperator u8s8 per channel": (QuantFormat.QOperator, QuantType.QUInt8, True),
    "QOperator u8s8 per tensor": (QuantFormat.QOperator, QuantType.QUInt8, False),
    "QOperator s8s8 per tensor": (QuantFormat.QOperator, QuantType.QInt8, False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_quantised_by_onnx_runtime(network, way, tmp_path):
    make, inputs = NETWORKS[network]
    plain, path = tmp_path / "plain.onnx", tmp_path / "quantised.onnx"
    onnx.save(make(), plain)
    if way == "dynamic":
        weights = QuantType.QUInt8 if network == "convnet" else QuantType.QInt8
        quantize_dynamic(plain, path, weight_type=weights)
    else:
        form, activations, per_channel = WAYS[way]
        quantize_static(
            plain,
            path,
            Calibration(inputs),
            quant_format=form,
            per_channel=per_channel,
            activation_type=activations,
            weight_type=QuantType.QInt8,
        )
    floats = sparse_tvm.inspect(plain)["layers"]
    layers = sparse_tvm.inspect(path)["layers"]
    assert sorted(layer["shape"] for layer in layers) == sorted(layer["shape"] for layer in floats)
    manifest = sparse_tvm.compile(path, tmp_path / "model.so").manifest
    for similar in manifest["verification"]["similarity"].values():
        assert similar["cosine"] > 0.99


@pytest.mark.parametrize("target", ["sapphirerapids", "avx512-vnni", "x86-64-v3"])
@pytest.mark.parametrize("name", ["QDQ per channel", "QLinearMatMul", "dynamic", "QGemm"])
@pytest.mark.parametrize("sparsity", [0, 0.9])
def test_dense_layers_multiply_their_own_integers(name, target, sparsity, tmp_path, on_target):
    on_target(target)
    signature, body, tensors = MODELS[name]
    tensors = {**COMMON, **tensors}
    kept = RNG.random(tensors["w"].shape) >= sparsity
    tensors["w"] = np.where(kept, np.maximum(tensors["w"], -127), 0).astype(np.int8)
    end = "" if "y = " in body else TO_Y
    read = {word.strip(",") for word in f"{body} {end}".replace("(", " ").replace(")", " ").split()}
    used = {key: value for key, value in tensors.items() if key in read}
    model = build(f"{signature} {{ {body} {end} }}", **used)
    x = {"x": RNG.standard_normal((4, 64)).astype(np.float32)}
    outputs = []
    for precision, dtype in ((None, "int8"), ("fp32", "float32")):
        manifest = sparse_tvm.compile(
            model, tmp_path / "model.so", target=target, precision=precision, verify=False
        ).manifest
        assert [layer["precision"] for layer in manifest["layers"]] == [dtype]
        outputs.append(sparse_tvm.load(tmp_path / "model.so").run(x)["y"])
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_asymmetric_weights_stay_float32_and_say_so(tmp_path):
    signature, body, tensors = MODELS["QDQ asymmetric weight"]
    model = build(f"{signature} {{ {body} {TO_Y} }}", **{**COMMON, **tensors})
    manifest = sparse_tvm.compile(model, tmp_path / "model.so").manifest
    assert manifest["layers"][0]["precision"] == "float32"
    assert any("more than 127 steps from 0" in note for note in manifest["notes"])
    manifest = sparse_tvm.compile(model, tmp_path / "model.so", precision="int8").manifest
    assert manifest["layers"][0]["precision"] == "int8"


@pytest.mark.parametrize("name", ["q_output_fc.weight_1", "fc.weight_quantized", "fc.weight"])
def test_layers_are_called_as_before_they_were_quantised(name):
    signature, body, tensors = MODELS["QDQ per channel"]
    model = build(f"{signature} {{ {body} {TO_Y} }}", **{**COMMON, **tensors})
    for node in model.graph.node:
        node.input[:] = [name if given == "w" else given for given in node.input]
    next(t for t in model.graph.initializer if t.name == "w").name = name
    assert [layer["name"] for layer in sparse_tvm.inspect(model)["layers"]] == ["fc"]
