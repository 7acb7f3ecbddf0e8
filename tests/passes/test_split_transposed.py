"""Transposed convolutions become convolutions whose channels become pixels."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, assert_unchanged, build, calls, compile_and_run, evaluate, operators
from tvm import relax

from sparse_tvm.operators import PixelShuffle
from sparse_tvm.passes.split_transposed import split_transposed

OP = relax.op
IMAGE, WEIGHT = {"x": (2, 6, 7, 9)}, {"w": (6, 5, 2, 2)}


def const(value):
    return relax.const(np.asarray(value, "float32"))


def test_kernel_as_large_as_the_stride_is_a_convolution_of_single_pixels():
    def body(emit, x, w):
        return OP.nn.conv2d_transpose(x, w, strides=(2, 2))

    before = build(body, IMAGE, WEIGHT)
    after = apply(split_transposed, before)
    assert operators(after) == ["nn.conv2d", "pixel_shuffle"]
    (call,) = calls(after, PixelShuffle)
    assert call.op == PixelShuffle(blocks=(2, 2), starts=(0, 0), ends=(0, 0))
    ((name, w),) = after.weights.items()
    assert after.layers[name] == "w"
    wanted = before.weights["w"].transpose(1, 2, 3, 0).reshape(20, 6, 1, 1)
    np.testing.assert_array_equal(w, wanted)


def test_what_follows_happens_before_pixels_are_put_in_place():
    def body(emit, x, w):
        y = emit(OP.nn.conv2d_transpose(x, w, strides=(2, 2)))
        y = emit(OP.add(y, const(np.arange(5).reshape(1, 5, 1, 1))))
        return OP.sigmoid(emit(OP.multiply(y, const(2))))

    after = apply(split_transposed, build(body, IMAGE, WEIGHT))
    assert operators(after) == ["nn.conv2d", "add", "multiply", "sigmoid", "pixel_shuffle"]


def test_another_image_is_added_behind():
    def body(emit, x, r, w):
        return OP.add(emit(OP.nn.conv2d_transpose(x, w, strides=(2, 2))), r)

    after = apply(split_transposed, build(body, {**IMAGE, "r": (2, 5, 14, 18)}, WEIGHT))
    assert operators(after) == ["nn.conv2d", "pixel_shuffle", "add"]


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((2, 2), {"strides": (2, 2)}),
        ((4, 4), {"strides": (2, 2), "padding": (1, 1, 1, 1)}),
        ((3, 3), {"strides": (2, 2), "padding": (1, 1, 1, 1), "output_padding": (1, 1)}),
        ((3, 5), {"strides": (2, 3), "padding": (0, 2, 1, 3), "output_padding": (1, 0)}),
        ((3, 3), {"strides": (1, 1), "padding": (1, 1, 1, 1)}),
        ((1, 2), {"strides": (3, 3), "output_padding": (2, 2)}),
        ((5, 5), {"strides": (2, 2), "padding": (4, 4, 4, 3)}),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_results(kernel, options, groups):
    def body(emit, x, w):
        y = emit(OP.nn.conv2d_transpose(x, w, groups=groups, **options))
        channels = int(y.ty.shape.values[1])
        y = emit(OP.add(y, const(np.arange(channels).reshape(1, -1, 1, 1))))
        return OP.nn.relu(y)

    before = build(body, IMAGE, {"w": (6, 3, *kernel)})
    x = np.random.default_rng(0).standard_normal(IMAGE["x"]).astype("float32")
    expected = evaluate(before, x)
    np.testing.assert_allclose(compile_and_run(before, x), expected, rtol=0, atol=1e-4)


def test_results_of_a_decoder_of_any_size():
    """Planes all the way: a convolution, its channels as pixels, another one of both."""

    def body(emit, x, v, w, u):
        y = emit(OP.nn.relu(emit(OP.nn.conv2d(x, v, padding=(1, 1, 1, 1)))))
        z = emit(OP.nn.conv2d_transpose(emit(OP.nn.max_pool2d(y, (2, 2), (2, 2))), w, strides=2))
        return OP.nn.conv2d(emit(OP.concat([z, y], 1)), u, padding=(1, 1, 1, 1))

    weights = {"v": (8, 6, 3, 3), "w": (8, 8, 2, 2), "u": (4, 16, 3, 3)}
    before = build(body, {"x": ("batch", 6, 8, 12)}, weights)
    for batch in (1, 3):
        x = np.random.default_rng(0).standard_normal((batch, 6, 8, 12)).astype("float32")
        expected = evaluate(build(body, {"x": x.shape}, weights), x)
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(compile_and_run(before, x), expected, atol=1e-5 * scale)


def test_results_of_a_signal():
    def body(emit, x, w):
        return OP.nn.conv1d_transpose(x, w, strides=4, padding=(3, 2))

    before = build(body, {"x": (2, 6, 30)}, {"w": (6, 5, 9)})
    x = np.random.default_rng(0).standard_normal((2, 6, 30)).astype("float32")
    np.testing.assert_allclose(compile_and_run(before, x), evaluate(before, x), rtol=0, atol=1e-4)


def reshaped(emit, x, w):
    """A network for super-resolution, as exporters write it."""
    y = emit(OP.nn.relu(emit(OP.nn.conv2d(x, w, padding=1))))
    batch, _, height, width = y.ty.shape.values
    parts = emit(OP.reshape(y, (batch, 2, 2, 3, height, width)))
    moved = emit(OP.permute_dims(parts, [0, 1, 4, 2, 5, 3]))
    return OP.tanh(emit(OP.reshape(moved, (batch, 2, height * 2, width * 3))))


def test_channels_that_reshapes_make_pixels():
    weight, symbolic = {"w": (12, 6, 3, 3)}, {"x": ("batch", 6, "height", "width")}
    before = build(reshaped, symbolic, weight)
    after = apply(split_transposed, before)
    assert operators(after) == ["nn.conv2d", "nn.relu", "tanh", "pixel_shuffle"]
    for shape in ((1, 6, 5, 8), (3, 6, 14, 4)):
        x = np.random.default_rng(0).standard_normal(shape).astype("float32")
        expected = evaluate(build(reshaped, {"x": shape}, weight), x)
        np.testing.assert_allclose(compile_and_run(before, x), expected, rtol=0, atol=1e-5)


def test_other_reshapes_are_left_alone():
    def of_an_input(emit, x):
        parts = emit(OP.reshape(x, (2, 2, 3, 2, 4, 5)))
        return OP.reshape(emit(OP.permute_dims(parts, [0, 1, 4, 2, 5, 3])), (2, 2, 12, 10))

    def blocks_first(emit, x, w):
        parts = emit(OP.reshape(emit(OP.nn.conv2d(x, w)), (2, 2, 3, 2, 4, 5)))
        return OP.reshape(emit(OP.permute_dims(parts, [0, 3, 4, 1, 5, 2])), (2, 2, 8, 15))

    image = {"x": (2, 12, 4, 5)}
    assert_unchanged(split_transposed, build(of_an_input, image))
    assert_unchanged(split_transposed, build(blocks_first, image, {"w": (12, 12, 1, 1)}))


def test_dilated_kernel_is_left_alone():
    def body(emit, x, w):
        return OP.nn.conv2d_transpose(x, w, strides=(2, 2), dilation=(2, 2))

    assert_unchanged(split_transposed, build(body, IMAGE, WEIGHT))


def test_weight_that_is_no_constant_is_left_alone():
    def body(emit, x, w):
        return OP.nn.conv2d_transpose(x, w, strides=(2, 2))

    assert_unchanged(split_transposed, build(body, {**IMAGE, **WEIGHT}))
