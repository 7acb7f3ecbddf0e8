"""Convolutions of float32 models in int8, by static scales that calibration data gives."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import sparse_tvm
from sparse_tvm.errors import InputError, OptionError
from sparse_tvm.quantising.rehearsal import Rehearsal
from sparse_tvm.quantising.scales import METHODS, static_scales, with_scales
from sparse_tvm.quantising.sites import image_tensors, sites_of
from sparse_tvm.reference import Reference
from sparse_tvm.verification import Similarity

TARGET = "x86-64-v3"
CHANNELS = 16


def network(opset: int = 17) -> onnx.ModelProto:
    """Blocks that are added to what they read, one of them depthwise, one behind a batch norm."""
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
    network (float[2,3,16,16] x) => (float[2,10] y) {{
        stem = Conv<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x, stem_weight, stem_bias)
        a = Relu(stem)
        inner = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(a, inner_weight)
        inner_cut = Clip(inner, zero, six)
        deep = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group={CHANNELS}>(inner_cut, deep_weight)
        normed = BatchNormalization(deep, gamma, beta, mean, variance)
        total = Add(normed, a)
        b = Relu(total)
        wide = Conv<kernel_shape=[1,1]>(b, wide_weight)
        grouped = Conv<kernel_shape=[1,1], group=2>(wide, grouped_weight)
        last = Conv<kernel_shape=[1,1]>(grouped, last_weight)
        c = Add(last, b)
        d = Relu(c)
        pooled = GlobalAveragePool(d)
        flat = Flatten(pooled)
        y = Gemm<transB=1>(flat, head_weight)
    }}"""
    rng = np.random.default_rng(0)
    model = parser.parse_model(text)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = re.sub("_(weight|bias)$", r".\1", name)
    shapes = {
        "stem": (CHANNELS, 3, 3, 3),
        "inner": (CHANNELS, CHANNELS, 3, 3),
        "deep": (CHANNELS, 1, 3, 3),
        "wide": (2 * CHANNELS, CHANNELS, 1, 1),
        "grouped": (CHANNELS, CHANNELS, 1, 1),
        "last": (CHANNELS, CHANNELS, 1, 1),
        "head": (10, CHANNELS),
    }
    arrays = {
        f"{name}.weight": rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        for name, shape in shapes.items()
    }
    arrays |= {"stem.bias": rng.standard_normal(CHANNELS), "zero": 0.0, "six": 6.0}
    arrays |= {name: rng.uniform(0.5, 1.5, CHANNELS) for name in ("gamma", "variance")}
    arrays |= {name: rng.standard_normal(CHANNELS) / 4 for name in ("beta", "mean")}
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(np.float32(array), name))
    return model


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((8, 3, 16, 16)).astype(np.float32)


def without_groups(model: onnx.ModelProto):
    return [site for site in sites_of(model) if site.ref.layer != "grouped"]


def feeds(x):
    return [{"x": x[start : start + 2]} for start in range(0, len(x), 2)]


def compiled(x, tmp_path, model=None, **options):
    given = {"precision": "int8", "calibrate": {"x": x}, "target": TARGET, **options}
    return sparse_tvm.compile(model or network(), tmp_path / "m.so", **given)


def precisions(result):
    return {layer["name"]: layer["precision"] for layer in result.manifest["layers"]}


def test_images_are_what_convolutions_read_and_the_addends_of_their_sums():
    model = network()
    found = image_tensors(model, without_groups(model))
    # d is read by no convolution, so what it is the sum of may stay float32.
    assert found == {"x", "a", "inner_cut", "normed", "b", "grouped"}
    dense = [site for site in sites_of(model) if site.convolution is None]
    assert [site.ref.layer for site in dense] == ["head"]
    assert image_tensors(model, dense) == set()


def test_a_sum_of_something_else_leaves_its_addends_alone():
    model = network()
    add = next(node for node in model.graph.node if node.name == "" and node.output[0] == "total")
    scaled = onnx.helper.make_node("Mul", ["a", "six"], ["scaled"])
    model.graph.node.insert(list(model.graph.node).index(add), scaled)
    add.input[1] = "scaled"
    assert "normed" not in image_tensors(model, without_groups(model))


@pytest.mark.parametrize("method", METHODS)
def test_the_artifact_computes_what_onnx_runtime_does_by_the_same_scales(x, tmp_path, method):
    model = network()
    sites = without_groups(model)
    tensors = {site.tensor for site in sites} | image_tensors(model, sites)
    scales = static_scales(model, tensors, feeds(x), method)
    onnx.save(with_scales(model, scales, sites), tmp_path / "rounded.onnx")
    rounded = Reference(tmp_path / "rounded.onnx", threads=1)
    result = compiled(x, tmp_path, calibration_method=method, min_cosine=0.5)
    expected = rounded.run(feeds(x)[0])["y"]
    found = sparse_tvm.load(result.path).run(feeds(x)[0])["y"]
    assert Similarity.of(found, expected).cosine > 0.9995
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_convolutions_multiply_bytes_and_sums_of_images_stay_bytes(x, tmp_path):
    result = compiled(x, tmp_path, verify_inputs=feeds(x)[0], min_cosine=0.99)
    found = precisions(result)
    assert found.pop("grouped") == "float32"
    assert set(found.values()) == {"int8"}
    assert "6 layers round by static scales, from 8 samples" in result.manifest["notes"]
    refusal = next(n for n in result.manifest["notes"] if n.startswith("grouped stays float32: "))
    assert "word_convolution has no kernel for 2 groups of 32 channels" in refusal
    kernels = result.manifest["kernels"]
    assert sum(name.startswith("add_image") for name in kernels) == 1
    assert sum(name.startswith("quantise_image") for name in kernels) == 2, "x, and what is grouped"
    assert set(result.manifest["verification"]["sensitivity"]) == set(found)


def test_zeros_are_skipped_in_int8_too(x, tmp_path):
    model = network()
    pruned = tmp_path / "pruned.onnx"
    sparse_tvm.prune(model, pruned, sparsity=0.9, structure="4x1")
    result = compiled(x, tmp_path, pruned, layer_rules=["inner|last=bsr"], min_cosine=0.9)
    layers = {layer["name"]: layer for layer in result.manifest["layers"]}
    for name in ("inner", "last"):
        assert (layers[name]["precision"], layers[name]["format"]) == ("int8", "bsr")


def test_a_layer_that_stays_float32_reads_what_was_not_rounded(x, tmp_path):
    model = network()
    sites = [site for site in without_groups(model) if site.ref.layer != "inner"]
    scales = static_scales(model, image_tensors(model, sites) | {"flat"}, feeds(x))
    written = {node.output[0]: node for node in with_scales(model, scales, sites).graph.node}
    assert written["inner"].input[0] == "a"
    assert list(written["total"].input) == ["normed.rounded", "a.rounded"]
    result = compiled(x, tmp_path, layer_rules=["^inner$=@fp32"], min_cosine=0.9)
    assert precisions(result)["inner"] == "float32"
    assert precisions(result)["deep"] == "int8"


def test_auto_raises_the_convolution_whose_input_has_an_outlier(x, tmp_path):
    model = network()
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, axis, factor in (("deep.weight", 0, 3000), ("wide.weight", 1, 1 / 3000)):
        array = numpy_helper.to_array(arrays[name]).copy()
        np.moveaxis(array, axis, 0)[3] *= factor
        arrays[name].CopyFrom(numpy_helper.from_array(array, name))
    sites = without_groups(model)
    scales = static_scales(model, {site.tensor for site in sites}, feeds(x))
    tried = Rehearsal(model, sites, feeds(x), scales, threads=1)
    losses = tried.losses(dict.fromkeys(tried.layers, "int8"))
    assert next(iter(losses)) == "wide"
    assert tried.cosine({"wide": "bf16"}) == pytest.approx(1.0, abs=1e-9), "no kernel rounds so"


def test_auto_keeps_the_cosine(x, tmp_path):
    result = compiled(x, tmp_path, precision="auto", verify_inputs=feeds(x)[0], min_cosine=0.9999)
    assert result.manifest["verification"]["similarity"]["y"]["cosine"] >= 0.9999
    found = set(precisions(result).values())
    assert found == {"int8", "float32"}


def test_what_is_always_zero_has_no_scale(x, tmp_path):
    with pytest.raises(InputError, match="x is 0 on all of the calibration data"):
        compiled(0 * x, tmp_path)
    assert not list(tmp_path.iterdir())


def test_methods_are_checked_before_anything_is_done(x, tmp_path):
    with pytest.raises(OptionError, match="unknown calibration method 'mean'"):
        compiled(x, tmp_path, tmp_path / "none.onnx", calibration_method="mean")


def test_a_target_without_kernels_leaves_convolutions_alone(x, tmp_path):
    result = compiled(x, tmp_path, target="cortex-a76", verify=False)
    found = precisions(result)
    assert found.pop("head") == "int8"
    assert set(found.values()) == {"float32"}
    assert any(note.startswith("stem stays float32: ") for note in result.manifest["notes"])
