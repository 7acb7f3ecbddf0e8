"""Gates go into the layer that they multiply."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, assert_unchanged, build, calls, compile_and_run, context, operators
from tvm import relax

from sparse_tvm.operators import Activation, Bias, Dense, Gate
from sparse_tvm.passes.cpu.fuse_gates import fuse_gates
from sparse_tvm.passes.dense_to_sparse import dense_to_sparse
from sparse_tvm.passes.fc_transpose import fc_transpose
from sparse_tvm.passes.fuse_epilogue import fuse_epilogue
from sparse_tvm.passes.set_precision import set_precision

OP = relax.op
BEFORE = [fc_transpose, fuse_epilogue, set_precision, dense_to_sparse]
INPUTS = {"x": ("batch", "rows", 24)}
WEIGHTS = {"gate": (32, 24), "up": (32, 24), "bias": (32,)}


def dense(emit, x, w):
    return emit(OP.matmul(x, emit(OP.permute_dims(w))))


def gated(emit, x, gate, up, bias):
    activated = emit(OP.nn.silu(dense(emit, x, gate)))
    return OP.multiply(activated, emit(OP.add(dense(emit, x, up), bias)))


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_layer_multiplies(sparsity, rows):
    subject = build(gated, INPUTS, WEIGHTS)
    rng = np.random.default_rng(0)
    for name in ("gate", "up"):
        w = subject.weights[name]
        w[rng.random(w.shape) < sparsity] = 0
    after = apply([*BEFORE, fuse_gates], subject)
    first, second = calls(after, Dense)
    assert first.op.epilogue == (Activation("silu"),)
    assert second.op.epilogue == (Bias(), Gate())
    assert operators(after) == ["dense", "dense"]
    x = rng.standard_normal((2, rows, 24)).astype("float32")
    gate, up = x @ subject.weights["gate"].T, x @ subject.weights["up"].T
    expected = gate / (1 + np.exp(-gate)) * (up + subject.weights["bias"])
    np.testing.assert_allclose(compile_and_run(subject, x), expected, rtol=1e-4, atol=1e-4)


def test_leaves_alone_a_square():
    def body(emit, x, up):
        y = dense(emit, x, up)
        return OP.multiply(y, y)

    assert_unchanged(fuse_gates, apply(BEFORE, build(body, INPUTS, {"up": (32, 24)})))


def test_leaves_alone_what_broadcasts():
    def body(emit, x, up, scale):
        return OP.multiply(dense(emit, x, up), scale)

    weights = {"up": (32, 24), "scale": (1, 1, 32)}
    assert_unchanged(fuse_gates, apply(BEFORE, build(body, INPUTS, weights)))


def test_leaves_alone_what_is_an_output_too():
    def body(emit, x, gate):
        y = dense(emit, x, gate)
        return relax.Tuple([emit(OP.multiply(y, emit(OP.sigmoid(x)))), y])

    weights = {"gate": (24, 24)}
    assert_unchanged(fuse_gates, apply(BEFORE, build(body, INPUTS, weights)))


def test_leaves_alone_layers_in_low_precision():
    within = context(target="x86-64-v3", precision="int8")
    after = apply([*BEFORE, fuse_gates], build(gated, INPUTS, WEIGHTS), within)
    assert [found.op.types.input for found in calls(after, Dense)] == ["int8", "int8"]
    assert operators(after) == ["dense", "dense", "multiply"]
