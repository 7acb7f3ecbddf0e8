"""What has as many elements as the data wants becomes an operator of ours, or is refused."""

from __future__ import annotations

import pytest
from helpers import assert_becomes, assert_unchanged, build, context, program
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from sparse_tvm.errors import ModelError
from sparse_tvm.passes.select_by_data import select_by_data

RESULTS = [R.Tensor((10,), "int64"), R.Tensor((1,), "int64")]


@I.ir_module
class Before:
    @R.function
    def main(x: R.Tensor((2, 5), "float32")):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            found = R.call_dps_packed("onnx.NonZero", (x, R.str("{}")), out_ty=RESULTS)
            count = found[1]
            y = R.astype(count, "float32")
            R.output(y)
        return y


@I.ir_module
class Expected:
    @R.function
    def main(x: R.Tensor((2, 5), "float32")):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            found = R.call_dps_packed("sparse_tvm.select_nonzero", (x, R.str("{}")), out_ty=RESULTS)
            count = found[1]
            y = R.astype(count, "float32")
            R.output(y)
        return y


def test_becomes_ours():
    assert_becomes(select_by_data, program(Before), Expected)


def test_is_refused_where_there_is_no_kernel():
    with pytest.raises(ModelError, match=r"NonZero cannot be compiled for cuda-sm90: "):
        select_by_data(program(Before), context(target="cuda-sm90"))


def test_other_functions_are_left_alone():
    def body(emit, x):
        return relax.call_dps_packed("onnx.LSTM", (x,), relax.TensorType((2, 5), "float32"))

    assert_unchanged(select_by_data, build(body, {"x": (2, 5)}))
