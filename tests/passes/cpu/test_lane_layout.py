"""Lane layout: activations are packed once, unpacked once, and carried in tiles between."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import (
    apply,
    assert_becomes,
    build,
    calls,
    compile_and_run,
    evaluate,
    operators,
    program,
)
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from sparse_tvm.operators import Dense
from sparse_tvm.passes.cpu.image_layout import image_layout
from sparse_tvm.passes.cpu.lane_layout import lane_layout
from sparse_tvm.passes.dense_to_sparse import dense_to_sparse
from sparse_tvm.passes.fc_transpose import fc_transpose
from sparse_tvm.passes.fuse_attention import fuse_attention
from sparse_tvm.passes.fuse_convolution import fuse_convolution
from sparse_tvm.passes.fuse_epilogue import fuse_epilogue
from sparse_tvm.passes.graph import shape_of

OP = relax.op
PASSES = [fc_transpose, fuse_epilogue, fuse_attention, dense_to_sparse, lane_layout]
NORM = {"gamma": (8,), "beta": (8,)}


def const(value):
    return relax.const(value, "float32")


def tiled(body, inputs, weights):
    """Operators after the pass, without reshapes: they become views."""
    after = apply(PASSES, build(body, inputs, weights))
    return [name for name in operators(after) if name != "reshape"]


def check(body, inputs, weights, atol=2e-5, **shapes):
    """Run it against TVM's own code, symbols replaced by `shapes`."""
    before = build(body, inputs, weights)
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal([shapes.get(n, n) for n in shape]).astype("float32")
        for shape in inputs.values()
    ]
    expected = evaluate(before, *arrays)
    np.testing.assert_allclose(compile_and_run(before, *arrays), expected, atol=atol, rtol=1e-5)


DENSE = json.dumps(
    {
        "layer": "w",
        "layout": {"block": [6, 1], "family": "matmul", "format": "dense"},
        "matrix": [6, 8],
    },
    sort_keys=True,
)


@I.ir_module
class Layer:
    @R.function
    def main(x: R.Tensor((2, 20, 8), "float32"), w: R.Tensor((1, 8, 6), "float32")) -> R.Tensor(
        (2, 20, 6), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.call_dps_packed(
                "sparse_tvm.dense",
                (x, w, R.str(DENSE)),
                out_ty=R.Tensor((2, 20, 6), "float32"),
            )
            R.output(y)
        return y


@I.ir_module
class LayerInTiles:
    """Twenty rows are two tiles of sixteen lanes."""

    @R.function
    def main(x: R.Tensor((2, 20, 8), "float32"), w: R.Tensor((1, 8, 6), "float32")) -> R.Tensor(
        (2, 20, 6), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            pack = R.call_dps_packed(
                "sparse_tvm.lane_pack", (x, R.str("{}")), out_ty=R.Tensor((2, 2, 8, 16), "float32")
            )
            dense = R.call_dps_packed(
                "sparse_tvm.dense",
                (pack, w, R.shape([20]), R.str(DENSE)),
                out_ty=R.Tensor((2, 2, 6, 16), "float32"),
            )
            y = R.call_dps_packed(
                "sparse_tvm.lane_unpack",
                (dense, R.str("{}")),
                out_ty=R.Tensor((2, 20, 6), "float32"),
            )
            R.output(y)
        return y


def test_one_layer():
    assert_becomes(lane_layout, program(Layer), LayerInTiles)


def dense(emit, x, w):
    return emit(OP.matmul(x, w))


def block(emit, x, w, b, v, gamma, beta):
    """Two layers, a residual and a norm, as in an encoder."""
    hidden = emit(OP.nn.relu(emit(OP.add(dense(emit, x, w), b))))
    y = emit(OP.add(dense(emit, hidden, v), x))
    return OP.nn.layer_norm(y, gamma, beta, axes=[-1], epsilon=1e-5)


BLOCK = {"w": (8, 12), "b": (12,), "v": (12, 8), **NORM}


@pytest.mark.parametrize("shape", [(2, 20, 8), ("batch", "tokens", 8), ("tokens", 8)])
def test_packs_and_unpacks_only_at_the_ends(shape):
    expected = ["lane_pack", "dense", "dense", "layer_norm", "lane_unpack"]
    assert tiled(block, {"x": shape}, BLOCK) == expected


def test_symbolic_block_computes_the_same():
    check(block, {"x": ("batch", "tokens", 8)}, BLOCK, batch=3, tokens=17)


def test_rows_of_an_image_share_tiles():
    def body(emit, x, w):
        return dense(emit, x, w)

    after = apply(PASSES, build(body, {"x": ("batch", 7, 7, 8)}, {"w": (8, 6)}))
    (layer,) = calls(after, Dense)
    assert list(map(int, layer.args[-1].values)) == [49]
    assert shape_of(layer.args[0])[1:] == (4, 8, 16)
    for shape in (("batch", 7, 7, 8), ("batch", "height", "width", 8)):
        check(block, {"x": shape}, BLOCK, batch=2, height=5, width=9)


def test_input_used_by_two_layers_is_packed_once():
    def body(emit, x, w, v):
        return OP.add(dense(emit, x, w), dense(emit, x, v))

    weights = {"w": (8, 6), "v": (8, 6)}
    assert tiled(body, {"x": ("tokens", 8)}, weights) == [
        "lane_pack",
        "dense",
        "dense",
        "lane_unpack",
    ]


def test_residual_in_another_shape_is_reshaped_then_packed():
    def body(emit, x, r, w):
        flat = dense(emit, emit(OP.reshape(x, (40, 8))), w)
        return OP.add(emit(OP.reshape(flat, (2, 20, 6))), r)

    inputs, weights = {"x": (2, 20, 8), "r": (2, 20, 6)}, {"w": (8, 6)}
    left = tiled(body, inputs, weights)
    assert left == ["lane_pack", "lane_pack", "dense", "lane_unpack"]
    check(body, inputs, weights)


def test_reshape_between_layers_costs_nothing():
    def body(emit, x, w, v):
        flat = emit(OP.reshape(dense(emit, x, w), (40, 6)))
        return OP.reshape(dense(emit, flat, v), (2, 20, 8))

    inputs, weights = {"x": (2, 20, 8)}, {"w": (8, 6), "v": (6, 8)}
    assert tiled(body, inputs, weights) == ["lane_pack", "dense", "dense", "lane_unpack"]
    check(body, inputs, weights)


def test_reshape_that_changes_the_features_unpacks():
    def body(emit, x, w, v):
        split = emit(OP.reshape(dense(emit, x, w), (60, 2)))
        return dense(emit, split, v)

    inputs, weights = {"x": (20, 8)}, {"w": (8, 6), "v": (2, 4)}
    left = tiled(body, inputs, weights)
    assert left == ["lane_pack", "dense", "lane_unpack", "lane_pack", "dense", "lane_unpack"]
    check(body, inputs, weights)


def test_elementwise_operators_stay_in_tiles():
    def body(emit, x, w, v, scale):
        y = emit(OP.multiply(dense(emit, x, w), scale))
        y = emit(OP.add(emit(OP.exp(emit(OP.negative(y)))), const(1.0)))
        y = emit(OP.divide(const(2.0), y))
        return dense(emit, y, v)

    inputs, weights = {"x": ("tokens", 8)}, {"w": (8, 6), "v": (6, 8), "scale": (6,)}
    left = tiled(body, inputs, weights)
    assert left.count("lane_pack") == left.count("lane_unpack") == 1
    assert left.index("lane_unpack") == len(left) - 1
    check(body, inputs, weights, tokens=5)


def test_operator_in_the_middle_that_has_no_tiled_form():
    def body(emit, x, w, v):
        middle = emit(OP.nn.softmax(dense(emit, x, w)))
        return dense(emit, middle, v)

    inputs, weights = {"x": ("tokens", 8)}, {"w": (8, 6), "v": (6, 8)}
    left = tiled(body, inputs, weights)
    assert left == [
        "lane_pack",
        "dense",
        "lane_unpack",
        "nn.softmax",
        "lane_pack",
        "dense",
        "lane_unpack",
    ]
    check(body, inputs, weights, tokens=19)


def test_value_read_in_both_forms_is_unpacked_once():
    def body(emit, x, w, v):
        y = dense(emit, x, w)
        total = emit(OP.add(emit(OP.nn.softmax(y)), emit(OP.nn.log_softmax(y))))
        return OP.add(dense(emit, y, v), total)

    inputs, weights = {"x": ("tokens", 8)}, {"w": (8, 6), "v": (6, 6)}
    left = tiled(body, inputs, weights)
    assert left.count("lane_unpack") == 2
    check(body, inputs, weights, tokens=3)


def test_operand_that_broadcasts_over_rows_leaves_the_tiles():
    def body(emit, x, r, w, v):
        y = emit(OP.multiply(dense(emit, x, w), r))
        return dense(emit, y, v)

    inputs = {"x": ("tokens", 8), "r": ("tokens", 1)}
    weights = {"w": (8, 6), "v": (6, 8)}
    assert tiled(body, inputs, weights)[:4] == ["lane_pack", "dense", "lane_unpack", "multiply"]
    check(body, inputs, weights, tokens=18)


def test_batch_that_is_broadcast():
    def body(emit, x, r, w):
        return OP.multiply(dense(emit, x, w), r)

    check(body, {"x": (1, 3, 8), "r": (4, 3, 6)}, {"w": (8, 6)})
    check(body, {"x": (4, 3, 8), "r": (1, 3, 6)}, {"w": (8, 6)})


def test_rms_norm_stays_in_tiles():
    def body(emit, x, w, gamma):
        y = emit(OP.matmul(x, emit(OP.permute_dims(w))))
        return OP.nn.rms_norm(y, gamma, axes=[-1], epsilon=1e-5)

    inputs, weights = {"x": ("batch", "tokens", 8)}, {"w": (8, 8), "gamma": (8,)}
    assert tiled(body, inputs, weights) == ["lane_pack", "dense", "layer_norm", "lane_unpack"]
    check(body, inputs, weights, batch=2, tokens=19)


def test_layer_norm_over_another_axis_is_left_alone():
    def body(emit, x, gamma, beta):
        return OP.nn.layer_norm(x, gamma, beta, axes=[0], epsilon=1e-5)

    assert tiled(body, {"x": (8, 5)}, NORM) == ["nn.layer_norm"]


def test_other_dtypes_are_left_alone():
    before = build(
        lambda emit, x: OP.nn.relu(x), {"x": ("tokens", 8)}, None, dtypes={"x": "float64"}
    )
    assert operators(apply(lane_layout, before)) == ["nn.relu"]


@pytest.mark.parametrize("sections", [3, [2, 5]])
def test_split_of_the_features_stays_in_tiles(sections):
    def body(emit, x, w):
        parts = emit(OP.split(dense(emit, x, w), sections, axis=-1))
        a, b, c = (emit(relax.TupleGetItem(parts, i)) for i in range(3))
        return OP.concat([emit(OP.nn.relu(c)), emit(OP.tanh(a)), b], axis=-1)

    inputs, weights = {"x": ("tokens", 8)}, {"w": (8, 9)}
    assert "split" not in tiled(body, inputs, weights)
    check(body, inputs, weights, tokens=21)


def test_split_of_the_rows_leaves_the_tiles():
    def body(emit, x, w):
        parts = emit(OP.split(dense(emit, x, w), 2, axis=0))
        return OP.add(*(emit(relax.TupleGetItem(parts, i)) for i in range(2)))

    inputs, weights = {"x": (20, 8)}, {"w": (8, 6)}
    assert tiled(body, inputs, weights)[:4] == ["lane_pack", "dense", "lane_unpack", "split"]
    check(body, inputs, weights)


def test_attention_between_layers_stays_in_tiles():
    def body(emit, x, wq, wk, wv, wo):
        def heads(w, axes):
            split = emit(OP.reshape(dense(emit, x, w), (3, 20, 2, 4)))
            return emit(OP.permute_dims(split, axes))

        q, k, v = heads(wq, [0, 2, 1, 3]), heads(wk, [0, 2, 3, 1]), heads(wv, [0, 2, 1, 3])
        weights = emit(OP.nn.softmax(emit(OP.matmul(q, k))))
        merged = emit(OP.permute_dims(emit(OP.matmul(weights, v)), [0, 2, 1, 3]))
        return dense(emit, emit(OP.reshape(merged, (3, 20, 8))), wo)

    inputs, weights = {"x": (3, 20, 8)}, dict.fromkeys(("wq", "wk", "wv", "wo"), (8, 8))
    expected = ["lane_pack", "dense", "dense", "dense", "attention", "dense", "lane_unpack"]
    assert tiled(body, inputs, weights) == expected


@pytest.mark.parametrize("size", [("height", "width"), (7, 9)])
@pytest.mark.parametrize("stride", [1, 2])
def test_images_become_tokens_and_images_at_once(size, stride):
    def body(emit, x, w, gamma, beta, v):
        y = emit(OP.nn.conv2d(x, w, padding=1))
        y = emit(OP.permute_dims(y, [0, 2, 3, 1]))
        y = emit(OP.nn.layer_norm(y, gamma, beta, axes=[-1], epsilon=1e-5))
        y = emit(OP.permute_dims(y, [0, 3, 1, 2]))
        return OP.nn.conv2d(y, v, padding=1, strides=stride)

    inputs = {"x": ("batch", 4, *size)}
    weights = {"w": (8, 4, 3, 3), **NORM, "v": (6, 8, 3, 3)}
    passes = [fuse_convolution, dense_to_sparse, image_layout, lane_layout]
    found = operators(apply(passes, build(body, inputs, weights)))
    at = found.index("image_to_tiles")
    assert found[at : at + 3] == ["image_to_tiles", "layer_norm", "tiles_to_image"]
    assert not {"permute_dims", "lane_pack", "lane_unpack"} & set(found)
    check(body, inputs, weights, batch=2, height=10, width=11)


def test_signals_become_tokens_at_once():
    def body(emit, x, w, v):
        y = emit(OP.nn.conv1d(x, w, padding=1))
        return dense(emit, emit(OP.permute_dims(y, [0, 2, 1])), v)

    inputs, weights = {"x": ("batch", 4, "length")}, {"w": (8, 4, 3), "v": (8, 6)}
    passes = [fc_transpose, fuse_epilogue, fuse_convolution, dense_to_sparse]
    found = operators(apply([*passes, image_layout, lane_layout], build(body, inputs, weights)))
    assert [name for name in found if name != "reshape"][-3:] == [
        "image_to_tiles",
        "dense",
        "lane_unpack",
    ]
    check(body, inputs, weights, batch=2, length=21)
