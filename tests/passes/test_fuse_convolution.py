"""Convolutions with what follows them become one operator, whose extents are the image's."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, assert_unchanged, build, calls, compile_and_run, evaluate, operators
from tvm import relax

from sparse_tvm.operators import (
    Activation,
    Bias,
    Clamp,
    Convolution,
    Dense,
    Frames,
    PadFrames,
    Residual,
)
from sparse_tvm.passes.fuse_convolution import fuse_convolution

OP = relax.op
IMAGE = {"x": ("batch", 4, 9, 8)}
WEIGHT = {"w": (6, 4, 3, 3)}


def const(value):
    return relax.const(np.float32(value), "float32")


def convolved(emit, x, w):
    return emit(OP.nn.conv2d(x, w, padding=(1, 1, 1, 1)))


def fused(body, inputs=IMAGE, weights=WEIGHT):
    """The program after the pass, and its convolution."""
    after = apply(fuse_convolution, build(body, inputs, weights))
    (call,) = calls(after, Convolution)
    return after, call


def test_extents():
    def body(emit, x, w):
        return OP.nn.conv2d(x, w, strides=(2, 1), padding=(2, 0, 1, 3), dilation=(1, 2), groups=2)

    after, call = fused(body, weights={"w": (6, 2, 3, 2)})
    assert operators(after) == ["convolution"]
    assert call.op == Convolution(
        layer="w",
        matrix=(6, 2 * 3 * 2),
        channels=4,
        out_channels=6,
        size=(9, 8),
        kernel=(3, 2),
        stride=(2, 1),
        dilation=(1, 2),
        pads=(2, 0, 1, 3),
        groups=2,
    )
    assert not call.op.depthwise
    assert [arg.name for arg in call.args] == ["x", "w"]


def test_signal_is_an_image_one_row_high():
    def body(emit, x, w):
        return OP.nn.conv1d(x, w, strides=2, padding=(1, 3), dilation=2)

    after, call = fused(body, {"x": (2, 5, 40)}, {"w": (7, 5, 3)})
    assert (call.op.size, call.op.kernel) == ((1, 40), (1, 3))
    assert (call.op.stride, call.op.dilation, call.op.pads) == ((1, 2), (1, 2), (0, 1, 0, 3))
    x = np.random.default_rng(0).standard_normal((2, 5, 40)).astype("float32")
    w = after.weights["w"]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 3)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 5, axis=2)[:, :, ::2, ::2]
    expected = np.einsum("bctk,ock->bot", windows, w)
    before = build(body, {"x": (2, 5, 40)}, {"w": (7, 5, 3)})
    np.testing.assert_allclose(compile_and_run(before, x), expected, atol=1e-4)


@pytest.mark.parametrize("bias", [(6, 1, 1), (1, 6, 1, 1)])
@pytest.mark.parametrize("bias_first", [False, True])
def test_bias_activation_and_residual(bias, bias_first):
    def body(emit, x, r, w, b):
        y = convolved(emit, x, w)
        y = emit(OP.nn.relu(emit(OP.add(b, y) if bias_first else OP.add(y, b))))
        return OP.add(r, y)

    inputs = {**IMAGE, "r": ("batch", 6, 9, 8)}
    after, call = fused(body, inputs, {**WEIGHT, "b": bias})
    assert operators(after) == ["reshape", "convolution"]
    assert call.op.epilogue == (Bias(), Activation("relu"), Residual())
    assert [tuple(int(n) for n in call.args[2].ty.shape)] == [(6,)]
    assert call.args[3].name == "r"


BOUNDS = {
    "clip": (lambda emit, y: OP.clip(y, 0.0, 6.0), Clamp(0.0, 6.0)),
    "maximum": (lambda emit, y: OP.maximum(y, const(-1.5)), Clamp(low=-1.5)),
    "minimum": (lambda emit, y: OP.minimum(const(2.5), y), Clamp(high=2.5)),
}


@pytest.mark.parametrize(("bounded", "step"), BOUNDS.values(), ids=BOUNDS.keys())
def test_bounds(bounded, step):
    after, call = fused(lambda emit, x, w: bounded(emit, convolved(emit, x, w)))
    assert operators(after) == ["convolution"]
    assert call.op.epilogue == (step,)


@pytest.mark.parametrize("shape", [(1, 1, 8), (6, 9, 1), (1, 6, 9, 8)])
def test_what_is_no_number_per_channel_is_no_bias(shape):
    """Nor is what broadcasts over the batch a residual."""

    def body(emit, x, w, b):
        return OP.add(convolved(emit, x, w), b)

    after, call = fused(body, weights={**WEIGHT, "b": shape})
    assert call.op.epilogue == ()
    assert operators(after) == ["convolution", "add"]


def test_value_read_twice_ends_the_chain():
    def body(emit, x, w):
        y = convolved(emit, x, w)
        return OP.multiply(emit(OP.nn.relu(y)), y)

    after, call = fused(body)
    assert call.op.epilogue == ()
    assert operators(after) == ["convolution", "nn.relu", "multiply"]


def test_sum_of_two_convolutions_is_a_residual_of_one():
    def body(emit, x, w, v):
        return OP.add(convolved(emit, x, w), convolved(emit, x, v))

    after = apply(fuse_convolution, build(body, IMAGE, {**WEIGHT, "v": (6, 4, 3, 3)}))
    assert operators(after) == ["convolution", "convolution"]
    assert sorted(len(call.op.epilogue) for call in calls(after, Convolution)) == [0, 1]


def test_depthwise():
    def body(emit, x, w):
        return OP.nn.conv2d(x, w, groups=4)

    _, call = fused(body, weights={"w": (4, 1, 3, 3)})
    assert call.op.depthwise
    assert call.op.matrix == (4, 9)


def test_one_pixel_is_a_row_of_a_dense_layer():
    inputs = {"x": ("batch", 4, 1, 1), "r": ("batch", 6, 1, 1)}
    weights = {"w": (6, 4, 1, 1), "b": (1, 6, 1, 1)}

    def body(emit, x, r, w, b):
        y = emit(OP.add(emit(OP.nn.conv2d(x, w)), b))
        return emit(OP.add(emit(OP.nn.relu(y)), r))

    before = build(body, inputs, weights)
    after = apply(fuse_convolution, before)
    assert not calls(after, Convolution)
    (call,) = calls(after, Dense)
    assert (call.op.layer, call.op.matrix) == ("w", (6, 4))
    assert call.op.epilogue == (Bias(), Activation("relu"), Residual())
    rng = np.random.default_rng(0)
    x, r = (rng.standard_normal((3, n, 1, 1)).astype("float32") for n in (4, 6))
    w, b = (before.weights[name] for name in ("w", "b"))
    y = np.maximum(np.einsum("nkhw,okhw->no", x, w)[:, :, None, None] + b, 0) + r
    np.testing.assert_allclose(compile_and_run(before, x, r), y, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [((1, 2), 1, {}), ((1, 1), 1, {"groups": 2})],
    ids=["two pixels", "groups"],
)
def test_what_is_no_row_stays_a_convolution(size, kernel, options):
    channels = 4 // options.get("groups", 1)
    _, call = fused(
        lambda emit, x, w: OP.nn.conv2d(x, w, **options),
        {"x": ("batch", 4, *size)},
        {"w": (6, channels, kernel, kernel)},
    )
    assert call.op.size == size


VOLUME, FILTERS = {"x": ("batch", 4, 6, 7, 8)}, {"v": (6, 4, 3, 3, 3), "w": (6, 6, 2, 3, 3)}


def video(emit, x, v, w):
    """A block of a residual network over volumes."""
    y = emit(OP.nn.relu(emit(OP.nn.conv3d(x, v, padding=(1, 1, 1, 1, 1, 1)))))
    z = OP.nn.conv3d(y, w, padding=(0, 1, 1, 1, 1, 1))
    return OP.nn.relu(emit(OP.add(emit(z), y)))


def test_volume_is_one_image_after_the_other():
    after = apply(fuse_convolution, build(video, VOLUME, FILTERS))
    pad, other = calls(after, PadFrames)
    assert ((pad.op.count, pad.op.pads), other.op.pads) == ((6, (1, 1)), (0, 1))
    first, second = calls(after, Convolution)
    assert first.op == Convolution(
        layer="v",
        matrix=(6, 4 * 27),
        channels=4,
        out_channels=6,
        size=(7, 8),
        kernel=(3, 3),
        stride=(1, 1),
        dilation=(1, 1),
        pads=(1, 1, 1, 1),
        frames=Frames(8, 3),
        epilogue=(Activation("relu"),),
    )
    assert second.op.frames == Frames(7, 2)
    assert second.op.epilogue == (Residual(), Activation("relu"))
    names = [name for name in operators(after) if name not in ("reshape", "permute_dims")]
    assert names == ["pad_frames", "convolution"] * 2
    assert operators(after).count("permute_dims") == 2  # of the input and of the output


def strided(emit, x, v, w):
    y = emit(OP.nn.conv3d(x, v, strides=(2, 2, 1), padding=(1, 1, 1, 1, 1, 1)))
    return OP.nn.conv3d(y, w, dilation=(2, 1, 1))


def grouped(emit, x, v, w):
    """Each channel alone, but over time."""
    return OP.nn.conv3d(x, w, padding=(2, 0, 0, 0, 0, 0), groups=4)


def of_single_images(emit, x, v, w):
    return OP.nn.conv3d(x, v, padding=(1, 0, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        (video, FILTERS),
        (strided, FILTERS),
        (grouped, {"v": (1,), "w": (8, 1, 3, 3, 3)}),
        (of_single_images, {"v": (5, 4, 1, 2, 2), "w": (1,)}),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_results_over_volumes(body, weights, batch, zeros):
    shape = (batch, *VOLUME["x"][1:])
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype("float32")
    fixed, any_batch = build(body, {"x": shape}, weights), build(body, VOLUME, weights)
    for name, array in fixed.weights.items():
        array *= rng.random(array.shape) >= zeros
        any_batch.weights[name] = array
    expected = evaluate(fixed, x)
    for before in (fixed, any_batch):
        np.testing.assert_allclose(compile_and_run(before, x), expected, rtol=0, atol=1e-4)


def test_what_has_no_kernel_is_left_alone_with_a_note():
    volume, kernel = {"x": (1, 3, "depth", 7, 8)}, {"w": (4, 3, 3, 3, 3)}
    before = build(lambda emit, x, w: OP.nn.conv3d(x, w), volume, kernel)
    (note,) = assert_unchanged(fuse_convolution, before).notes
    assert note.startswith("w runs without a kernel: ")
    assert "3 spatial dimensions" in note


def test_window_over_one_pixel_is_a_dense_layer():
    def body(emit, x, w):
        return OP.nn.conv2d(x, w, padding=1)

    before = build(body, {"x": (3, 4, 1, 1)}, WEIGHT)
    assert [call.op.matrix for call in calls(apply(fuse_convolution, before), Dense)] == [(6, 4)]
    x = np.random.default_rng(0).standard_normal((3, 4, 1, 1)).astype("float32")
    np.testing.assert_allclose(compile_and_run(before, x), evaluate(before, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("dilation", "kernel", "pads"),
    [((9, 8), (1, 1), (0, 0)), ((8, 7), (3, 3), (8, 7)), ((20, 3), (1, 3), (0, 3))],
)
def test_taps_that_see_only_padding_are_left_out(dilation, kernel, pads):
    def body(emit, x, w):
        return OP.nn.conv2d(x, w, padding=(*dilation, *dilation), dilation=dilation)

    after, call = fused(body)
    assert (call.op.kernel, call.op.pads) == (kernel, (*pads, *pads))
    assert call.op.matrix == (6, 4 * kernel[0] * kernel[1])
    ((name, w),) = after.weights.items()
    assert (w.shape, after.layers.get(name, name)) == ((6, 4, *kernel), "w")
    shape = (2, *IMAGE["x"][1:])
    before = build(body, {"x": shape}, WEIGHT)
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    np.testing.assert_allclose(compile_and_run(before, x), evaluate(before, x), rtol=0, atol=1e-4)


def test_images_of_other_sizes_share_a_weight():
    """As those of a pyramid do, each of which sees other taps."""

    def body(emit, x, y, w):
        both = [emit(OP.nn.conv2d(image, w, padding=1)) for image in (x, y)]
        return OP.add(emit(OP.mean(both[0], [2, 3])), emit(OP.mean(both[1], [2, 3])))

    images = {"x": (2, 4, 1, 5), "y": (2, 4, 5, 1)}
    before = build(body, images, WEIGHT)
    kernels = [call.op.kernel for call in calls(apply(fuse_convolution, before), Convolution)]
    assert kernels == [(1, 3), (3, 1)]
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(shape).astype("float32") for shape in images.values())
    expected = evaluate(before, x, y)
    np.testing.assert_allclose(compile_and_run(before, x, y), expected, rtol=0, atol=1e-4)


def test_taps_of_an_image_of_any_size_stay():
    def body(emit, x, w):
        return OP.nn.conv2d(x, w, padding=(9, 9, 9, 9), dilation=(9, 9))

    _, call = fused(body, {"x": ("batch", 4, "height", "width")})
    assert call.op.kernel == (3, 3)


def test_weight_that_is_no_constant_is_left_alone():
    before = build(lambda emit, x, w: OP.nn.conv2d(x, w), {**IMAGE, **WEIGHT})
    assert assert_unchanged(fuse_convolution, before).notes == []


def test_channels_last_is_left_alone():
    def body(emit, x, w):
        return OP.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="OHWI")

    before = build(body, {"x": (1, 9, 8, 4)}, {"w": (6, 3, 3, 4)})
    assert assert_unchanged(fuse_convolution, before).notes == []
