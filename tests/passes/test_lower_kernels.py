"""Lowering: calls that agree share a kernel, and the program knows whom each kernel serves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import apply, build, calls, compile_and_run, context
from tvm import relax, tirx

from sparse_tvm.backends import get_backend
from sparse_tvm.operators import Attention, Dense, Operator, from_json
from sparse_tvm.passes.cpu.lane_layout import lane_layout
from sparse_tvm.passes.dense_to_sparse import dense_to_sparse
from sparse_tvm.passes.fc_transpose import fc_transpose
from sparse_tvm.passes.fuse_attention import fuse_attention
from sparse_tvm.passes.fuse_epilogue import fuse_epilogue
from sparse_tvm.passes.lower_kernels import KERNEL_ATTRIBUTE, lower_kernels
from sparse_tvm.sparsity.masks import prune_array

OP = relax.op
PASSES = [fc_transpose, fuse_epilogue, fuse_attention, dense_to_sparse, lane_layout, lower_kernels]


def lowered(subject, *rules):
    return apply(PASSES, subject, context(*rules, target="x86-64-v4"))


def kernels(subject):
    return {
        var.name_hint: function
        for var, function in subject.module.functions.items()
        if isinstance(function, tirx.PrimFunc)
    }


def four_layers(emit, x, a, b, c, d):
    for w in (a, b, c):
        x = emit(OP.nn.relu(emit(OP.matmul(x, w))))
    return OP.matmul(x, d)


def model(tokens=20):
    subject = build(
        four_layers, {"x": (1, tokens, 32)}, dict.fromkeys(("a", "b", "c", "d"), (32, 32))
    )
    for name in ("a", "b"):
        subject.weights[name] = prune_array(subject.weights[name].T, 0.9, "4x1").T
    return subject


@pytest.mark.parametrize("tokens", [20, "tokens"])
def test_calls_that_agree_share_a_kernel(tokens):
    after = lowered(model(tokens))
    by_layer = {layer: name for name, kernel in after.kernels.items() for layer in kernel["layers"]}
    assert by_layer["a"] == by_layer["b"]
    assert len({by_layer[layer] for layer in "acd"}) == 3
    assert set(kernels(after)) == set(after.kernels)
    for name, function in kernels(after).items():
        assert function.attrs[KERNEL_ATTRIBUTE] == after.kernels[name]["kind"]


def test_layers_are_noted_in_order_of_execution():
    after = lowered(model())
    assert [(k["kind"], k["layers"]) for k in after.kernels.values()] == [
        ("lane_pack", ["lane_pack"]),
        ("dense", ["a", "b"]),
        ("dense", ["c"]),
        ("dense", ["d"]),
        ("lane_unpack", ["lane_unpack"]),
    ]


def test_reports_name_the_kernel():
    after = lowered(model(), "d=csr")
    assert {name: report.kernel for name, report in after.reports.items()} == {
        "a": "bsr_4x1_32x32_relu",
        "b": "bsr_4x1_32x32_relu",
        "c": f"dense_{dense_block(after)}_32x32_relu",
        "d": "csr_32x32",
    }


def dense_block(subject):
    rows = subject.weights["c_fc.data"].shape[2]
    return f"{rows}x1"


def test_no_operator_of_ours_is_left():
    assert calls(lowered(model("tokens")), Operator) == []


def test_a_kernel_is_recorded_as_operator_and_family():
    """What the profiler reads back, without the names of the layers that share it."""
    after = lowered(model())
    for kernel in after.kernels.values():
        op = from_json(kernel["kind"], kernel["operator"])
        family = get_backend("cpu").family(kernel["family"])
        assert isinstance(op, family.operator)
        if isinstance(op, Dense):
            assert (op.layer, op.matrix) == ("", (32, 32))
            for layer in kernel["layers"]:
                report = after.reports[layer]
                assert (op.stored.format, list(map(str, op.epilogue))) == (
                    report.format,
                    list(report.epilogue),
                )


def test_each_use_of_a_weight_has_the_kernel_of_its_epilogue():
    def body(emit, x, w):
        return OP.matmul(emit(OP.nn.relu(emit(OP.matmul(x, w)))), w)

    after = lowered(build(body, {"x": ("tokens", 32)}, {"w": (32, 32)}))
    activated, plain = after.reports.values()
    assert activated.kernel == f"{plain.kernel}_relu"
    assert [k["layers"] for k in after.kernels.values() if k["kind"] == "dense"] == [
        [activated.name],
        [plain.name],
    ]


HEADS, SIZE = 2, 4


def attend(emit, q, k, v):
    def heads(t, axes):
        batch, rows, _ = t.ty.shape
        split = emit(OP.reshape(t, (batch, rows, HEADS, SIZE)))
        return emit(OP.permute_dims(split, axes))

    scores = emit(OP.matmul(heads(q, [0, 2, 1, 3]), heads(k, [0, 2, 3, 1])))
    merged = emit(OP.matmul(emit(OP.nn.softmax(scores)), heads(v, [0, 2, 1, 3])))
    return OP.reshape(emit(OP.permute_dims(merged, [0, 2, 1, 3])), q.ty.shape)


def test_attention_over_keys_of_different_lengths():
    """A decoder: over itself, then over the encoder's output."""

    def decoder(emit, x, memory):
        x = emit(attend(emit, x, x, x))
        x = emit(attend(emit, x, memory, memory))
        return attend(emit, x, x, x)

    inputs = {"x": (2, 5, HEADS * SIZE), "memory": (2, 19, HEADS * SIZE)}
    before = build(decoder, inputs)
    after = lowered(before)
    assert [k["layers"] for k in after.kernels.values() if k["kind"] == Attention.name] == [
        ["attention", "attention"],
        ["attention"],
    ]

    rng = np.random.default_rng(0)
    x, memory = (rng.standard_normal(shape).astype("float32") for shape in inputs.values())

    def reference(q, k, v):
        def heads(t):
            return t.reshape(2, -1, HEADS, SIZE).transpose(0, 2, 1, 3)

        weights = np.exp(heads(q) @ heads(k).swapaxes(2, 3))
        weights /= weights.sum(axis=-1, keepdims=True)
        return (weights @ heads(v)).transpose(0, 2, 1, 3).reshape(q.shape)

    y = reference(x, x, x)
    y = reference(y, memory, memory)
    expected = reference(y, y, y)
    assert math.isfinite(expected.sum())
    np.testing.assert_allclose(compile_and_run(before, x, memory), expected, atol=2e-6)
