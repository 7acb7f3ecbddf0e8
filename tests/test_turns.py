"""Runs whose images take turns give what a run of all of them gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx_models import build, normal

import sparse_tvm
from sparse_tvm.spec import TensorSpec
from sparse_tvm.turns import Turns

GRAPH = """(float[batch, 3, 20, 20] x, float[batch, 5] t) => (float[N, M] y, float[N, C, H, W] z) {
    c = Conv<pads = [1, 1, 1, 1]>(x, w)
    z = Relu(c)
    g = GlobalAveragePool(z)
    f = Flatten(g)
    y = Add(f, t)
}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("turns") / "model.so"
    sparse_tvm.compile(build(GRAPH, w=normal(5, 3, 3, 3)), path)
    return sparse_tvm.load(path, threads=1)


def test_results_are_those_of_one_run(model):
    rng = np.random.default_rng(0)
    feed = {
        "x": rng.standard_normal((7, 3, 20, 20)).astype("float32"),
        "t": rng.standard_normal((7, 5)).astype("float32"),
    }
    assert model._turns.images(list(feed.values())) == 0, "so small that all are near"
    whole = model.run(feed)
    near = model._turns
    try:
        model._turns = replace(near, widest=1e4, weights=0)
        assert model._turns.images(list(feed.values())) == 1
        alone = model.run(feed)
        model._turns = replace(near, widest=2e2, weights=0)
        assert 1 < model._turns.images(list(feed.values())) < 7
        some = model.run(feed)
    finally:
        model._turns = near
    for name, values in whole.items():
        np.testing.assert_array_equal(alone[name], values)
        np.testing.assert_array_equal(some[name], values)


def turns():
    manifest = {
        "turns": {"dimension": "batch", "widest": 8.0, "moved": 50.0},
        "totals": {"weight_bytes": 10 << 20},
    }
    inputs = [TensorSpec("x", "float32", ("batch", 3, 224, 224)), TensorSpec("s", "float32", (2,))]
    return Turns.of(manifest, inputs, threads=1)


def images(count):
    return [np.zeros((count, 3, 224, 224), np.float32), np.zeros(2, np.float32)]


def test_large_images_go_one_by_one():
    assert [turns().images(images(count)) for count in (1, 2, 8)] == [0, 1, 1]
    parts = list(turns().parts(images(5), 2))
    assert [len(x) for x, _ in parts] == [2, 2, 1]
    assert all(s.shape == (2,) for _, s in parts)


def test_more_threads_take_more_images():
    assert replace(turns(), threads=4).images(images(8)) == 4
    assert replace(turns(), threads=8).images(images(8)) == 0


def test_large_weights_are_not_read_for_each_image():
    heavy = replace(turns(), weights=1 << 30, moved=4.0)
    assert heavy.images(images(8)) == 0


def test_models_without_an_entry_take_all_at_once():
    assert Turns.of({"totals": {"weight_bytes": 1}}, [], 1) is None
