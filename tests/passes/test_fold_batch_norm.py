"""Batch norms of known numbers become a product and a sum for each channel."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, assert_becomes, assert_unchanged, build, compile_and_run, evaluate
from tvm import relax

from sparse_tvm.passes.fold_batch_norm import fold_batch_norm

OP = relax.op
NUMBERS = ("gamma", "beta", "mean", "variance")
IMAGE = {"x": ("batch", 6, 5, 7)}
VECTORS = dict.fromkeys(NUMBERS, (6,))


def norm(emit, x, *numbers, axis=1, **options):
    options = {"training": False, **options}
    return emit(emit(OP.nn.batch_norm(x, *numbers, axis=axis, epsilon=0.5, **options))[0])


def with_positive_variance(program):
    program.weights["variance"] = np.abs(program.weights["variance"])
    return program


def subject(axis=1, inputs=IMAGE, **options):
    def body(emit, x, *numbers):
        return OP.nn.relu(norm(emit, x, *numbers, axis=axis, **options))

    return with_positive_variance(build(body, inputs, VECTORS))


@pytest.mark.parametrize(("axis", "shape"), [(1, (4, 6, 5, 7)), (-1, (4, 5, 6)), (1, (4, 6))])
def test_becomes_a_product_and_a_sum(axis, shape):
    of_channels = [1] * len(shape)
    of_channels[axis] = 6

    def expected(emit, x, w, b):
        return OP.nn.relu(emit(OP.add(emit(OP.multiply(x, w)), b)))

    before = subject(axis, {"x": shape})
    weights = {"w": tuple(of_channels), "b": tuple(of_channels)}
    after = assert_becomes(fold_batch_norm, before, build(expected, {"x": shape}, weights).module)
    x = np.random.default_rng(1).standard_normal(shape).astype("float32")
    gamma, beta, mean, variance = (before.weights[n].reshape(of_channels) for n in NUMBERS)
    wanted = np.maximum((x - mean) / np.sqrt(variance + 0.5) * gamma + beta, 0)
    np.testing.assert_allclose(evaluate(after, x), wanted, atol=1e-5)


def test_behind_a_concatenation_of_convolutions_it_stays_in_planes():
    """As in DenseNet: two layers see all that was made so far, normalised."""

    def body(emit, x, v, *numbers):
        y = emit(OP.nn.conv2d(x, v, padding=(1, 1, 1, 1)))
        both = emit(OP.concat([y, emit(OP.nn.conv2d(y, v, padding=(1, 1, 1, 1)))], axis=1))
        return OP.nn.conv2d(emit(OP.nn.relu(norm(emit, both, *numbers))), w_of(emit, numbers))

    def w_of(emit, numbers):
        return relax.const(np.random.default_rng(3).standard_normal((4, 6, 1, 1), np.float32))

    program = with_positive_variance(
        build(body, {"x": (2, 3, 9, 9)}, {"v": (3, 3, 3, 3), **VECTORS})
    )
    x = np.random.default_rng(2).standard_normal((2, 3, 9, 9)).astype("float32")
    np.testing.assert_allclose(compile_and_run(program, x), evaluate(program, x), atol=1e-4)


@pytest.mark.parametrize("options", [{"training": True}, {"center": False}, {"scale": False}])
def test_other_norms_are_left_alone(options):
    assert_unchanged(fold_batch_norm, subject(**options))


def test_numbers_that_an_input_brings_are_left_alone():
    def body(emit, x, gamma, beta, mean, variance):
        return norm(emit, x, gamma, beta, mean, variance)

    assert_unchanged(fold_batch_norm, build(body, {**IMAGE, **VECTORS}))


def test_weights_keep_their_type():
    after = apply(fold_batch_norm, subject())
    assert {str(array.dtype) for array in after.weights.values()} == {"float32"}
