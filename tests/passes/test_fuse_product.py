"""Products of two activations become one operator, with the transposes before them."""

from __future__ import annotations

import json
from typing import TypeVar

import pytest
from helpers import apply, assert_becomes, assert_unchanged, build, calls, operators, program
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from sparse_tvm.operators import Product
from sparse_tvm.passes.fuse_product import fuse_product

OP = relax.op
tokens = TypeVar("tokens")

SCORES = json.dumps({"left": [0, 2, 1, 3], "right": [0, 2, 3, 1]})


@I.ir_module
class Before:
    @R.function
    def main(
        q: R.Tensor((2, tokens, 4, 64), "float32"),
        k: R.Tensor((2, tokens, 4, 64), "float32"),
    ) -> R.Tensor((2, 4, tokens, tokens), "float32"):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            rows = R.permute_dims(q, axes=[0, 2, 1, 3])
            columns = R.permute_dims(k, axes=[0, 2, 3, 1])
            y = R.matmul(rows, columns)
            R.output(y)
        return y


@I.ir_module
class Expected:
    @R.function
    def main(
        q: R.Tensor((2, tokens, 4, 64), "float32"),
        k: R.Tensor((2, tokens, 4, 64), "float32"),
    ) -> R.Tensor((2, 4, tokens, tokens), "float32"):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            y = R.call_dps_packed(
                "sparse_tvm.product",
                (q, k, R.str(SCORES)),
                out_ty=R.Tensor((2, 4, tokens, tokens), "float32"),
            )
            R.output(y)
        return y


def test_transposed_operands():
    assert_becomes(fuse_product, program(Before), Expected)


def test_transposes_of_transposes():
    def body(emit, a, b):
        turned = emit(OP.permute_dims(emit(OP.permute_dims(b, [1, 0, 2])), [0, 2, 1]))
        return OP.matmul(a, turned)

    after = apply(fuse_product, build(body, {"a": (3, 40, 64), "b": (48, 3, 64)}))
    assert operators(after) == ["product"]
    (call,) = calls(after, Product)
    assert (call.op.left, call.op.right) == ((0, 1, 2), (1, 2, 0))
    assert call.op.rows == 40


def test_transpose_that_is_read_elsewhere_is_kept():
    def body(emit, a, b):
        turned = emit(OP.permute_dims(b, [0, 2, 1]))
        return OP.add(emit(OP.matmul(a, turned)), turned)

    after = apply(fuse_product, build(body, {"a": (3, 48, 48), "b": (3, 48, 48)}))
    assert sorted(operators(after)) == ["add", "permute_dims", "product"]
    assert len(calls(after, Product)) == 1


LEFT_ALONE = {
    "vector on the left": ((64,), (64, 48), "float32"),
    "vector on the right": ((48, 64), (64,), "float32"),
    "other dtype": ((3, 40, 64), (3, 64, 48), "float64"),
}


@pytest.mark.parametrize(("a", "b", "dtype"), LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_leaves_alone(a, b, dtype):
    dtypes = {"a": dtype, "b": dtype}
    before = build(lambda emit, a, b: OP.matmul(a, b), {"a": a, "b": b}, dtypes=dtypes)
    assert_unchanged(fuse_product, before)


def test_dot_products_are_left_alone():
    """One row times a transposed matrix reads the matrix along its rows as it is."""

    def body(emit, a, b):
        return OP.matmul(a, emit(OP.permute_dims(b)))

    assert_unchanged(fuse_product, build(body, {"a": (1, 64), "b": (48, 64)}))
