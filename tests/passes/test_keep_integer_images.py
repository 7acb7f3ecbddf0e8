"""Quantised convolutions multiply the model's own bytes, and pass bytes on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import build, calls, compile_and_run, context, evaluate, operators
from tvm import relax

from sparse_tvm.operators import (
    AddImages,
    Convolution,
    DequantiseImage,
    QuantisedConvolution,
    QuantiseImage,
)
from sparse_tvm.passes.fuse_convolution import fuse_convolution
from sparse_tvm.passes.keep_integer_images import keep_integer_images

OP = relax.op
IMAGE = {"x": (2, 6, 13, 11)}
RNG = np.random.default_rng(0)


def number(value):
    return relax.const(np.float32(value), "float32")


def rounded(emit, x, scale=0.05013, zero=100):
    """What ``QuantizeLinear`` and ``DequantizeLinear`` become."""
    steps = emit(OP.divide(x, number(scale)))
    steps = emit(OP.minimum(emit(OP.maximum(steps, number(-zero))), number(255 - zero)))
    return emit(OP.multiply(emit(OP.round(steps)), number(scale)))


def same(x, w, **options):
    pads = [int(k) // 2 for k in w.ty.shape.values[2:]]
    return OP.nn.conv2d(x, w, padding=(*pads, *pads), **options)


def two(emit, x, v, w):
    y = emit(OP.clip(emit(same(rounded(emit, x), v)), 0, 6))
    return same(rounded(emit, y, 6 / 255, 0), w)


def residual(emit, x, v, w):
    a = rounded(emit, emit(same(rounded(emit, x), v)), 0.1, 120)
    b = rounded(emit, emit(same(a, w)), 0.2, 130)
    y = rounded(emit, emit(OP.nn.relu(emit(OP.add(a, b)))), 0.15, 10)
    return same(y, w)


def strided(emit, x, v, w):
    y = rounded(emit, emit(same(rounded(emit, x), v)), 0.1, 77)
    return OP.nn.conv2d(y, w, strides=(2, 2), padding=(1, 1, 1, 1))


def pooled(emit, x, v, w):
    y = rounded(emit, emit(OP.nn.relu(emit(same(rounded(emit, x), v)))), 0.1, 0)
    y = emit(OP.nn.max_pool2d(y, (3, 3), (2, 2), padding=(1, 1, 1, 1)))
    return same(rounded(emit, y, 0.1, 0), w)


def depthwise(emit, x, v, w):
    y = rounded(emit, emit(same(rounded(emit, x), v)), 0.1, 50)
    return OP.nn.conv2d(y, w, strides=(2, 1), padding=(1, 1, 1, 1), groups=8)


def program(body, steps=127):
    weights = {"v": (8, 6, 3, 3), "w": (8, 1 if body is depthwise else 8, 3, 3)}
    made = build(body, IMAGE, weights)
    made.layers = {name: name for name in weights}
    for name, shape in weights.items():
        low = -steps if steps <= 127 else 0
        made.weights[name] = np.float32(RNG.integers(low, steps + 1, shape) * 0.00203)
    return made


def asking(*rules, target="native", integers=True):
    where = context(*rules, target=target)
    return replace(where, options=replace(where.options, integers=integers))


def transformed(made, *rules, **options):
    where = asking(*rules, **options)
    for one in (fuse_convolution, keep_integer_images):
        made = one(made, where, check=True)
    return made


def for_each_reader(emit, x, v, w):
    """One rounding, and a multiplication by its scale for each that reads it."""
    y = emit(same(rounded(emit, x), v))
    steps = emit(OP.divide(y, number(0.1)))
    steps = emit(OP.minimum(emit(OP.maximum(steps, number(-50))), number(205)))
    steps = emit(OP.round(steps))
    a, b = (emit(OP.multiply(steps, number(0.1))) for _ in range(2))
    return same(rounded(emit, emit(OP.add(rounded(emit, emit(same(a, w)), 0.2, 99), b)), 0.3), w)


EXPECTED = {
    two: ["quantise_image", *["quantised_convolution"] * 2],
    residual: [
        "quantise_image",
        *["quantised_convolution"] * 2,
        "add_images",
        "quantised_convolution",
    ],
    strided: ["quantise_image", *["quantised_convolution"] * 2],
    pooled: [
        "quantise_image",
        "quantised_convolution",
        "dequantise_image",
        "nn.max_pool2d",
        "quantise_image",
        "quantised_convolution",
    ],
    for_each_reader: [
        "quantise_image",
        *["quantised_convolution"] * 2,
        "add_images",
        "quantised_convolution",
    ],
    depthwise: ["quantise_image", *["quantised_convolution"] * 2],
}


@pytest.mark.parametrize("body", EXPECTED)
def test_what_becomes_of(body):
    found = transformed(program(body), target="sapphirerapids")
    assert operators(found) == EXPECTED[body]


def test_scales_and_bias_are_two_numbers_of_each_channel():
    found = transformed(program(two), target="sapphirerapids")
    first, last = calls(found, QuantisedConvolution)
    assert first.op.rounds
    assert first.op.epilogue == ()
    assert last.op.types.output == "float32"
    _, weight, *arrays = (found.weights.get(arg.name) for arg in first.args)
    factor, offset, limits = arrays
    w = np.rint(weight / 0.00203).reshape(8, -1)
    np.testing.assert_allclose(factor, 0.05013 * 0.00203 / (6 / 255), rtol=1e-3)
    np.testing.assert_allclose(offset, -100 * factor * w.sum(axis=1), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(limits, [0, 255, 0])


@pytest.mark.parametrize("body", EXPECTED)
def test_outputs_are_those_of_the_model(body):
    made = program(body)
    x = RNG.standard_normal(IMAGE["x"]).astype(np.float32) * 4
    expected = evaluate(made, x)
    found = compile_and_run(made, x, within=asking())
    scale = float(np.abs(expected).max())
    # A step inside may fall the other way where float32 has it half: all that read it move.
    assert np.median(np.abs(found - expected)) < 1e-5 * scale
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05 * scale)


def test_an_image_that_others_read_is_there_in_float32_too():
    def body(emit, x, v, w):
        y = rounded(emit, emit(same(rounded(emit, x), v)), 0.1, 50)
        return OP.add(emit(same(y, w)), emit(OP.exp(y)))

    found = transformed(program(body), target="sapphirerapids")
    assert [call.op.types.output for call in calls(found, QuantisedConvolution)] == [
        "uint8",
        "float32",
    ]
    assert len(calls(found, DequantiseImage)) == 1


def test_what_stays_float32():
    def shared(emit, x, v, w):
        y = emit(same(rounded(emit, x), v))
        return OP.add(emit(same(rounded(emit, y, 0.1, 50), w)), y)

    for subject in (
        transformed(program(two), "v|w=@fp32", target="sapphirerapids"),
        transformed(program(two), target="sapphirerapids", integers=False),
        transformed(program(two, steps=255), target="sapphirerapids"),
    ):
        assert calls(subject, QuantisedConvolution) == []
        assert calls(subject, QuantiseImage) == calls(subject, AddImages) == []
        assert len(calls(subject, Convolution)) == 2
    found = transformed(program(shared), target="sapphirerapids")
    first, _ = calls(found, QuantisedConvolution)
    assert not first.op.rounds
    assert len(calls(found, QuantiseImage)) == 2


@pytest.mark.parametrize(
    ("steps", "target", "why"),
    [(255, "sapphirerapids", "more than 127 steps"), (127, "cortex-a72", "no dot products")],
)
def test_notes_say_why(steps, target, why):
    found = transformed(program(two, steps), target=target)
    assert calls(found, QuantisedConvolution) == []
    assert all("is quantised but stays float32" in note for note in found.notes)
    assert why in found.notes[0]
