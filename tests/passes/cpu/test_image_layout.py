"""Image layout: images are packed once, and stay in planes whatever happens to them there."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, build, calls, compile_and_run, context, evaluate, operators
from tvm import relax

from sparse_tvm.passes.cpu.image_layout import image_layout
from sparse_tvm.passes.dense_to_sparse import dense_to_sparse
from sparse_tvm.passes.fuse_convolution import fuse_convolution
from sparse_tvm.schedules.cpu.image_operators import (
    CHANNEL_LANES,
    ImageBlocks,
    ImageConvolution,
    ImagePack,
)

OP = relax.op
PASSES = [fuse_convolution, dense_to_sparse, image_layout]
IMAGE = {"x": (2, 6, 13, 11)}
WEIGHTS = {"v": (8, 6, 3, 3), "w": (8, 8, 3, 3)}
SYMBOLIC = {"x": ("batch", 6, "height", "width")}


def const(value):
    return relax.const(np.float32(value), "float32")


def same(x, w, **options):
    """A convolution that keeps the image's size."""
    pads = [k // 2 for k in w.ty.shape.values[2:]]
    return OP.nn.conv2d(x, w, padding=(*map(int, pads), *map(int, pads)), **options)


def two(emit, x, v, w):
    return same(emit(OP.nn.relu(emit(same(x, v)))), w)


def residual(emit, x, v, w):
    y = emit(OP.nn.relu(emit(same(x, v))))
    return OP.nn.relu(emit(OP.add(emit(same(y, w)), y)))


def strided(emit, x, v, w):
    return OP.nn.conv2d(emit(same(x, v)), w, strides=(2, 2), padding=(1, 1, 1, 1))


def narrower(emit, x, v, w):
    """Without padding, rows get shorter, and their distance stays."""
    return OP.nn.conv2d(emit(OP.nn.conv2d(x, v)), w, padding=(2, 3, 1, 2), dilation=(2, 1))


def far(emit, x, v, w):
    """Padding wider than the image is not for all images around."""
    y = emit(OP.nn.relu(emit(same(x, v))))
    a = emit(OP.nn.conv2d(y, w, padding=(9, 8, 9, 10), dilation=(9, 9)))
    return OP.add(emit(same(y, w)), a)


def in_blocks(emit, x, v, w):
    """Taps as far apart from their pixel on all sides move whole blocks of pixels."""
    y = emit(OP.nn.relu(emit(same(x, v))))
    a = emit(OP.nn.conv2d(y, w, padding=(9, 9, 9, 9), dilation=(9, 9)))
    return OP.add(emit(same(y, w)), emit(same(emit(OP.nn.relu(a)), w)))


def pooled(emit, x, v, w):
    y = emit(OP.nn.relu(emit(same(x, v))))
    return same(emit(OP.nn.max_pool2d(y, (3, 3), (2, 2), padding=(1, 1, 1, 1))), w)


def rounded_up(emit, x, v, w):
    y = emit(OP.nn.relu(emit(same(x, v))))
    return same(emit(OP.nn.max_pool2d(y, (3, 3), (2, 2), ceil_mode=True)), w)


def averaged(emit, x, v, w):
    y = emit(OP.nn.avg_pool2d(emit(same(x, v)), (2, 2), (2, 2)))
    return OP.mean(emit(same(y, w)), [2, 3], keepdims=True)


def concatenated(emit, x, v, w):
    """What is put together has one layout: that of the reader who wants most."""
    a = emit(same(x, v))
    b = emit(same(a, w))
    both = emit(OP.concat([a, b], 1))
    return OP.nn.max_pool2d(emit(OP.nn.relu(both)), (5, 5), (1, 1), padding=(2, 2, 2, 2))


def scaled(emit, x, v, w):
    """Squeeze and excite: each channel times a number that its mean decides."""
    y = emit(same(x, v))
    scale = emit(OP.sigmoid(emit(OP.mean(y, [2, 3], keepdims=True))))
    return same(emit(OP.multiply(y, scale)), w)


def bounded(emit, x, v, w):
    """Bounds with zero between them keep the padding, others do not."""
    y = emit(OP.exp(emit(same(x, v))))
    return same(emit(OP.add(emit(OP.clip(y, 0.5, 2.0)), emit(OP.clip(y, -1.0, 1.0)))), w)


def normalised(emit, x, v, w):
    """What would fill the padding may, where nobody reads it."""
    a = emit(same(x, v))
    both = emit(OP.concat([a, emit(OP.negative(a))], 1))
    shift = relax.const(np.arange(16, dtype="float32").reshape(1, 16, 1, 1))
    y = emit(OP.nn.relu(emit(OP.add(emit(OP.multiply(both, shift)), shift))))
    return OP.nn.avg_pool2d(y, (2, 2), (2, 2))


def left(emit, x, v, w):
    """What has no form in planes is computed outside of them."""
    return same(emit(OP.exp(emit(same(x, v)))), w)


CASES = [
    two,
    residual,
    strided,
    narrower,
    far,
    in_blocks,
    pooled,
    rounded_up,
    averaged,
    concatenated,
    bounded,
    scaled,
    normalised,
    left,
]


@pytest.mark.parametrize("body", CASES)
def test_results(body):
    before = build(body, IMAGE, WEIGHTS)
    x = np.random.default_rng(0).standard_normal(IMAGE["x"]).astype("float32")
    expected = evaluate(before, x)
    scale = max(1.0, float(np.abs(expected).max()))
    output = compile_and_run(before, x)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("body", [two, residual, strided, scaled])
def test_one_artifact_serves_any_size(body):
    before = build(body, SYMBOLIC, WEIGHTS)
    for shape in [(1, 6, 5, 7), (3, 6, 17, 16)]:
        x = np.random.default_rng(0).standard_normal(shape).astype("float32")
        expected = evaluate(build(body, {"x": shape}, WEIGHTS), x)
        scale = max(1.0, float(np.abs(expected).max()))
        output = compile_and_run(before, x)
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * scale)


def planar(body, inputs=IMAGE):
    """Operators after the pass, without reshapes and masks."""
    after = apply(PASSES, build(body, inputs, WEIGHTS))
    return [name for name in operators(after) if name not in ("reshape", "image_mask")]


def test_one_conversion_at_each_end():
    convolutions = ["image_convolution"] * 2
    assert planar(two) == planar(residual) == ["image_pack", *convolutions, "image_pack"]


def test_signals_are_not_reshaped():
    def body(emit, x, v, w):
        y = emit(OP.nn.relu(emit(OP.nn.conv1d(x, v, padding=1))))
        return OP.nn.conv1d(emit(OP.nn.softmax(y, 1)), w)

    signal, weights = {"x": ("batch", 6, "length")}, {"v": (8, 6, 3), "w": (8, 8, 1)}
    before = build(body, signal, weights)
    assert "reshape" not in operators(apply(PASSES, before))
    x = np.random.default_rng(0).standard_normal((2, 6, 21)).astype("float32")
    expected = evaluate(build(body, {"x": x.shape}, weights), x)
    np.testing.assert_allclose(compile_and_run(before, x), expected, rtol=0, atol=1e-5)


def test_strided_convolution_reads_phases():
    names = planar(strided)
    assert names == ["image_pack", "image_convolution"] * 2 + ["image_pack"]
    after = apply(PASSES, build(strided, IMAGE, WEIGHTS))
    _, phases, _ = calls(after, ImagePack)
    assert phases.op.window.stride == (2, 2)
    assert phases.op.source is not None
    assert phases.op.target is not None


def test_single_pixels_are_read_in_place_whatever_the_strides():
    weights = {"v": (32, 6, 3, 3), "w": (32, 32, 3, 3)}
    before = build(strided, {"x": (1, 6, 28, 28)}, weights)
    after = apply(PASSES, before, context(target="x86-64-v4"))
    names = [name for name in operators(after) if name not in ("reshape", "image_mask")]
    assert names == ["image_pack", "image_convolution", "image_convolution", "image_pack"]
    first, second = calls(after, ImageConvolution)
    assert second.op.stored.family == CHANNEL_LANES
    assert second.op.source == first.op.target
    assert second.op.source.padded


def test_taps_far_apart_read_phases_and_leave_other_rows_close():
    after = apply(PASSES, build(far, IMAGE, WEIGHTS))
    first, apart, last = calls(after, ImageConvolution)
    assert [call.op.target.gap for call in (first, apart, last)] == [1, 1, 1]
    assert apart.op.source.gap == 1
    windows = [pack.op.window for pack in calls(after, ImagePack)]
    assert [window.by_phases for window in windows] == [False, True, False]
    assert [len(window.phases) for window in windows] == [1, 3, 1]


def test_taps_that_move_blocks_read_and_write_them():
    names = planar(in_blocks)
    there_and_back = ["image_blocks", "image_convolution", "image_blocks"]
    assert names == [
        *("image_pack", "image_convolution"),
        *there_and_back,
        *("image_convolution", "image_convolution", "image_pack"),
    ]
    there, back = calls(apply(PASSES, build(in_blocks, IMAGE, WEIGHTS)), ImageBlocks)
    assert (there.op.back, back.op.back) == (False, True)
    assert (there.op.image.padded, back.op.image.padded) == (True, True)
    assert there.op.window == back.op.window
    assert not planar(in_blocks, SYMBOLIC).count("image_blocks")


def test_an_image_goes_to_blocks_at_once():
    names = planar(lambda emit, x, v, w: OP.nn.conv2d(x, v, padding=9, dilation=9))
    assert names == ["image_blocks", "image_convolution", "image_blocks", "image_pack"]


def test_pooling_and_means_need_no_conversion():
    assert planar(averaged) == [
        "image_pack",
        "image_convolution",
        "image_pooling",
        "image_convolution",
        "image_reduction",
    ]


def test_padding_is_filled_only_where_nobody_reads_it():
    assert planar(normalised).count("image_pack") == 2
    assert planar(left).count("image_pack") == 4


def test_what_is_put_together_has_one_layout():
    assert planar(concatenated).count("image_pack") == 2
    after = apply(PASSES, build(concatenated, IMAGE, WEIGHTS))
    first, second = calls(after, ImageConvolution)
    assert first.op.target == second.op.target
    assert first.op.target.gap == 2


def test_padding_costs_only_those_who_read_it():
    after = apply(PASSES, build(two, IMAGE, WEIGHTS))
    first, second = calls(after, ImageConvolution)
    assert first.op.target.padded
    assert not second.op.target.padded
    assert first.op.target.gap == second.op.target.gap == 1
