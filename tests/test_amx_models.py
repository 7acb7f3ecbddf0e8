"""Whole models on AMX: on the CPU's own, or emulated where AVX-512 with bfloat16 is without it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from amx_emulator import counts, emulated_target
from onnx import numpy_helper, parser
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

import sparse_tvm
from sparse_tvm import suitability
from sparse_tvm.backends import get_backend
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.targets import TARGETS

BERT = BertConfig(layers=1, hidden=256, heads=4, intermediate=512, vocabulary=100)


@pytest.fixture
def target(on_target):
    """The name of the target with AMX, where it runs."""
    return on_target("sapphirerapids")


def compiled(model, tmp_path, target, *families, **options):
    """What compiling, running and comparing a model says of it, and that tiles were multiplied."""
    emulated = emulated_target() is not None
    before = counts()["products"] if emulated else 0
    manifest = sparse_tvm.compile(model, tmp_path / "model.so", target=target, **options).manifest
    assert set(families) <= {kernel.get("family") for kernel in manifest["kernels"].values()}
    assert not emulated or counts()["products"] > before
    return {name: one["cosine"] for name, one in manifest["verification"]["similarity"].items()}


@pytest.mark.parametrize(("precision", "cosine"), [("int8", 0.995), ("bf16", 0.9999)])
@pytest.mark.parametrize(
    ("sparsity", "structure"), [(0, ""), (0.9, "unstructured"), (0.7, "16x4"), (0.9, "32x2")]
)
def test_a_transformer_agrees(tmp_path, target, precision, cosine, sparsity, structure):
    model = tmp_path / "bert.onnx"
    onnx.save(build_bert(BERT, sequence=120), model)
    if sparsity:
        sparse_tvm.prune(model, model, sparsity=sparsity, structure=structure)
    families = ("tiles", "tile_attention")
    found = compiled(model, tmp_path, target, *families, precision=precision)
    assert found["last_hidden_state"] > cosine


def test_a_convolutional_network_agrees(tmp_path, target):
    graph = """<ir_version: 8, opset_import: ["" : 17]>
    network (float[1,64,14,14] x) => (float[1,64,14,14] y) {
        a = Conv<pads = [1,1,1,1]>(x, w0)
        b = Relu(a)
        c = Conv(b, w1)
        d = Add(c, x)
        y = Relu(d)
    }"""
    model, quantised = parser.parse_model(graph), tmp_path / "quantised.onnx"
    rng = np.random.default_rng(0)
    for name, shape in {"w0": (64, 64, 3, 3), "w1": (64, 64, 1, 1)}.items():
        w = rng.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[1:]))
        model.graph.initializer.append(numpy_helper.from_array(w.astype(np.float32), name))
    onnx.save(model, tmp_path / "plain.onnx")

    class Images(CalibrationDataReader):
        left = 4

        def get_next(self):
            self.left -= 1
            image = {"x": rng.standard_normal((1, 64, 14, 14), np.float32)}
            return image if self.left >= 0 else None

    quantize_static(
        tmp_path / "plain.onnx", quantised, Images(), per_channel=True, weight_type=QuantType.QInt8
    )
    found = compiled(quantised, tmp_path, target, "tile_convolution")
    assert found["y"] > 0.99


def test_every_family_with_tiles_asks_for_them():
    with_tiles, without = TARGETS["sapphirerapids"], TARGETS["znver5"]
    able = [one for one in get_backend("cpu").families if hasattr(one, "lacks")]
    found = {
        one.name
        for one in able
        if one.lacks(with_tiles) is None and "AMX" in (one.lacks(without) or "")
    }
    assert found == suitability.TILE_FAMILIES
