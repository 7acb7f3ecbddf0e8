"""A number for each feature behind a dense layer goes into its weight and bias."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, assert_becomes, assert_unchanged, build, compile_and_run, operators
from tvm import relax

from sparse_tvm.passes.fc_transpose import fc_transpose
from sparse_tvm.passes.fold_scales import fold_scales
from sparse_tvm.passes.fuse_epilogue import fuse_epilogue

OP = relax.op
X = {"x": ("batch", 7, 8)}


def layer(emit, x, w):
    return emit(OP.matmul(x, emit(OP.permute_dims(w))))


def scaled(emit, x, w, s):
    return OP.multiply(s, layer(emit, x, w))


def with_bias(emit, x, w, b, s):
    return OP.multiply(emit(OP.add(b, layer(emit, x, w))), s)


WEIGHT, BIASED = {"w": (6, 8), "s": (6,)}, {"w": (6, 8), "b": (6,), "s": (6,)}


def test_weight_is_scaled():
    module = build(lambda emit, x, w: layer(emit, x, w), X, {"w_scaled": (6, 8)}).module
    before = build(scaled, X, WEIGHT)
    after = assert_becomes(fold_scales, before, module)
    expected = before.weights["w"] * before.weights["s"][:, None]
    np.testing.assert_array_equal(after.weights["w_scaled"], expected)
    assert after.layers["w_scaled"] == "w"


def test_bias_is_scaled():
    def expected(emit, x, w, b):
        return OP.add(layer(emit, x, w), b)

    weights = {"w_scaled": (6, 8), "w_bias_scaled": (6,)}
    before = build(with_bias, X, BIASED)
    after = assert_becomes(fold_scales, before, build(expected, X, weights).module)
    biases = before.weights["b"] * before.weights["s"]
    np.testing.assert_array_equal(after.weights["w_bias_scaled"], biases)


def test_zeros_stay_and_a_residual_is_the_layers_own():
    def body(emit, x, r, w, b, s):
        return OP.add(emit(with_bias(emit, x, w, b, s)), r)

    before = build(body, {**X, "r": ("batch", 7, 6)}, BIASED)
    before.weights["w"][::2] = 0
    after = apply([fold_scales, fuse_epilogue], before)
    assert operators(after) == ["dense"]
    assert not after.weights["w_scaled"][::2].any()
    rng = np.random.default_rng(0)
    x, r = (rng.standard_normal((2, 7, size)).astype("float32") for size in (8, 6))
    w, b, s = before.weights.values()
    found = compile_and_run(before, x, r)
    np.testing.assert_allclose(found, (x @ w.T + b) * s + r, rtol=0, atol=1e-5)


def read_twice(emit, x, w, s):
    y = layer(emit, x, w)
    return OP.add(emit(OP.multiply(y, s)), y)


def weight_read_twice(emit, x, w, s):
    y = emit(OP.multiply(layer(emit, x, w), s))
    return OP.add(y, layer(emit, x, w))


def behind_an_activation(emit, x, w, s):
    return OP.multiply(emit(OP.nn.relu(layer(emit, x, w))), s)


@pytest.mark.parametrize(
    ("body", "scale"),
    [
        (read_twice, (6,)),
        (weight_read_twice, (6,)),
        (behind_an_activation, (6,)),
        (scaled, (7, 1)),
        (scaled, (7, 6)),
    ],
)
def test_is_left_alone(body, scale):
    assert_unchanged(fold_scales, build(body, X, {"w": (6, 8), "s": scale}))


def test_numbers_of_an_input_are_left_alone():
    def body(emit, x, s, w):
        return scaled(emit, x, w, s)

    subject = build(body, {**X, "s": (6,)}, {"w": (6, 8)})
    assert_unchanged([fc_transpose, fold_scales], subject)
