"""Models of float16 and bfloat16: their values are kept, and computed with in float32 or bf16."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser
from onnx_models import HALVES, narrowed
from typer.testing import CliRunner

import sparse_tvm
from sparse_tvm.cli.app import app
from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.read import read_onnx
from sparse_tvm.frontends.onnx.widen import half_types, widen, widened_types
from sparse_tvm.models.bert import BertConfig, build_bert

SMALL = BertConfig(layers=1, hidden=64, heads=2, intermediate=128, vocabulary=100, max_positions=64)


@pytest.fixture(scope="module")
def bert():
    return build_bert(SMALL, batch=1, sequence=16)


def saved(model, path):
    onnx.save(model, path)
    return path


def test_a_weight_with_the_wrong_number_of_values_is_refused(tmp_path):
    model = build_bert(SMALL, sequence=8)
    tensor = model.graph.initializer[0]
    tensor.data_type = TensorProto.FLOAT16  # and half as many bytes as there are
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelError, match=rf"{path}: initializer {tensor.name} cannot be read"):
        read_onnx(path)


def test_float16_agrees_with_onnx_runtime(bert, tmp_path):
    path = saved(narrowed(bert, "float16"), tmp_path / "half.onnx")
    manifest = sparse_tvm.compile(path, tmp_path / "half.so").manifest
    assert manifest["outputs"][0]["dtype"] == "float16"
    assert manifest["verification"]["reference"].startswith("ONNX Runtime")
    assert manifest["verification"]["max_abs_diff"]["last_hidden_state"] < 1e-2
    assert {layer["precision"] for layer in manifest["layers"]} == {"float16"}
    assert any("float16" in note for note in manifest["notes"])
    assert not any("attention" in note for note in manifest["notes"])


@pytest.mark.parametrize(("name", "precision"), [("float16", "fp16"), ("bfloat16", "bf16")])
def test_weights_stay_narrow_where_the_target_computes_in_float32(tmp_path, name, precision):
    rng = np.random.default_rng(0)
    w, v = (rng.standard_normal((256, 256)).astype(HALVES[name]) for _ in range(2))
    w[np.repeat(rng.random((64, 256)) < 0.9, 4, axis=0).T] = 0
    graph = """(float[rows,256] x) => (float[rows,256] y, float[rows,256] z) {
        h = MatMul(x, w) y = Relu(h) z = MatMul(y, v) }"""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {graph}')
    for key, value in {"w": w, "v": v}.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), key))
    path = saved(model, tmp_path / "model.onnx")
    sizes, outputs = {}, {}
    x = {"x": rng.standard_normal((19, 256), np.float32)}
    for wished in ("fp32", precision):
        artifact = tmp_path / f"{wished}.so"
        manifest = sparse_tvm.compile(path, artifact, precision=wished, target="x86-64-v3").manifest
        sizes[wished] = manifest["totals"]["weight_bytes"]
        loaded = sparse_tvm.load(artifact)
        outputs[wished] = [loaded.run({"x": x["x"][:rows]}) for rows in (1, 3, 8, 16, 19)]
    assert sizes[precision] < 0.6 * sizes["fp32"]
    for wide, narrow in zip(outputs["fp32"], outputs[precision], strict=True):
        for key, value in wide.items():  # the weights are the same numbers
            np.testing.assert_allclose(narrow[key], value, rtol=0, atol=2e-5 * np.abs(value).max())


@pytest.mark.parametrize(("name", "code"), [("float16", 10), ("bfloat16", 16)])
def test_only_what_is_of_16_bits_in_a_mixed_model_stays_so(tmp_path, name, code):
    graph = f"""(int64[19] rows) => (float[19,64] y) {{
        x = Gather(wide_table, rows) h = MatMul(x, wide)
        a = Gather(narrow_table, rows) b = Cast<to = {code}>(h) c = Add(a, b) d = MatMul(c, narrow)
        y = Cast<to = 1>(d) }}"""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {graph}')
    rng = np.random.default_rng(0)
    shapes = {"narrow_table": (300, 64), "wide_table": (300, 64), "narrow": (64, 64)}
    for key, shape in {**shapes, "wide": (64, 64)}.items():
        dtype = np.float32 if key.startswith("wide") else HALVES[name]
        array = rng.standard_normal(shape).astype(dtype)
        model.graph.initializer.append(numpy_helper.from_array(array, key))
    path, artifact = saved(model, tmp_path / "mixed.onnx"), tmp_path / "mixed.so"
    options = {"target": "x86-64-v3", "verify": False}

    def stored(**more):
        manifest = sparse_tvm.compile(path, artifact, **options, **more).manifest
        precisions = {layer["name"]: layer["precision"] for layer in manifest["layers"]}
        return precisions, manifest["totals"]["weight_bytes"]

    tables, layers = 300 * 64, 64 * 64
    assert stored() == ({"wide": "float32", "narrow": name}, (4 + 2) * (tables + layers))
    asked = {"fp16": "float16", "bf16": "bfloat16"}
    for precision, dtype in asked.items():
        both = {"wide": dtype, "narrow": dtype}
        assert stored(precision=precision) == (both, 4 * (tables + layers))
        assert stored(layer_rules=[f"wide$=@{precision}"])[0] == {"wide": dtype, "narrow": name}


def test_quantised_models_of_float16_keep_their_integers(tmp_path):
    graph = """(float16[4,64] x) => (float16[4,32] y) {
        q = QuantizeLinear(x, step, zero) a = DequantizeLinear(q, step, zero)
        b = DequantizeLinear(w, step, zero) y = MatMul(a, b) }"""
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["" : 19]> g {graph}')
    w = np.random.default_rng(0).integers(-127, 128, (64, 32)).astype(np.int8)
    constants = {"w": w, "step": np.float16(0.03), "zero": np.int8(0)}
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    path = saved(model, tmp_path / "model.onnx")
    manifest = sparse_tvm.compile(path, tmp_path / "model.so", target="x86-64-v3").manifest
    assert [layer["precision"] for layer in manifest["layers"]] == ["int8"]


def test_weights_beyond_the_range_of_float16_stay_float32(tmp_path):
    graph = "(float[2,64] x) => (float[2,8] y) { y = MatMul(x, w) }"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {graph}')
    w = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    w[3, 3] = 1e5
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    path = saved(model, tmp_path / "model.onnx")
    manifest = sparse_tvm.compile(path, tmp_path / "model.so", precision="fp16").manifest
    assert [layer["precision"] for layer in manifest["layers"]] == ["float32"]
    [note] = [note for note in manifest["notes"] if "float16" in note]
    assert "largest weight, 100000, is no float16" in note


@pytest.mark.parametrize("target", ["sapphirerapids", "avx512-bf16", "x86-64-v3"])
def test_bfloat16_computes_in_bf16_where_the_target_has_it(bert, tmp_path, target, on_target):
    on_target(target)
    path = saved(narrowed(bert, "bfloat16"), tmp_path / "half.onnx")
    manifest = sparse_tvm.compile(path, tmp_path / "half.so", target=target).manifest
    assert {layer["precision"] for layer in manifest["layers"]} == {"bfloat16"}
    stored = "weights in bfloat16, for kernels that compute in float32"
    stores = any(stored in note for note in manifest["notes"])
    assert stores == (target == "x86-64-v3")
    assert manifest["outputs"][0]["dtype"] == "float32"
    exact = sparse_tvm.compile(path, tmp_path / "exact.so", target=target, precision="fp32")
    assert {layer["precision"] for layer in exact.manifest["layers"]} == {"float32"}
    assert exact.manifest["verification"]["max_abs_diff"]["last_hidden_state"] < 1e-4


@pytest.mark.parametrize("name", HALVES)
def test_weights_keep_their_values_and_their_zeros(tmp_path, name):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 256)).astype(HALVES[name])
    w[np.kron(rng.random((256, 64)) < 0.9, np.ones((1, 4), bool))] = 0
    graph = "(float[8,256] x) => (float[8,256] y) { h = Relu(x) y = MatMul(h, w) }"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {graph}')
    model.graph.initializer.append(numpy_helper.from_array(w.astype(np.float32), "w"))
    path = saved(narrowed(model, name), tmp_path / "half.onnx")
    [stored] = read_onnx(path).graph.initializer
    assert np.array_equal(numpy_helper.to_array(stored), w.astype(np.float32))
    [layer] = sparse_tvm.inspect(path)["layers"]
    assert layer["nnz"] == np.count_nonzero(w)
    assert layer["structure"] == "4x1 blocks (fill 1.00)"
    [layer] = sparse_tvm.compile(path, tmp_path / "half.so", precision="fp32").manifest["layers"]
    assert layer["format"] == "bsr"


def test_float16_goes_through_every_verb(bert, tmp_path):
    graph = "(float16[2,64] x) => (float16[2,8] y) { y = MatMul(x, w) }"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {graph}')
    w = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float16)
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    path, artifact = saved(model, tmp_path / "half.onnx"), tmp_path / "half.so"
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float16)
    np.savez(tmp_path / "x.npz", x=x)
    for arguments in (
        ["compile", path, "-o", artifact],
        ["run", artifact, "--inputs", tmp_path / "x.npz", "--output", tmp_path / "y.npz"],
        ["bench", artifact, "--against", path, "--duration", "0.2", "--warmup", "0.1"],
        ["verify", artifact],
        ["inspect", path],
    ):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
    y = np.load(tmp_path / "y.npz")["y"]
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, x.astype(np.float32) @ w.astype(np.float32), rtol=1e-2, atol=1e-2)


def test_widening_reaches_inner_graphs_and_leaves_the_model_alone():
    graph = """(float16[4] x, bool c) => (float16[4] y, float16[4] z) {
        y = If (c) <
            then_branch = then () => (float16[4] a) { a = Add(x, one) },
            else_branch = other () => (float16[4] b) { b = Cast<to = 10>(x) } >
        z = Neg(y)
    }"""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {graph}')
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float16), "one"))
    before = model.SerializeToString()
    wide = widen(model)
    assert model.SerializeToString() == before
    assert (half_types(model), widened_types(wide)) == (["float16"], ["float16"])
    onnx.checker.check_model(wide, full_check=True)
    ends = (*wide.graph.input[:1], *wide.graph.output)
    assert {value.type.tensor_type.elem_type for value in ends} == {TensorProto.FLOAT16}
    casts = [node for node in wide.graph.node if node.op_type == "Cast"]
    assert [node.input[0] for node in casts] == ["x", "y.float32", "z.float32"]
    from sparse_tvm.reference import Reference

    x = {"x": np.float16([1, -2, 3, 4]), "c": np.array(False)}
    results = [Reference(m.SerializeToString(), threads=1).run(x) for m in (model, wide)]
    for name in ("y", "z"):
        assert np.array_equal(results[0][name], results[1][name])
