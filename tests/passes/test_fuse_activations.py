"""Activation functions as exporters spell them, and formulas that only look like them."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from helpers import apply, assert_becomes, build, evaluate, operators, program
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from sparse_tvm.passes.fuse_activations import fuse_activations

OP = relax.op


def const(value):
    return relax.const(value, "float32")


def erf_of(x, scale=1.4142135623730951):
    return OP.erf(OP.divide(x, const(scale)))


def tanh_inner(x, cubic=0.044715):
    cube = OP.multiply(x, OP.multiply(x, x))
    return OP.multiply(const(math.sqrt(2 / math.pi)), OP.add(x, OP.multiply(const(cubic), cube)))


SPELLINGS = {
    # x * 0.5 * (1 + erf(x / sqrt 2)): the TorchScript exporter, x * (...) * 0.5
    "gelu/torchscript": (
        "nn.gelu",
        lambda x: OP.multiply(OP.multiply(x, OP.add(erf_of(x), const(1.0))), const(0.5)),
    ),
    "gelu/dynamo": (
        "nn.gelu",
        lambda x: OP.multiply(
            OP.multiply(const(0.5), x),
            OP.add(const(1.0), OP.erf(OP.multiply(const(math.sqrt(0.5)), x))),
        ),
    ),
    "gelu/halved sum": (
        "nn.gelu",
        lambda x: OP.multiply(
            x, OP.add(OP.multiply(const(0.5), erf_of(x, 1.41421354)), const(0.5))
        ),
    ),
    "gelu/divided by two": (
        "nn.gelu",
        lambda x: OP.divide(OP.multiply(OP.add(erf_of(x), const(1.0)), x), const(2.0)),
    ),
    "gelu_tanh/cube by multiply": (
        "nn.gelu_tanh",
        lambda x: OP.multiply(
            OP.multiply(const(0.5), x), OP.add(const(1.0), OP.tanh(tanh_inner(x)))
        ),
    ),
    "gelu_tanh/cube by power": (
        "nn.gelu_tanh",
        lambda x: OP.multiply(
            OP.multiply(x, const(0.5)),
            OP.add(
                OP.tanh(
                    OP.multiply(
                        OP.add(x, OP.multiply(OP.power(x, const(3.0)), const(0.044715))),
                        const(0.7978845608),
                    )
                ),
                const(1.0),
            ),
        ),
    ),
    "gelu_tanh/factored": (
        "nn.gelu_tanh",
        lambda x: OP.multiply(
            OP.multiply(const(0.5), x),
            OP.add(
                const(1.0),
                OP.tanh(
                    OP.multiply(
                        OP.multiply(x, const(0.7978845608)),
                        OP.add(const(1.0), OP.multiply(OP.multiply(const(0.044715), x), x)),
                    )
                ),
            ),
        ),
    ),
    "silu/sigmoid first": ("nn.silu", lambda x: OP.multiply(OP.sigmoid(x), x)),
    "silu/sigmoid last": ("nn.silu", lambda x: OP.multiply(x, OP.sigmoid(x))),
    "silu/quotient": (
        "nn.silu",
        lambda x: OP.divide(x, OP.add(const(1.0), OP.exp(OP.negative(x)))),
    ),
}

NEAR_MISSES = {
    "gelu with a wrong constant": lambda x: OP.multiply(
        OP.multiply(x, OP.add(erf_of(x, 1.5), const(1.0))), const(0.5)
    ),
    "gelu without the half": lambda x: OP.multiply(x, OP.add(erf_of(x), const(1.0))),
    "gelu_tanh with another cubic term": lambda x: OP.multiply(
        OP.multiply(const(0.5), x), OP.add(const(1.0), OP.tanh(tanh_inner(x, 0.035677)))
    ),
    "quick gelu": lambda x: OP.multiply(x, OP.sigmoid(OP.multiply(const(1.702), x))),
    "mish": lambda x: OP.multiply(x, OP.tanh(OP.log(OP.add(const(1.0), OP.exp(x))))),
    "x tanh x": lambda x: OP.multiply(x, OP.tanh(x)),
    "gelu of a constant per feature": lambda x: OP.multiply(
        x, OP.sigmoid(OP.add(x, relax.const(np.arange(4, dtype="float32"))))
    ),
}


def formula(apply_to):
    """A program that applies a formula to an input with a symbolic extent."""
    return build(lambda emit, x: apply_to(x), {"x": ("tokens", 4)})


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    operator, spelled = SPELLINGS[name]
    before = formula(spelled)
    after = apply(fuse_activations, before)
    assert operators(after) == [operator]
    x = np.linspace(-9, 9, 64, dtype="float32").reshape(16, 4)
    np.testing.assert_allclose(evaluate(after, x), evaluate(before, x), atol=2e-6)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(name):
    before = formula(NEAR_MISSES[name])
    assert operators(apply(fuse_activations, before)) == operators(before)


def test_constant_that_adds_a_dimension_is_left_alone():
    def halved(x):
        one = relax.const(np.ones((1, 1, 1), "float32"))
        return OP.multiply(OP.multiply(x, const(0.5)), OP.add(erf_of(x), one))

    before = formula(halved)
    assert operators(apply(fuse_activations, before)) == operators(before)


def test_long_chain_of_squares_takes_no_time():
    def squares(emit, x):
        y = emit(OP.tanh(x))
        for _ in range(40):
            y = emit(OP.multiply(y, y))
        return OP.negative(y)

    before = build(squares, {"x": ("tokens", 4)})
    started = time.perf_counter()
    assert operators(apply(fuse_activations, before)) == operators(before)
    assert time.perf_counter() - started < 2


@I.ir_module
class TwoVariables:
    @R.function
    def main(
        x: R.Tensor(("tokens", 4), "float32"), y: R.Tensor(("tokens", 4), "float32")
    ) -> R.Tensor(("tokens", 4), "float32"):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            gate = R.sigmoid(y)
            z = R.multiply(x, gate)
            R.output(z)
        return z


def test_gate_of_another_tensor_is_left_alone():
    before = program(TwoVariables)
    assert operators(apply(fuse_activations, before)) == ["sigmoid", "multiply"]


@I.ir_module
class GatedUnit:
    """SwiGLU: the gate is an activation, the product with the other branch is not."""

    @R.function
    def main(
        x: R.Tensor(("tokens", 4), "float32"), up: R.Tensor(("tokens", 4), "float32")
    ) -> R.Tensor(("tokens", 4), "float32"):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            s = R.sigmoid(x)
            gate = R.multiply(x, s)
            z = R.multiply(gate, up)
            R.output(z)
        return z


@I.ir_module
class GatedUnitFused:
    @R.function
    def main(
        x: R.Tensor(("tokens", 4), "float32"), up: R.Tensor(("tokens", 4), "float32")
    ) -> R.Tensor(("tokens", 4), "float32"):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            gate = R.nn.silu(x)
            z = R.multiply(gate, up)
            R.output(z)
        return z


def test_product_with_another_tensor_keeps_its_activation():
    assert_becomes(fuse_activations, program(GatedUnit), GatedUnitFused)


@I.ir_module
class OfALayer:
    """The variable is the activation's argument, not what that was computed from."""

    @R.function
    def main(x: R.Tensor(("tokens", 4), "float32")) -> R.Tensor(("tokens", 4), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            a = R.add(x, R.const(1.0, "float32"))
            s = R.sigmoid(a)
            z = R.multiply(a, s)
            R.output(z)
        return z


@I.ir_module
class OfALayerFused:
    @R.function
    def main(x: R.Tensor(("tokens", 4), "float32")) -> R.Tensor(("tokens", 4), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            a = R.add(x, R.const(1.0, "float32"))
            z = R.nn.silu(a)
            R.output(z)
        return z


def test_argument_is_the_nearest_variable():
    assert_becomes(fuse_activations, program(OfALayer), OfALayerFused)
