"""Epilogue fusion: the longest chain behind a dense layer becomes one call."""

from __future__ import annotations

import json
from typing import TypeVar

import numpy as np
import pytest
from helpers import apply, assert_becomes, build, calls, operators, program
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from sparse_tvm.operators import Dense
from sparse_tvm.passes.fuse_epilogue import fuse_epilogue

OP = relax.op
batch, tokens = TypeVar("batch"), TypeVar("tokens")
WEIGHTS = {"w": (6, 8), "b": (6,)}


def const(value):
    return relax.const(np.float32(value), "float32")


STEPS = [{"is": "bias"}, {"is": "activation", "function": "gelu"}, {"is": "residual"}]
BIAS_GELU_RESIDUAL = json.dumps({"epilogue": STEPS, "layer": "w", "matrix": [6, 8]}, sort_keys=True)


@I.ir_module
class Before:
    @R.function
    def main(
        x: R.Tensor((batch, tokens, 8), "float32"),
        r: R.Tensor((batch, tokens, 6), "float32"),
        w: R.Tensor((6, 8), "float32"),
        b: R.Tensor((6,), "float32"),
    ) -> R.Tensor((batch, tokens, 6), "float32"):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            t = R.permute_dims(w)
            product = R.matmul(x, t)
            biased = R.add(product, b)
            active = R.nn.gelu(biased)
            y = R.add(active, r)
            R.output(y)
        return y


@I.ir_module
class Expected:
    @R.function
    def main(
        x: R.Tensor((batch, tokens, 8), "float32"),
        r: R.Tensor((batch, tokens, 6), "float32"),
        w: R.Tensor((6, 8), "float32"),
        b: R.Tensor((6,), "float32"),
    ) -> R.Tensor((batch, tokens, 6), "float32"):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            y = R.call_dps_packed(
                "sparse_tvm.dense",
                (x, w, b, r, R.str(BIAS_GELU_RESIDUAL)),
                out_ty=R.Tensor((batch, tokens, 6), "float32"),
            )
            R.output(y)
        return y


def test_bias_activation_and_residual():
    assert_becomes(fuse_epilogue, program(Before), Expected)


def dense(emit, x, w):
    return emit(OP.matmul(x, emit(OP.permute_dims(w))))


def fused(body, inputs=None, weights=None):
    """Operators left, and the epilogue of every dense call."""
    before = build(body, inputs or {"x": ("tokens", 8)}, weights or WEIGHTS)
    after = apply(fuse_epilogue, before)
    return operators(after), [list(map(str, call.op.epilogue)) for call in calls(after, Dense)]


def test_no_epilogue():
    assert fused(lambda emit, x, w: dense(emit, x, w), None, {"w": (6, 8)}) == (["dense"], [[]])


@pytest.mark.parametrize("bias_first", [False, True])
def test_bias_in_either_order(bias_first):
    def body(emit, x, w, b):
        y = dense(emit, x, w)
        return OP.add(b, y) if bias_first else OP.add(y, b)

    assert fused(body) == (["dense"], [["bias"]])


@pytest.mark.parametrize("residual_first", [False, True])
def test_residual_in_either_order(residual_first):
    def body(emit, x, r, w, b):
        y = emit(OP.add(dense(emit, x, w), b))
        return OP.add(r, y) if residual_first else OP.add(y, r)

    inputs = {"x": ("tokens", 8), "r": ("tokens", 6)}
    assert fused(body, inputs) == (["dense"], [["bias", "residual"]])


@pytest.mark.parametrize(
    ("operator", "step"),
    [
        (OP.nn.relu, "relu"),
        (OP.nn.gelu, "gelu"),
        (OP.nn.gelu_tanh, "gelu_tanh"),
        (OP.nn.silu, "silu"),
        (OP.tanh, "tanh"),
        (OP.sigmoid, "sigmoid"),
    ],
)
def test_activation(operator, step):
    def body(emit, x, w, b):
        return operator(emit(OP.add(dense(emit, x, w), b)))

    assert fused(body) == (["dense"], [["bias", step]])


def bounded(emit, y):
    """ONNX's decomposition: y / 6 + 1 / 2 between 0 and 1."""
    return OP.clip(emit(OP.add(emit(OP.multiply(y, const(1 / 6))), const(0.5))), 0.0, 1.0)


def relu6(emit, y):
    """PyTorch's: min(max(y + 3, 0), 6) / 6."""
    raised = emit(OP.maximum(emit(OP.add(y, const(3))), const(0)))
    return OP.divide(emit(OP.minimum(raised, const(6))), const(6))


@pytest.mark.parametrize("gate", [bounded, relu6])
@pytest.mark.parametrize("swish", [False, True])
def test_activation_that_has_no_operator(gate, swish):
    def body(emit, x, w, b):
        y = emit(OP.add(dense(emit, x, w), b))
        return OP.multiply(y, emit(gate(emit, y))) if swish else gate(emit, y)

    assert fused(body) == (["dense"], [["bias", "hard_swish" if swish else "hard_sigmoid"]])


def test_other_bounds_are_no_activation():
    def body(emit, x, w):
        y = dense(emit, x, w)
        return OP.clip(emit(OP.multiply(y, const(1 / 6))), 0.0, 1.0)

    assert fused(body, None, {"w": (6, 8)}) == (["dense", "multiply", "clip"], [[]])


def test_part_of_an_activation_that_is_read_elsewhere_ends_the_chain():
    def body(emit, x, w, b):
        y = emit(OP.add(dense(emit, x, w), b))
        gate = emit(bounded(emit, y))
        return OP.add(emit(OP.multiply(y, gate)), gate)

    left = ["dense", "multiply", "add", "clip", "multiply", "add"]
    assert fused(body) == (left, [["bias"]])


def test_two_biases_and_an_activation_between():
    def body(emit, x, w, b, c):
        y = emit(OP.nn.relu(emit(OP.add(dense(emit, x, w), b))))
        return OP.add(y, c)

    weights = {**WEIGHTS, "c": (6,)}
    assert fused(body, None, weights) == (["dense"], [["bias", "relu", "bias"]])


def test_value_read_twice_ends_the_chain():
    def body(emit, x, w, b):
        y = emit(OP.add(dense(emit, x, w), b))
        return OP.multiply(emit(OP.nn.relu(y)), y)

    assert fused(body) == (["dense", "nn.relu", "multiply"], [["bias"]])


def test_value_added_to_itself_ends_the_chain():
    def body(emit, x, w, b):
        y = dense(emit, x, w)
        return OP.add(emit(OP.add(y, y)), b)

    assert fused(body) == (["dense", "add", "add"], [[]])


def test_sum_of_two_layers_is_a_residual_of_one():
    def body(emit, x, w, v):
        return OP.add(dense(emit, x, w), dense(emit, x, v))

    operators_left, epilogues = fused(body, None, {"w": (6, 8), "v": (6, 8)})
    assert operators_left == ["dense", "dense"]
    assert sorted(epilogues) == [[], ["residual"]]


def test_residual_stream_through_two_layers():
    def body(emit, x, w, v):
        hidden = emit(OP.nn.relu(dense(emit, x, w)))
        return OP.add(dense(emit, hidden, v), x)

    weights = {"w": (6, 8), "v": (8, 6)}
    assert fused(body, None, weights) == (["dense", "dense"], [["relu"], ["residual"]])


def test_reshape_that_keeps_the_features_is_looked_through():
    def body(emit, x, r, w, b):
        flat = dense(emit, emit(OP.reshape(x, (6, 8))), w)
        return OP.add(emit(OP.reshape(emit(OP.add(flat, b)), (2, 3, 6))), r)

    inputs = {"x": (2, 3, 8), "r": (2, 3, 6)}
    assert fused(body, inputs) == (["reshape", "dense"], [["bias", "residual"]])


def test_reshape_that_splits_the_features_ends_the_chain():
    def body(emit, x, w, b):
        heads = emit(OP.reshape(emit(OP.add(dense(emit, x, w), b)), (5, 2, 3)))
        return OP.nn.relu(heads)

    assert fused(body, {"x": (5, 8)}) == (["dense", "reshape", "nn.relu"], [["bias"]])


def test_reshape_to_a_scalar_ends_the_chain():
    def body(emit, x, w):
        scalar = emit(OP.reshape(dense(emit, x, w), ()))
        return OP.nn.relu(emit(OP.reshape(scalar, ())))

    names, epilogues = fused(body, {"x": (1, 8)}, {"w": (1, 8)})
    assert names == ["dense", "reshape", "reshape", "nn.relu"]
    assert epilogues == [[]]


def test_vector_that_is_no_weight_is_no_bias():
    def body(emit, x, v, w):
        return OP.add(dense(emit, x, w), v)

    inputs = {"x": ("tokens", 8), "v": (6,)}
    assert fused(body, inputs, {"w": (6, 8)}) == (["dense", "add"], [[]])


@pytest.mark.parametrize("shape", [("tokens", 1), (1, 6), (1,)])
def test_residual_that_broadcasts_is_refused(shape):
    def body(emit, x, r, w):
        return OP.add(dense(emit, x, w), r)

    inputs = {"x": ("tokens", 8), "r": shape}
    assert fused(body, inputs, {"w": (6, 8)}) == (["dense", "add"], [[]])


def test_residual_that_broadcasts_the_layer_is_refused():
    def body(emit, x, r, w):
        return OP.add(dense(emit, x, w), r)

    inputs = {"x": (1, "tokens", 8), "r": (3, "tokens", 6)}
    assert fused(body, inputs, {"w": (6, 8)}) == (["dense", "add"], [[]])


def test_residual_of_another_symbol_is_refused():
    def body(emit, x, r, w):
        y = dense(emit, x, w)
        return OP.matmul(emit(OP.permute_dims(r)), y)

    # No Relax type says that two symbols agree, so even a broadcast cannot be built; the
    # product of both must at least leave the layer alone.
    inputs = {"x": ("tokens", 8), "r": ("tokens", 6)}
    assert fused(body, inputs, {"w": (6, 8)})[1] == [[]]


def test_constant_bias():
    def body(emit, x, w):
        return OP.add(dense(emit, x, w), relax.const(np.arange(6, dtype="float32")))

    assert fused(body, None, {"w": (6, 8)}) == (["dense"], [["bias"]])


def test_vector_input_is_left_alone():
    def body(emit, x, w):
        return dense(emit, x, w)

    operators_left, _ = fused(body, {"x": (8,)}, {"w": (6, 8)})
    assert operators_left == ["permute_dims", "matmul"]
