"""Ranges of floats up to a cast size, whose length is that of an image."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx_models import assert_same_as_onnxruntime, build

from sparse_tvm.frontends.onnx.integer_ranges import count_in_integers


@pytest.mark.parametrize("start", [0.0, 2.0, -1.0])
def test_columns_that_are_numbered_in_floats(start):
    graph = """(float[batch,width] x) => (float[n] centres, float[n] y) {
        shape = Shape(x)
        columns = Gather<axis=0>(shape, last)
        limit = Cast<to=1>(columns)
        numbers = Range(start, limit, one)
        centres = Add(numbers, half)
        y = Mul(centres, numbers)
    }"""
    numbers = {"start": np.float32(start), "one": np.float32(1), "half": np.float32(0.5)}
    sizes = [{"batch": 1, "width": 2}, {"batch": 2, "width": 9}]
    model = build(graph, last=np.array(1), **numbers)
    imported = assert_same_as_onnxruntime(model, sizes=sizes)
    assert "range" not in str(imported.outputs[0].shape)


@pytest.mark.parametrize(("start", "step", "cast_from"), [(0.5, 1, 7), (0, 2, 7), (0, 1, 6)])
def test_other_ranges_of_floats_are_left_alone(start, step, cast_from):
    graph = """(float[batch,sequence] x) => (float[n] y) {
        shape = Shape(x)
        whole = Gather<axis=0>(shape, last)
        columns = Cast<to=%d>(whole)
        limit = Cast<to=1>(columns)
        y = Range(start, limit, step)
    }"""
    numbers = {"start": np.float32(start), "step": np.float32(step)}
    model = build(graph % cast_from, last=np.array(1), **numbers)
    model = onnx.shape_inference.infer_shapes(model)
    before = model.SerializeToString()
    count_in_integers(model.graph)
    assert model.SerializeToString() == before
