"""The polynomial exp, erf, tanh and the activations built on them, against float64."""

import math

import numpy as np
import pytest
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu import vector_math

erf64 = np.vectorize(math.erf)


def gelu_tanh64(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


REFERENCES = {
    "exp": np.exp,
    "erf": erf64,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + erf64(x * math.sqrt(0.5))),
    "gelu_tanh": gelu_tanh64,
}


def apply(function, x, lanes):
    with IRBuilder() as builder, T.prim_func():
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        source = T.arg("x", T.buffer((x.size,), "float32"))
        target = T.arg("y", T.buffer((x.size,), "float32"))
        with T.serial(0, x.size // lanes) as i:
            at = i if lanes == 1 else T.ramp(i * lanes, 1, lanes)
            T.buffer_store(target, function(source[at]), [at])
    library = tvm.compile(builder.get(), {"kind": "llvm", "mcpu": "x86-64-v3"})
    y = tvm.runtime.empty(x.shape, "float32")
    library["main"](tvm.runtime.tensor(x), y)
    return y.numpy()


@pytest.mark.parametrize("lanes", [1, 8, 16])
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_matches_float64(name, lanes):
    x = np.concatenate(
        [np.linspace(-90, 88, 4096), np.linspace(-9, 9, 8192), np.linspace(-1e-3, 1e-3, 1024)]
    ).astype("float32")
    got = apply(getattr(vector_math, name), x, lanes)
    expected = REFERENCES[name](x.astype("float64"))
    if name == "exp":
        normal = expected > 1.2e-38
        np.testing.assert_allclose(got[normal], expected[normal], rtol=2e-7)
        assert np.all(got[~normal] < 1.3e-38)
    else:
        # GELU multiplies erf's rounding error by x.
        assert np.all(np.abs(got - expected) <= 4e-7 * np.maximum(1, np.abs(x)))


@pytest.mark.parametrize("name", ["exp", "erf", "tanh", "gelu", "sigmoid"])
def test_saturates_instead_of_overflowing(name):
    x = np.array([-1e30, -1e4, 1e4, 88.0], "float32")
    assert np.isfinite(apply(getattr(vector_math, name), x, 1)[:3]).all() or name == "exp"
    assert not np.isnan(apply(getattr(vector_math, name), x, 1)).any()


@pytest.mark.parametrize("lanes", [1, 8, 16])
def test_weights_of_a_soft_max(lanes):
    x = np.concatenate([np.linspace(-90, 0, 8192), np.linspace(-2, 0, 8192)]).astype("float32")
    got = apply(vector_math.exp_to_one, x, lanes)
    exact = np.exp(x.astype("float64"))
    np.testing.assert_allclose(got, exact, rtol=2e-6, atol=2e-38)
    assert np.all(np.abs(got - exact) <= 2e-7)
    hidden = np.full(16, -np.inf, "float32")
    hidden[0], hidden[1], hidden[2] = 0, np.finfo("float32").min, -88.1
    assert apply(vector_math.exp_to_one, hidden, lanes).tolist() == [1.0] + [0.0] * 15


@pytest.mark.parametrize("lanes", [1, 16])
def test_rough_functions(lanes):
    x = np.linspace(-86, 0, 8192).astype("float32")
    got = apply(vector_math.rough_exp, x, lanes)
    np.testing.assert_allclose(got, np.exp(x.astype("float64")), rtol=1e-4)
    assert np.all(apply(vector_math.rough_exp, x - 1e4, lanes) < 1e-37)
    x = np.linspace(-30, 30, 8192).astype("float32")
    got = apply(vector_math.rough_gelu, x, lanes)
    error = np.abs(got - REFERENCES["gelu"](x.astype("float64")))
    assert np.all(error <= 2e-4 * np.maximum(1, np.abs(x) / 4))
