"""Slices whose bounds are data: how long they are is counted at run time."""

from __future__ import annotations

import itertools

import numpy as np
import onnxruntime
import pytest
from onnx_models import build, executor, normal

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.importer.model import import_onnx

BOUNDS = (-(2**62), -9, -7, -6, -1, 0, 2, 6, 7, 9, 2**62)


@pytest.mark.parametrize("step", [1, 3, -1, -2])
def test_every_slice(step):
    graph = """(float[n,4] x, int64[1] start, int64[1] end) => (float[m,4] y) {
        y = Slice(x, start, end, axes, steps)
    }"""
    model = build(graph, axes=np.array([-2]), steps=np.array([step]))
    run, session = (
        executor(import_onnx(model)),
        onnxruntime.InferenceSession(model.SerializeToString()),
    )
    for rows, start, end in itertools.product((1, 7), BOUNDS, BOUNDS):
        feeds = {"x": normal(rows, 4), "start": np.array([start]), "end": np.array([end])}
        np.testing.assert_array_equal(run(feeds)[0], session.run(None, feeds)[0])


def test_two_axes_of_which_one_bound_is_data():
    graph = """(float[n,8] x, int32[2] ends) => (float[i,j] y) { y = Slice(x, starts, ends) }"""
    model = build(graph, starts=np.array([0, 2], np.int32))
    run, session = (
        executor(import_onnx(model)),
        onnxruntime.InferenceSession(model.SerializeToString()),
    )
    for ends in itertools.product((-1, 0, 3, 9), repeat=2):
        feeds = {"x": normal(5, 8), "ends": np.array(ends, np.int32)}
        np.testing.assert_array_equal(run(feeds)[0], session.run(None, feeds)[0])


def test_axes_that_are_data_are_refused():
    graph = """(float[n,8] x, int64[k] ends) => (float[i,j] y) { y = Slice(x, ends, ends) }"""
    with pytest.raises(ModelError, match="along how many axes it cuts depends on sizes"):
        import_onnx(build(graph))
