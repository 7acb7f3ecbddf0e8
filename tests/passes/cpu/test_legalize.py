"""Legalisation: TVM's operators become TIR, fused where elementwise; ours pass through."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, build, compile_and_run, operators, program
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

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


@pytest.mark.parametrize("rows", [6, "rows"])
def test_reshapes_are_views_of_what_kernels_write(rows):
    def body(emit, x):
        y = emit(OP.nn.softmax(x))
        size = x.ty.shape.values[0]
        return OP.nn.softmax(emit(OP.reshape(emit(OP.expand_dims(y, 0)), (2, size * 5))))

    subject = build(body, {"x": (rows, 10)})
    assert operators(apply(legalize, subject)).count("call_tir") == 2
    x = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
    y = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    y = np.exp(y.reshape(2, 30))
    expected = y / y.sum(1, keepdims=True)
    np.testing.assert_allclose(compile_and_run(subject, x), expected, rtol=1e-5)


def test_a_reshape_is_fused_with_elementwise_neighbours():
    def body(emit, x, y):
        return OP.add(emit(OP.reshape(emit(OP.tanh(x)), (5, 12))), y)

    after = legalized(body, {"x": (6, 10), "y": (5, 12)})
    assert operators(after) == ["call_tir"]


def test_no_output_is_memory_of_an_input_or_of_another_output():
    def of_input(emit, x):
        return OP.reshape(emit(OP.expand_dims(x, 0)), (3, 20))

    def of_output(emit, x):
        y = emit(OP.nn.softmax(x))
        return relax.Tuple([y, emit(OP.reshape(y, (3, 20)))])

    for body in (of_input, of_output):
        after = legalized(body, {"x": (6, 10)})
        assert operators(after)[-1] == "call_tir", body


def test_sizes_are_read_before_they_are_used():
    # FuseOps moves the slice, which takes no tensor that is computed, in front of the count.
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((5,), "float32"), many: R.Tensor((1,), "float32")):
            R.func_attr({"num_input": 2})
            count = T.int64()
            with R.dataflow():
                rows = R.astype(many, "int64")
                shape = R.tensor_to_shape(rows)
                _ = R.match_cast(shape, R.Shape([count]))
                part = R.strided_slice(x, [0], [0], [count], assume_inbound=True)
                y = R.tanh(part)
                R.output(y)
            return y

    x = np.arange(5, dtype=np.float32)
    for rows in (0, 3):
        y = compile_and_run(program(Before), x, np.float32([rows]))
        np.testing.assert_allclose(y, np.tanh(x[:rows]), rtol=1e-5)
