"""Branch-free float32 approximations of exp, erf and tanh, for scalars and SIMD vectors alike.

LLVM lowers ``llvm.exp.v16f32`` to sixteen calls of libm's ``expf``; these are a dozen FMAs.
Each function takes and returns a TIR expression of any lane count. Arguments are used several
times, so pass something cheap to repeat (a register load, not a whole formula).

Sources: ``exp`` after Cephes ``expf`` (S. Moshier); ``erf`` and ``tanh`` are the rational
approximations of Eigen's ``generic_fast_erf``/``generic_fast_tanh``. Errors against float64 are
checked in ``tests/test_vector_math.py``: exp 2e-7 relative, erf and tanh 4e-7 absolute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

Expr = Any

_EXP_POLY = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_EXP_LOWEST = -87.336544
_SATURATED = 87.0
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4

ROUNDING = 12582912.0
"""1.5 * 2**23: added to a small float, it leaves the nearest integer in the lowest bits."""

_EXP2 = (0.00132647273, 0.009671513, 0.0555073358, 0.240222424, 0.693147004, 1.0)
"""2**r in powers of r, fitted for |r| <= 1/2: 9e-8 relative, and 1 for 0."""

_ROUGH_EXP2 = (0.055171323, 0.24261055, 0.69326099, 0.99992811)

_ROUGH_GELU = (
    4.57955849e-08,
    -3.21044206e-06,
    9.62076022e-05,
    -1.63133383e-03,
    1.75636788e-02,
    -1.29197331e-01,
    7.95815167e-01,
)
"""erf(x / sqrt 2) / x in powers of x**2, fitted for |x| <= 4."""

_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)

_TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_Q = (
    1.19825839466702e-06,
    1.18534705686654e-04,
    2.26843463243900e-03,
    4.89352518554385e-03,
)


def lanes_of(x: Expr) -> int:
    """Number of SIMD lanes of an expression (1 for a scalar)."""
    return int(x.ty.dtype.lanes)


def constant(value: float, like: Expr, dtype: str = "float32") -> Expr:
    """``value`` in every lane of a vector shaped like ``like``."""
    scalar = tirx.const(value, dtype)
    lanes = lanes_of(like)
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


def _let(value: Expr, body: Any) -> Expr:
    """``body(v)`` with ``v`` computed once.

    A constant is not bound: TVM's analyzer fails where the same binding simplifies to another one.
    """
    if isinstance(value, tirx.FloatImm):
        return body(value)
    var = tirx.Var("v", value.ty)
    return tirx.Let(var, value, body(var))


def _horner(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    result = constant(coefficients[0], x)
    for coefficient in coefficients[1:]:
        result = result * x + constant(coefficient, x)
    return result


def _clamp(x: Expr, low: float, high: float) -> Expr:
    return tirx.max(tirx.min(x, constant(high, x)), constant(low, x))


def exp(x: Expr) -> Expr:
    """e**x, flushed to 0 below -87.3 and capped at 88.3 (float32's largest finite result)."""

    def with_argument(x: Expr) -> Expr:
        lowest = constant(_EXP_LOWEST, x)
        result = _let(_clamp(x, _EXP_LOWEST, 88.376262), _exp_of_clamped)
        return tirx.Select(x >= lowest, result, constant(0.0, x))

    return _let(x, with_argument)


def _exp_of_clamped(v: Expr) -> Expr:
    """2**n * e**r with x = n log 2 + r, the power made by shifting n into the exponent's bits."""

    def with_power(n: Expr) -> Expr:
        def with_rest(r: Expr) -> Expr:
            poly = _horner(r, _EXP_POLY) * (r * r) + r + constant(1.0, r)
            lanes = lanes_of(r)
            suffix = "" if lanes == 1 else f"x{lanes}"
            biased = T.Cast(f"int32{suffix}", n) + constant(127, r, "int32")
            exponent = T.shift_left(biased, constant(23, r, "int32"))
            return poly * T.reinterpret(f"float32{suffix}", exponent)

        return _let(v - n * constant(_LN2_HIGH, v) - n * constant(_LN2_LOW, v), with_rest)

    return _let(T.nearbyint(v * constant(math.log2(math.e), v)), with_power)


def exp_to_one(x: Expr) -> Expr:
    """e**x for x <= 0, to 2e-7 (of 1, not of its value), and 0 below -88: half of ``exp``'s time.

    The weights of a soft-max, whose largest is 1.
    """
    exponent_bias, mantissa_bits = 127, 23

    def with_clamped(v: Expr) -> Expr:
        magic, log2_e = constant(ROUNDING + exponent_bias, v), constant(math.log2(math.e), v)

        def with_shifted(shifted: Expr) -> Expr:
            lanes = lanes_of(v)
            integer = "int32" if lanes == 1 else f"int32x{lanes}"
            rest = v * log2_e - (shifted - magic)
            poly = _let(rest, lambda r: _horner(r, _EXP2))
            bits = T.reinterpret(integer, shifted)  # the biased exponent is in the lowest ones
            power = T.shift_left(bits, constant(mantissa_bits, v, "int32"))
            return poly * T.reinterpret(integer.replace("int", "float"), power)

        return _let(v * log2_e + magic, with_shifted)

    return _let(tirx.max(x, constant(-88.0, x)), with_clamped)


def rough_exp(x: Expr) -> Expr:
    """e**x for x <= 0, to 1e-4 of its value; about e**-87 below -87."""

    def with_power(t: Expr) -> Expr:
        def with_shifted(shifted: Expr) -> Expr:
            rest = t - (shifted - constant(ROUNDING, t))
            return _scaled(_let(rest, lambda r: _horner(r, _ROUGH_EXP2)), shifted)

        return _let(t + constant(ROUNDING, t), with_shifted)

    scaled = x * constant(math.log2(math.e), x)
    return _let(tirx.max(scaled, constant(-125.0, x)), with_power)


def erf(x: Expr) -> Expr:
    """The error function; saturates beyond |x| = 4."""

    def with_clamped(v: Expr) -> Expr:
        return _let(v * v, lambda v2: v * _horner(v2, _ERF_P) / _horner(v2, _ERF_Q))

    return _let(_clamp(x, -4.0, 4.0), with_clamped)


def tanh(x: Expr) -> Expr:
    """The hyperbolic tangent; saturates beyond |x| = 7.9."""

    def with_clamped(v: Expr) -> Expr:
        return _let(v * v, lambda v2: v * _horner(v2, _TANH_P) / _horner(v2, _TANH_Q))

    return _let(_clamp(x, -7.90531110763549805, 7.90531110763549805), with_clamped)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x)), to a few roundings; beyond |x| = 87 as there."""
    return _over_one_and_power(x, lambda v: constant(1.0, v))


def silu(x: Expr) -> Expr:
    """x / (1 + exp(-x)), to a few roundings; -87 or less is near 0."""
    return _over_one_and_power(x, lambda v: v)


def _over_one_and_power(x: Expr, numerator: Callable[[Expr], Expr]) -> Expr:
    """``numerator(x)`` over 1 + exp(-x), of which -x log2 e is rounded by adding a large number."""

    def with_lowest(v: Expr) -> Expr:
        def with_exponent(c: Expr) -> Expr:
            scale = constant(-math.log2(math.e), c)

            def with_shifted(shifted: Expr) -> Expr:
                rest = c * scale - (shifted - constant(ROUNDING, c))
                power = _scaled(_let(rest, lambda r: _horner(r, _EXP2)), shifted)
                return numerator(v) / (constant(1.0, v) + power)

            return _let(c * scale + constant(ROUNDING, c), with_shifted)

        return _let(tirx.min(v, constant(_SATURATED, v)), with_exponent)

    return _let(tirx.max(x, constant(-_SATURATED, x)), with_lowest)


def _scaled(value: Expr, shifted: Expr) -> Expr:
    """``value`` times two to the power of the integer in the lowest bits of a float."""
    lanes = lanes_of(value)
    suffix = "" if lanes == 1 else f"x{lanes}"
    bits = T.reinterpret(f"int32{suffix}", shifted)
    exponent = T.shift_left(bits, constant(23, value, "int32"))
    return T.reinterpret(f"float32{suffix}", T.reinterpret(f"int32{suffix}", value) + exponent)


def hard_sigmoid(x: Expr) -> Expr:
    """x / 6 + 1 / 2 between 0 and 1, after Howard et al. (2019)."""
    return _clamp(x * constant(1 / 6, x) + constant(0.5, x), 0.0, 1.0)


def hard_swish(x: Expr) -> Expr:
    """x * hard_sigmoid(x)."""
    return _let(x, lambda v: v * hard_sigmoid(v))


def relu(x: Expr) -> Expr:
    """max(x, 0)."""
    return tirx.max(x, constant(0.0, x))


def gelu(x: Expr) -> Expr:
    """The exact Gaussian error linear unit, 0.5 x (1 + erf(x / sqrt 2))."""
    half, one = constant(0.5, x), constant(1.0, x)
    return _let(x, lambda v: half * v * (one + erf(v * constant(math.sqrt(0.5), v))))


def gelu_tanh(x: Expr) -> Expr:
    """GELU by its tanh formula, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3)))."""
    half, one = constant(0.5, x), constant(1.0, x)

    def formula(v: Expr) -> Expr:
        inner = v * (one + constant(0.044715, v) * v * v) * constant(math.sqrt(2 / math.pi), v)
        return half * v * (one + tanh(inner))

    return _let(x, formula)


def rough_gelu(x: Expr) -> Expr:
    """The exact GELU's formula to 2e-4, for results that are rounded to few bits."""

    def formula(v: Expr) -> Expr:
        half = v * constant(0.5, v)

        def with_clamped(c: Expr) -> Expr:
            return half + half * (c * _let(c * c, lambda c2: _horner(c2, _ROUGH_GELU)))

        return _let(_clamp(v, -4.0, 4.0), with_clamped)

    return _let(x, formula)


ACTIVATIONS = {
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "silu": silu,
    "hard_sigmoid": hard_sigmoid,
    "hard_swish": hard_swish,
}
"""Activation functions an epilogue may name."""

ROUGH_ACTIVATIONS = {**ACTIVATIONS, "gelu": rough_gelu}
"""The same where the result is rounded to 8 or 16 bits."""
