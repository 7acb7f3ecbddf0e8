"""Quantised dense layers multiply the model's own integers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import build, calls, context
from tvm import relax

from sparse_tvm.operators import Dense, StepRound
from sparse_tvm.passes import dialect
from sparse_tvm.passes.fc_transpose import fc_transpose
from sparse_tvm.passes.fuse_epilogue import fuse_epilogue
from sparse_tvm.passes.keep_integers import keep_integers
from sparse_tvm.sparsity.quantise import quantise_rows, reach, steps_of_rows

OP = relax.op
STEPS = np.float32(np.random.default_rng(0).integers(-127, 128, (32, 64)) * 0.01)


def number(value):
    return relax.const(value, "float32")


def fake(emit, x, scale, low, high):
    """What ``QuantizeLinear`` and ``DequantizeLinear`` become."""
    steps = emit(OP.divide(x, scale))
    steps = emit(OP.minimum(emit(OP.maximum(steps, low)), high))
    return emit(OP.multiply(emit(OP.round(steps)), scale))


def static(low, high, bias=False):
    def body(emit, x, w, *b):
        rounded = fake(emit, x, number(0.05), number(low), number(high))
        y = emit(OP.matmul(rounded, emit(OP.permute_dims(w))))
        return OP.add(y, b[0]) if bias else y

    weights = {"w": (32, 64), **({"b": (32,)} if bias else {})}
    program = build(body, {"x": (2, 8, 64)}, weights)
    program.layers = {"w": "w"}
    program.weights["w"] = STEPS
    return program


def transformed(program, *rules, target="sapphirerapids", integers=True):
    where = context(*rules, target=target)
    where = replace(where, options=replace(where.options, integers=integers))
    for one in (fc_transpose, fuse_epilogue, keep_integers):
        program = one(program, where, check=True)
    return program


def dense(program):
    [found] = dialect.calls(program, Dense)
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_a_zero_point_becomes_a_bias(bias):
    found = transformed(static(-100.0, 155.0, bias))
    layer = dense(found)
    assert (layer.op.types.input, layer.op.steps) == ("int8", 127)
    assert [step.name for step in layer.op.epilogue] == ["bias"]
    [rounding] = dialect.calls(found, StepRound)
    assert [float(arg.value.numpy()[0]) for arg in rounding.args[1:]] == [
        pytest.approx(0.05),
        100.0,
    ]
    correction = found.weights["w.zero_point"]
    np.testing.assert_allclose(correction, 0.05 * 28 * STEPS.sum(axis=1), rtol=1e-4, atol=1e-5)


def test_a_symmetric_activation_needs_none():
    found = transformed(static(-128.0, 127.0))
    assert dense(found).op.epilogue == ()


def test_dynamic_scales():
    def body(emit, x, w):
        zero = emit(OP.round(emit(OP.max(x))))
        scale = emit(OP.min(x))
        low, high = (emit(OP.subtract(number(limit), zero)) for limit in (0.0, 255.0))
        return OP.matmul(fake(emit, x, scale, low, high), emit(OP.permute_dims(w)))

    program = build(body, {"x": (2, 8, 64)}, {"w": (32, 64)})
    program.weights["w"] = STEPS
    layer = dense(transformed(program))
    assert layer.op.types.input == "int8"
    assert [step.name for step in layer.op.epilogue] == ["bias"]


@pytest.mark.parametrize("peak_steps", [127.5, 127.0])
def test_scales_of_tokens_are_those_of_the_kernels(peak_steps):
    def body(emit, x, w):
        peak = emit(OP.max(emit(OP.abs(x)), axis=[-1], keepdims=True))
        scale = emit(OP.maximum(emit(OP.divide(peak, number(peak_steps))), number(1e-7)))
        rounded = fake(emit, x, scale, number(-128.0), number(127.0))
        return OP.matmul(rounded, emit(OP.permute_dims(w)))

    program = build(body, {"x": (2, 8, 64)}, {"w": (32, 64)})
    program.weights["w"] = STEPS
    found = transformed(program)
    layer = dense(found)
    assert layer.op.types.input == ("int8" if peak_steps == 127.5 else "float32")
    assert layer.op.epilogue == ()
    assert calls(found, StepRound) == []


def test_other_steps_and_rules_of_the_user_stay_float32():
    for subject in (
        transformed(static(-50.0, 155.0)),
        transformed(static(-100.0, 155.0), "w=@fp32"),
    ):
        assert dense(subject).op.types.input == "float32"
        assert calls(subject, StepRound) == []


def test_targets_without_kernels_say_so():
    found = transformed(static(-100.0, 155.0), target="cortex-a72")
    assert dense(found).op.types.input == "float32"
    assert "w is quantised but stays float32" in found.notes[0]


def test_weights_with_too_many_steps_stay_float32():
    program = static(-100.0, 155.0)
    program.weights["w"] = np.float32(np.random.default_rng(0).integers(0, 256, (32, 64)) * 0.01)
    found = transformed(program)
    assert dense(found).op.types.input == "float32"
    assert "more than 127 steps" in found.notes[0]


def test_nothing_happens_unless_asked_for():
    assert dense(transformed(static(-100.0, 155.0), integers=False)).op.types.input == "float32"


def test_steps_of_rows():
    rng = np.random.default_rng(0)
    scales = rng.uniform(1e-4, 2, 40).astype(np.float32)
    q = rng.integers(-64, 65, (40, 300))
    q[0], q[1, 1:] = 0, 0
    w = q.astype(np.float32) * scales[:, None]
    steps = steps_of_rows(w)
    assert steps[0] == 0
    counts = w[1:] / steps[1:, None]
    assert np.abs(np.rint(counts)).max() <= 127
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-3)
    values, found = quantise_rows(w)
    np.testing.assert_allclose(values * found[:, None], w, rtol=1e-5)
    assert not steps_of_rows(rng.standard_normal((40, 300)).astype(np.float32)).any()


def test_weights_may_reach_as_far_as_an_int8():
    """PyTorch's symmetric weights: half the rows end on -128."""
    q = np.random.default_rng(0).integers(-127, 128, (32, 64))
    q[::2, 3] = -128
    w = q.astype(np.float32) * np.float32(0.0137)
    np.testing.assert_array_equal(quantise_rows(w)[0], q)
    assert (reach(np.abs(w)), reach(w), reach(w[1::2])) == (None, 128, 127)
    program = static(-100.0, 155.0)
    program.weights["w"] = w
    assert dense(transformed(program)).op.steps == 128
    found = transformed(program, target="x86-64-v3")
    assert dense(found).op.types.input == "float32"
    assert "multiplies no weights 128 steps from 0" in found.notes[0]
