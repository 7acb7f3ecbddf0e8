"""Typical extents of symbolic images, and layouts that are chosen for them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, build, calls
from tvm import relax, tirx

from sparse_tvm.operators import Convolution
from sparse_tvm.passes.dense_to_sparse import dense_to_sparse
from sparse_tvm.passes.fuse_convolution import fuse_convolution
from sparse_tvm.passes.typical_sizes import TypicalSizes

OP = relax.op


def test_extents_follow_from_images_of_224_rows_and_columns():
    batch, height, width = (tirx.Var(name, "int64") for name in ("batch", "height", "width"))
    image = relax.Var("x", relax.TensorType([batch, 3, height, width * 32], "float32"))
    sizes = TypicalSizes([image])
    halved = ((height + 1) // 2, width * 16)
    assert sizes.of(halved) == (112, 112)
    assert sizes.of((7, width)) == (7, 7)
    assert sizes.of((batch, height * batch)) == (None, None)


def test_other_inputs_have_no_typical_size():
    length = tirx.Var("length", "int64")
    signal = relax.Var("x", relax.TensorType([1, 3, length], "float32"))
    assert TypicalSizes([signal]).of((length,)) == (None,)


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_layouts_are_those_of_images_of_that_size(sparsity):
    def body(emit, x, v, w):
        y = emit(OP.nn.conv2d(x, v, strides=(2, 2), padding=(1, 1, 1, 1)))
        return OP.nn.conv2d(emit(OP.nn.relu(y)), w)

    rng = np.random.default_rng(0)
    weights = {
        name: (rng.standard_normal(shape) * (rng.random(shape) >= sparsity)).astype("float32")
        for name, shape in {"v": (32, 3, 3, 3), "w": (64, 32, 1, 1)}.items()
    }

    def chosen(shape):
        before = build(body, {"x": shape}, {name: w.shape for name, w in weights.items()})
        before.weights = dict(weights)
        after = apply([fuse_convolution, dense_to_sparse], before)
        return [(call.op.layout, call.op.usual) for call in calls(after, Convolution)]

    known, symbolic = chosen((1, 3, 224, 224)), chosen(("batch", 3, "height", "width"))
    assert known[1] == symbolic[1]
    assert [usual for _, usual in symbolic] == [(), ()]
