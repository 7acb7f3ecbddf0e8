"""Precision by layer, chosen on data; static scales; and the layers that hurt most, named."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparse_tvm
from sparse_tvm.cli.app import app
from sparse_tvm.errors import InputError, OptionError, VerificationError
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.quantising.rehearsal import Rehearsal
from sparse_tvm.quantising.scales import static_scales
from sparse_tvm.quantising.search import PrecisionSearch, most_sensitive
from sparse_tvm.quantising.sites import sites_of
from sparse_tvm.sparsity.calibration import calls_of
from sparse_tvm.spec import TensorSpec
from sparse_tvm.targets import TARGETS, runs_here
from sparse_tvm.verification import Similarity

FEATURES = 64
TARGET = "avx512-vnni" if runs_here(TARGETS["avx512-vnni"]) else "x86-64-v3"
needs_vnni = pytest.mark.skipif(
    not runs_here(TARGETS[TARGET]), reason=f"this CPU is not of the family {TARGET}"
)


def layered(batch: int | str = "batch", opset: int = 17) -> onnx.ModelProto:
    """Three dense layers, the second of which has inputs of which one is 1000 times the others."""
    rng = np.random.default_rng(0)
    stretch = np.ones(FEATURES, np.float32)
    stretch[3] = 1000
    tensors = [numpy_helper.from_array(stretch, "stretch")]
    for name in ("first", "second", "third"):
        w = rng.standard_normal((FEATURES, FEATURES), np.float32) / 8
        if name == "second":
            w[3] /= 1000
        tensors.append(numpy_helper.from_array(w, f"{name}.weight"))
    nodes = [
        helper.make_node("MatMul", ["x", "first.weight"], ["a"], "one"),
        helper.make_node("Mul", ["a", "stretch"], ["b"]),
        helper.make_node("Gemm", ["b", "second.weight"], ["c"], "two"),
        helper.make_node("Tanh", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "third.weight"], ["y"], "three"),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, FEATURES]) for name in "xy"
    )
    graph = helper.make_graph(nodes, "layered", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((40, FEATURES), np.float32)


def rehearsal(x, scales=None):
    model = layered()
    return Rehearsal(model, sites_of(model), [{"x": x}], scales or {}, threads=1)


def rounded_by_hand(x, layer):
    """The model's output with one layer in int8, scales per token and per output."""
    model = layered()
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}

    def product(x, name):
        w = arrays[f"{name}.weight"]
        if name == layer:
            step = np.abs(w).max(axis=0, keepdims=True) / 127
            w = np.rint(w / step) * step
            step = np.abs(x).max(axis=-1, keepdims=True) / 127.5
            x = np.clip(np.rint(x / step), -127, 127) * step
        return x @ w

    hidden = product(product(x, "first") * arrays["stretch"], "second")
    return product(np.tanh(hidden), "third")


@pytest.mark.parametrize("opset", [11, 17, 18])
@pytest.mark.parametrize("layer", ["first", "second", "third"])
def test_a_rehearsal_rounds_as_kernels_do(x, layer, opset):
    model = layered(opset=opset)
    tried = Rehearsal(model, sites_of(model), [{"x": x}], {}, threads=1)
    expected = Similarity.of(rounded_by_hand(x, layer), rounded_by_hand(x, None)).cosine
    assert tried.cosine({layer: "int8"}) == pytest.approx(expected, abs=2e-5)
    assert 1e-8 < 1 - tried.cosine({layer: "fp16"}) < 1 - tried.cosine({layer: "bf16"}) < 1e-4
    assert tried.cosine({}) == pytest.approx(1.0, abs=1e-9)


def test_the_layer_with_the_outlier_is_raised_first_and_alone(x):
    search = PrecisionSearch(rehearsal(x), ("int8", "bf16", "fp32"), least=0.999)
    assert next(iter(search.losses)) == "second"
    assert search.precisions() == {"first": "int8", "second": "bf16", "third": "int8"}
    options = search.applied(FormatOptions.parse(rules=["third=@fp32"], precision="int8"))
    chosen = [options.precision_for(name) for name in ("first", "second", "third")]
    assert chosen == ["int8", "bf16", "fp32"], "the user's rule stays"
    assert options.precision_for("second (2)") == "bf16"
    assert most_sensitive(search.losses, 1).startswith("second (")


def test_more_is_raised_until_all_is_float32(x):
    search = PrecisionSearch(rehearsal(x), ("int8", "bf16", "fp32"), least=-1.0)
    seen = []
    while search.raise_more():
        found = search.precisions()
        seen.append([found[name] for name in search.losses])
    assert seen[0] == ["bf16", "int8", "int8"]
    assert seen[2] == ["bf16"] * 3
    assert seen[-1] == ["fp32"] * 3
    options = search.applied(FormatOptions.parse(precision="int8"))
    assert (options.precision, options.rules) == ("fp32", ())


def test_layers_are_raised_past_what_makes_them_no_faster(x):
    ladder = ("int8", "bf16", "fp16", "fp32")
    rungs = {"second": ["fp16", "fp32"], "third": ["fp32"]}
    search = PrecisionSearch(rehearsal(x), ladder, least=0.0, rungs=rungs)
    assert search.precisions() == {"first": "int8", "second": "fp16", "third": "fp32"}
    assert set(search.losses) == {"first", "second"}
    assert "1 layers in fp32 (1 of them would be no faster in less)" in search.note()
    seen = {tuple(search.precisions().values()) for _ in iter(search.raise_more, False)}
    assert seen == {
        ("bf16", "fp16", "fp32"),
        ("fp16", "fp16", "fp32"),
        ("fp32", "fp16", "fp32"),
        ("fp32", "fp32", "fp32"),
    }
    stays = {name: ["fp32"] for name in ("first", "second", "third")}
    none = PrecisionSearch(rehearsal(x), ladder, 0.0, stays)
    assert not none.raise_more()
    assert none.applied(FormatOptions.parse(precision="int8")).precision == "fp32"


def test_weights_beyond_the_range_of_float16_are_rehearsed_as_they_are(x):
    model = layered()
    [third] = [t for t in model.graph.initializer if t.name == "third.weight"]
    third.CopyFrom(numpy_helper.from_array(1e6 * numpy_helper.to_array(third), third.name))
    tried = Rehearsal(model, sites_of(model), [{"x": x}], {}, threads=1)
    assert tried.cosine({"third": "fp16"}) == pytest.approx(1.0, abs=1e-9)
    assert tried.cosine({"first": "fp16"}) < 1 - 1e-9


def test_static_scales_cover_what_the_data_has(x):
    model = layered()
    scales = static_scales(model, ["x", "d"], [{"x": x[:20]}, {"x": x[20:]}])
    low, high = x.min(), x.max()
    assert scales["x"].step == pytest.approx((high - low) / 255, rel=1e-5)
    assert scales["x"].zero == round(-low / scales["x"].step)
    assert scales["d"].step <= 2 / 255


@needs_vnni
def test_auto_leaves_the_layer_with_the_outlier_in_float32(x, tmp_path):
    how = {"precision": "auto", "target": TARGET, "verify_inputs": {"x": x}}
    result = sparse_tvm.compile(layered(), tmp_path / "m.so", min_cosine=0.999, **how)
    precisions = {layer["name"]: layer["precision"] for layer in result.manifest["layers"]}
    assert precisions == {"first": "int8", "second": "float32", "third": "int8"}
    verification = result.manifest["verification"]
    assert verification["similarity"]["y"]["cosine"] >= 0.999
    assert next(iter(verification["sensitivity"])) == "second"
    assert any("2 layers in int8, 1 layers in fp32" in note for note in result.manifest["notes"])
    loose = sparse_tvm.compile(layered(), tmp_path / "m.so", min_cosine=0.0, **how).manifest
    assert {layer["precision"] for layer in loose["layers"]} == {"int8"}
    strict = sparse_tvm.compile(layered(), tmp_path / "m.so", min_cosine=1.0, **how).manifest
    assert {layer["precision"] for layer in strict["layers"]} == {"float32"}


@needs_vnni
def test_what_rehearsal_does_not_foresee_is_raised_after_verification(x, tmp_path, monkeypatch):
    monkeypatch.setattr(Rehearsal, "cosine", lambda self, precisions: 1.0)
    result = sparse_tvm.compile(
        layered(), tmp_path / "m.so", precision="auto", target=TARGET, min_cosine=0.9999
    )
    similar = result.manifest["verification"].get("similarity", {"y": {"cosine": 1.0}})
    assert similar["y"]["cosine"] >= 0.9999
    assert "float32" in {layer["precision"] for layer in result.manifest["layers"]}


@needs_vnni
def test_a_refusal_and_a_report_name_the_layers_that_hurt_most(x, tmp_path):
    how = {"precision": "int8", "target": TARGET, "verify_inputs": {"x": x}}
    with pytest.raises(VerificationError, match=r"take most from it are second \("):
        sparse_tvm.compile(layered(), tmp_path / "m.so", min_cosine=0.9999, **how)
    assert not list(tmp_path.iterdir())
    report = tmp_path / "report.md"
    sparse_tvm.compile(layered(), tmp_path / "m.so", min_cosine=0.0, report=report, **how)
    assert "layers that take most from the cosine | second" in report.read_text()


@needs_vnni
def test_calibrated_layers_round_by_static_scales(x, tmp_path):
    how = {"precision": "int8", "target": TARGET, "min_cosine": 0.5}
    result = sparse_tvm.compile(
        layered(), tmp_path / "m.so", calibrate={"x": x}, layer_rules=["second=@fp32"], **how
    )
    assert result.manifest["verification"]["similarity"]["y"]["cosine"] > 0.99
    assert "2 layers round by static scales, from 40 samples" in result.manifest["notes"]
    model = sparse_tvm.load(tmp_path / "m.so")
    # What is beyond the calibration data is cut off, which no scale per token would do.
    inside, outside = (np.full((1, FEATURES), value, np.float32) for value in (x.max(), 1e4))
    np.testing.assert_allclose(
        model.run({"x": inside})["y"], model.run({"x": outside})["y"], rtol=1e-3, atol=1e-3
    )


@needs_vnni
def test_auto_with_calibration_rounds_statically_what_it_leaves_in_int8(x, tmp_path):
    result = sparse_tvm.compile(
        layered(),
        tmp_path / "m.so",
        precision="auto",
        target=TARGET,
        calibrate={"x": x},
        verify_inputs={"x": x},
    )
    precisions = {layer["name"]: layer["precision"] for layer in result.manifest["layers"]}
    assert precisions == {"first": "int8", "second": "float32", "third": "int8"}
    assert "2 layers round by static scales, from 40 samples" in result.manifest["notes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp32"}, "--calibrate finds scales for int8, and the precision is fp32"),
        ({"precision": "fp16", "target": "x86-64-v2"}, "x86-64-v2 has no kernels for fp16"),
        ({"precision": "auto", "target": "a100", "calibrate": None}, "in fp16 as it is"),
        ({"precision": "int8", "calibrate": {"z": np.zeros((2, FEATURES), np.float32)}}, "no x"),
        ({"precision": "int8", "calibrate": {"x": np.zeros((2, 3), np.float32)}}, "shape"),
        ({"precision": "int8", "calibrate": {"x": np.zeros((2, FEATURES))}}, "x is float64"),
        (
            {"precision": "int8", "calibrate": {"x": np.full((2, FEATURES), np.nan, np.float32)}},
            "x holds 128 NaN or infinite values",
        ),
        (
            {"precision": "int8", "verify_inputs": {"x": np.full((2, 64), np.nan, np.float32)}},
            "verify on: x holds 128 NaN",
        ),
    ],
)
def test_what_is_refused(tmp_path, x, options, message):
    given = {"target": TARGET, "calibrate": {"x": x}, **options}
    with pytest.raises((OptionError, InputError), match=message):
        sparse_tvm.compile(layered(), tmp_path / "m.so", **given)
    assert not list(tmp_path.iterdir())


def test_quantised_models_keep_their_own_scales(tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(layered(), path)
    with pytest.raises(OptionError, match="is quantised already"):
        sparse_tvm.compile(path, tmp_path / "m.so", precision="auto", target=TARGET)


def test_samples_for_a_model_of_a_fixed_batch_become_calls(x):
    specs = [TensorSpec("x", "float32", (8, FEATURES))]
    assert len(calls_of({"x": x}, specs, "data")) == 5
    assert len(calls_of({"x": x[:8]}, specs, "data")) == 1
    assert len(calls_of({"x": x}, [TensorSpec("x", "float32", ("n", FEATURES))], "data")) == 1


def test_agreement_of_classes_counts_every_row():
    one = Similarity.of(np.eye(3), np.eye(3))
    other = Similarity.of(np.eye(3)[:1], np.eye(3)[1:2])
    both = other.with_more(one).as_json()
    assert both["top1"] == pytest.approx(3 / 4)
    assert both["cosine"] == 0


@needs_vnni
def test_the_command_line_takes_all_of_it(tmp_path, x):
    from typer.testing import CliRunner

    onnx.save(layered(), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=x)
    arguments = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.so")]
    arguments += ["--precision", "auto", "--calibrate", str(tmp_path / "data.npz")]
    arguments += ["--verify-inputs", str(tmp_path / "data.npz"), "--min-cosine", "0.999"]
    result = CliRunner().invoke(app, [*arguments, "--target", TARGET])
    assert result.exit_code == 0, result.output
    assert "second" in result.output
