"""Legalisation: TVM's operators become TIR, fused where elementwise; ours pass through."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, build, compile_and_run, operators
from tvm import relax, tirx

from sparse_tvm.passes.cpu.legalize import legalize
from sparse_tvm.passes.fuse_product import fuse_product
from sparse_tvm.passes.lower_kernels import KERNEL_ATTRIBUTE

OP = relax.op


def legalized(body, inputs):
    return apply(legalize, build(body, inputs))


def functions(subject):
    return [f for f in subject.module.functions.values() if isinstance(f, tirx.PrimFunc)]


@pytest.mark.parametrize("rows", [3, "rows"])
def test_elementwise_chain_is_one_function(rows):
    def body(emit, x, y):
        return OP.tanh(emit(OP.multiply(emit(OP.add(x, y)), x)))

    after = legalized(body, {"x": (rows, 8), "y": (rows, 8)})
    assert operators(after) == ["call_tir"]
    assert len(functions(after)) == 1


def test_operators_of_ours_pass_through_and_nothing_is_fused_into_them():
    def body(emit, a, b):
        return OP.exp(emit(OP.matmul(emit(OP.tanh(a)), b)))

    before = build(body, {"a": (3, 40, 64), "b": (3, 64, 48)})
    after = apply([fuse_product, legalize], before)
    assert operators(after) == ["call_tir", "product", "call_tir"]


def test_top_k_has_a_kernel():
    after = legalized(lambda emit, x: OP.topk(x, 3, 1, "values"), {"x": (4, 9)})
    (kernel,) = functions(after)
    assert kernel.attrs[KERNEL_ATTRIBUTE] == "top_k"


def test_cumulative_sum():
    x = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    y = compile_and_run(build(lambda emit, x: OP.cumsum(x, 1), {"x": (4, 9)}), x)
    np.testing.assert_allclose(y, x.cumsum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("axes", "keepdims"), [([1], True), ([0], False), (None, False)])
@pytest.mark.parametrize("rows", [3, "rows"])
def test_the_largest_of_infinities_is_infinite(axes, keepdims, rows):
    x = np.full((3, 9), -np.inf, np.float32)
    x[1, 4] = 1.0

    def body(emit, x):
        return OP.add(emit(OP.max(x, axes, keepdims)), emit(OP.min(x, axes, keepdims)))

    y = compile_and_run(build(body, {"x": (rows, 9)}), x)
    over = None if axes is None else tuple(axes)
    expected = x.max(over, keepdims=keepdims) + x.min(over, keepdims=keepdims)
    np.testing.assert_array_equal(y, expected)


def test_the_largest_of_integers():
    x = np.array([[-5, -7], [3, 9]], np.int32)
    program = build(lambda emit, x: OP.max(x, [1]), {"x": (2, 2)}, dtypes={"x": "int32"})
    y = compile_and_run(program, x)
    np.testing.assert_array_equal(y, [-5, 9])
