"""Convolutions of kernel 1 over tokens turned round become dense layers over the tokens."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    apply,
    assert_becomes,
    assert_unchanged,
    build,
    calls,
    compile_and_run,
    operators,
)
from tvm import relax

from sparse_tvm.operators import Activation, Attention, Bias, Dense, Residual
from sparse_tvm.passes import dialect
from sparse_tvm.passes.fuse_attention import fuse_attention
from sparse_tvm.passes.fuse_epilogue import fuse_epilogue
from sparse_tvm.passes.signals_to_tokens import signals_to_tokens

OP = relax.op
TOKENS = {"x": ("batch", "rows", 12)}


def turned(emit, x):
    return emit(OP.permute_dims(x, [0, 2, 1]))


def convolved(emit, x, w, b=None, groups=1):
    y = emit(OP.nn.conv1d(x, w, groups=groups))
    if b is None:
        return y
    return emit(OP.add(y, emit(OP.reshape(b, (1, int(b.ty.shape.values[0]), 1)))))


@pytest.mark.parametrize("groups", [1, 3])
def test_a_layer_between_turns(groups):
    weight = {"w": (6, 12 // groups, 1)}

    def before(emit, x, w):
        return OP.permute_dims(convolved(emit, turned(emit, x), w, groups=groups), [0, 2, 1])

    def expected(emit, x, w):
        batch, rows, _ = x.ty.shape.values
        op = Dense(layer="w", matrix=(6, 12 // groups), groups=groups)
        return dialect.call(op, [x, w], (batch, rows, 6))

    module = build(expected, TOKENS, {"w_matrix": (6, 12 // groups)}).module
    after = assert_becomes(signals_to_tokens, build(before, TOKENS, weight), module)
    assert after.layers["w_matrix"] == "w"


def test_two_layers_with_what_is_between_them_and_a_residual():
    def body(emit, x, w, b, v):
        signal = turned(emit, x)
        y = emit(OP.nn.gelu(convolved(emit, signal, w, b, groups=2)))
        return OP.permute_dims(emit(OP.add(convolved(emit, y, v), signal)), [0, 2, 1])

    subject = build(body, TOKENS, {"w": (24, 6, 1), "b": (24,), "v": (12, 24, 1)})
    after = apply([signals_to_tokens, fuse_epilogue], subject)
    assert operators(after) == ["dense", "dense"]
    first, second = calls(after, Dense)
    assert first.op.groups == 2
    assert first.op.epilogue == (Bias(), Activation("gelu"))
    assert second.op.epilogue == (Residual(),)


def attention(emit, x, q, k, v, o):
    signal, heads = turned(emit, x), []
    batch, rows, _ = x.ty.shape.values
    for w in (q, k, v):
        split = (batch, 3, 4, rows)
        heads.append(emit(OP.reshape(convolved(emit, signal, w, groups=2), split)))
    across = [0, 1, 3, 2]
    scores = emit(OP.matmul(emit(OP.permute_dims(heads[0], across)), heads[1]))
    weights = emit(OP.nn.softmax(emit(OP.divide(scores, relax.const(2.0, "float32")))))
    context = emit(OP.matmul(weights, emit(OP.permute_dims(heads[2], across))))
    merged = emit(OP.reshape(emit(OP.permute_dims(context, across)), (batch, 12, rows)))
    return OP.permute_dims(convolved(emit, merged, o), [0, 2, 1])


PROJECTIONS = {**dict.fromkeys("qkv", (12, 6, 1)), "o": (12, 12, 1)}


def test_attention_between_layers_is_recognised():
    after = apply(
        [signals_to_tokens, fuse_epilogue, fuse_attention], build(attention, TOKENS, PROJECTIONS)
    )
    assert operators(after) == ["dense", "dense", "dense", "attention", "dense"]
    (found,) = calls(after, Attention)
    assert found.op == Attention(heads=3, scale=0.5)


@pytest.mark.parametrize("rows", [5, 40])
def test_results(rows):
    subject = build(attention, TOKENS, PROJECTIONS)
    x = np.random.default_rng(1).standard_normal((2, rows, 12)).astype("float32")

    def layer(t, name, groups):
        w = subject.weights[name][:, :, 0]
        parts = zip(np.split(t, groups, -1), np.split(w, groups), strict=True)
        return np.concatenate([part @ m.T for part, m in parts], -1)

    q, k, v = (
        layer(x, name, 2).reshape(2, rows, 3, 4).transpose(0, 2, 1, 3) for name in ("q", "k", "v")
    )
    scores = np.exp(q @ k.transpose(0, 1, 3, 2) / 2)
    context = scores / scores.sum(-1, keepdims=True) @ v
    expected = layer(context.transpose(0, 2, 1, 3).reshape(2, rows, 12), "o", 1)
    found = compile_and_run(subject, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def signal_to_the_end(emit, x, w):
    return OP.nn.relu(convolved(emit, turned(emit, x), w))


def of_a_signal(emit, x, w):
    return OP.permute_dims(convolved(emit, emit(OP.nn.relu(x)), w), [0, 2, 1])


def of_several_taps(emit, x, w):
    y = emit(OP.nn.conv1d(turned(emit, x), w, padding=1))
    return OP.permute_dims(y, [0, 2, 1])


def of_every_other_token(emit, x, w):
    return OP.permute_dims(emit(OP.nn.conv1d(turned(emit, x), w, strides=2)), [0, 2, 1])


@pytest.mark.parametrize(
    ("body", "shape", "taps"),
    [
        (signal_to_the_end, (2, 9, 12), 1),
        (of_a_signal, (2, 12, 9), 1),
        (of_several_taps, (2, 9, 12), 3),
        (of_every_other_token, (2, 9, 12), 1),
    ],
)
def test_is_left_alone(body, shape, taps):
    assert_unchanged(signals_to_tokens, build(body, {"x": shape}, {"w": (6, 12, taps)}))


IMAGES = {"x": ("batch", 12, 7, 9)}


def to_tokens(emit, image):
    return emit(OP.permute_dims(image, [0, 2, 3, 1]))


def to_image(emit, tokens):
    return emit(OP.permute_dims(tokens, [0, 3, 1, 2]))


def scaled_residuals(emit, x, w, v, s):
    """Two blocks of ConvNeXt without their images' convolutions."""
    for weight in (w, v):
        y = to_image(emit, emit(OP.matmul(to_tokens(emit, x), weight)))
        x = emit(OP.add(emit(OP.multiply(s, y)), x))
    return to_tokens(emit, x)


RESIDUALS = {"w": (12, 12), "v": (12, 12), "s": (12, 1, 1)}


def test_residuals_of_images_are_tokens():
    before = build(scaled_residuals, IMAGES, RESIDUALS)
    after = apply([signals_to_tokens], before)
    assert operators(after).count("permute_dims") == 1
    assert after.weights["s_of_tokens"].shape == (12,)
    x = np.random.default_rng(2).standard_normal((2, 12, 7, 9)).astype("float32")
    tokens = x.transpose(0, 2, 3, 1)
    w, v, s = before.weights.values()
    for weight in (w, v):
        tokens = tokens @ weight * s[:, 0, 0] + tokens
    np.testing.assert_allclose(compile_and_run(before, x), tokens, rtol=1e-4, atol=1e-3)


def image_to_the_end(emit, x, w, s):
    y = to_image(emit, emit(OP.matmul(to_tokens(emit, x), w)))
    return OP.nn.relu(emit(OP.multiply(s, y)))


def heads_of_images(emit, x, w, s):
    y = emit(OP.permute_dims(emit(OP.matmul(to_tokens(emit, x), w)), [0, 3, 2, 1]))
    return to_tokens(emit, emit(OP.nn.relu(y)))


@pytest.mark.parametrize("body", [image_to_the_end, heads_of_images])
def test_other_images_are_left_alone(body):
    before = build(body, IMAGES, {"w": (12, 12), "s": (12, 1, 1)})
    assert operators(apply([signals_to_tokens], before)) == operators(before)
