"""Layer and RMS norm as exporters spell them, and formulas that only look like such."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, build, evaluate, operators
from tvm import relax

from sparse_tvm.passes.fuse_layer_norm import fuse_layer_norm

OP = relax.op
EPSILON = 1e-5


def const(value):
    return relax.const(value, "float32")


def mean(x, axis=(-1,)):
    return OP.mean(x, list(axis), keepdims=True)


def square_by_power(d):
    return OP.power(d, const(2.0))


def square_by_multiply(d):
    return OP.multiply(d, d)


def by_division(d, variance):
    return OP.divide(d, OP.sqrt(OP.add(variance, const(EPSILON))))


def by_power(d, variance):
    return OP.divide(d, OP.power(OP.add(variance, const(EPSILON)), const(0.5)))


def by_inverse(d, variance):
    return OP.multiply(d, OP.divide(const(1.0), OP.sqrt(OP.add(const(EPSILON), variance))))


def by_rsqrt(d, variance):
    return OP.multiply(OP.rsqrt(OP.add(variance, const(EPSILON))), d)


def norm(body):
    """A program ``body(emit, x, gamma, beta)`` over an input with symbolic extents."""
    return build(body, {"x": ("batch", "tokens", 12)}, {"gamma": (12,), "beta": (12,)})


def spelled(square=square_by_power, normalise=by_division, scale_last=True, add_last=True):
    def body(emit, x, gamma, beta):
        d = emit(OP.subtract(x, emit(mean(x))))
        normal = emit(normalise(d, emit(mean(emit(square(d))))))
        scaled = OP.multiply(normal, gamma) if scale_last else OP.multiply(gamma, normal)
        scaled = emit(scaled)
        return OP.add(scaled, beta) if add_last else OP.add(beta, scaled)

    return norm(body)


def twice_centred(emit, x, gamma, beta):
    """The variance is of a second ``x - mean(x)``, as some exporters have it."""
    first = emit(OP.subtract(x, emit(mean(x))))
    second = emit(OP.subtract(x, emit(mean(x, (2,)))))
    variance = emit(mean(emit(square_by_multiply(second))))
    return OP.add(OP.multiply(emit(by_division(first, variance)), gamma), beta)


SPELLINGS = {
    "torchscript": lambda: spelled(),
    "square by multiply": lambda: spelled(square=square_by_multiply),
    "square": lambda: spelled(square=OP.square),
    "power one half": lambda: spelled(normalise=by_power),
    "inverse": lambda: spelled(normalise=by_inverse),
    "rsqrt": lambda: spelled(normalise=by_rsqrt),
    "gamma and beta first": lambda: spelled(scale_last=False, add_last=False),
    "centred twice": lambda: norm(twice_centred),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    before = SPELLINGS[name]()
    after = apply(fuse_layer_norm, before)
    assert operators(after) == ["nn.layer_norm"]
    call = after.module["main"].body.blocks[0].bindings[0].value
    assert [int(axis) for axis in call.attrs.axes] == [-1]
    assert float(call.attrs.epsilon) == pytest.approx(EPSILON)
    x = np.random.default_rng(0).standard_normal((2, 3, 12)).astype("float32")
    np.testing.assert_allclose(evaluate(after, x), evaluate(before, x), atol=2e-5)


@pytest.mark.parametrize("square", [square_by_power, square_by_multiply, OP.square])
@pytest.mark.parametrize("normalise", [by_division, by_power, by_inverse, by_rsqrt])
@pytest.mark.parametrize("centred", [False, True], ids=["of x", "of centred x"])
def test_root_mean_square(square, normalise, centred):
    def body(emit, x, gamma):
        y = emit(OP.subtract(x, emit(mean(x)))) if centred else x
        return OP.multiply(gamma, emit(normalise(y, emit(mean(emit(square(y)))))))

    before = build(body, {"x": ("batch", "tokens", 12)}, {"gamma": (12,)})
    after = apply(fuse_layer_norm, before)
    assert operators(after)[-1] == "nn.rms_norm"
    assert len(operators(after)) == 1 + 2 * centred
    x = np.random.default_rng(0).standard_normal((2, 3, 12)).astype("float32")
    np.testing.assert_allclose(evaluate(after, x), evaluate(before, x), atol=2e-5)


@pytest.mark.parametrize(
    ("axis", "power", "gammas"),
    [((1,), 2.0, 12), ((-1,), 3.0, 12), ((-1,), 2.0, 1)],
    ids=["another axis", "cubes", "one gamma"],
)
def test_what_is_no_root_mean_square_is_left_alone(axis, power, gammas):
    def body(emit, x, gamma):
        squares = emit(OP.power(x, const(power)))
        return OP.multiply(gamma, emit(by_division(x, emit(mean(squares, axis)))))

    before = build(body, {"x": ("batch", "tokens", 12)}, {"gamma": (gammas,)})
    assert "nn.rms_norm" not in operators(apply(fuse_layer_norm, before))


def wrong_axis(emit, x, gamma, beta):
    d = emit(OP.subtract(x, emit(mean(x, (1,)))))
    variance = emit(mean(emit(square_by_power(d)), (1,)))
    return OP.add(OP.multiply(emit(by_division(d, variance)), gamma), beta)


def mixed_axes(emit, x, gamma, beta):
    d = emit(OP.subtract(x, emit(mean(x))))
    variance = emit(mean(emit(square_by_power(d)), (1,)))
    return OP.add(OP.multiply(emit(by_division(d, variance)), gamma), beta)


def no_epsilon(emit, x, gamma, beta):
    d = emit(OP.subtract(x, emit(mean(x))))
    variance = emit(mean(emit(square_by_power(d))))
    return OP.add(OP.multiply(emit(OP.divide(d, emit(OP.sqrt(variance)))), gamma), beta)


def cubed(emit, x, gamma, beta):
    d = emit(OP.subtract(x, emit(mean(x))))
    variance = emit(mean(emit(OP.power(d, const(3.0)))))
    return OP.add(OP.multiply(emit(by_division(d, variance)), gamma), beta)


def not_centred(emit, x, gamma, beta):
    """RMS norm with a bias."""
    variance = emit(mean(emit(square_by_power(x))))
    return OP.add(OP.multiply(emit(by_division(x, variance)), gamma), beta)


def other_variance(emit, x, gamma, beta):
    """The variance is of another tensor."""
    y = emit(OP.exp(x))
    d = emit(OP.subtract(x, emit(mean(x))))
    other = emit(OP.subtract(y, emit(mean(y))))
    variance = emit(mean(emit(square_by_power(other))))
    return OP.add(OP.multiply(emit(by_division(d, variance)), gamma), beta)


def multiplied_by_root(emit, x, gamma, beta):
    """Multiplies by the root instead of dividing by it."""
    d = emit(OP.subtract(x, emit(mean(x))))
    variance = emit(mean(emit(square_by_power(d))))
    root = emit(OP.sqrt(OP.add(variance, const(EPSILON))))
    return OP.add(OP.multiply(emit(OP.multiply(d, root)), gamma), beta)


def divided_by_inverse(emit, x, gamma, beta):
    """Divides by the reciprocal root instead of multiplying by it."""
    d = emit(OP.subtract(x, emit(mean(x))))
    variance = emit(mean(emit(square_by_power(d))))
    root = emit(OP.rsqrt(OP.add(variance, const(EPSILON))))
    return OP.add(OP.multiply(emit(OP.divide(d, root)), gamma), beta)


def two_products(emit, x, gamma, beta):
    """A product of products with a sum behind it, and no norm at all."""
    return OP.add(OP.multiply(emit(OP.multiply(x, emit(OP.exp(x)))), gamma), beta)


NEAR_MISSES = [
    wrong_axis,
    mixed_axes,
    no_epsilon,
    cubed,
    not_centred,
    other_variance,
    multiplied_by_root,
    divided_by_inverse,
    two_products,
]


@pytest.mark.parametrize("body", NEAR_MISSES, ids=lambda body: body.__name__)
def test_near_miss_is_left_alone(body):
    assert "nn.layer_norm" not in operators(apply(fuse_layer_norm, norm(body)))


def test_one_beta_for_all_features_is_left_alone():
    def body(emit, x, gamma, beta):
        d = emit(OP.subtract(x, emit(mean(x))))
        normal = emit(by_division(d, emit(mean(emit(square_by_power(d))))))
        return OP.add(emit(OP.multiply(normal, gamma)), beta)

    before = build(body, {"x": ("tokens", 12)}, {"gamma": (12,), "beta": (1,)})
    assert "nn.layer_norm" not in operators(apply(fuse_layer_norm, before))
