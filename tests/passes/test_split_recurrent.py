"""A recurrent network becomes a dense layer for all steps, and the steps."""

from __future__ import annotations

import json
from typing import TypeVar

from helpers import assert_becomes, program
from tvm.script import ir as I
from tvm.script import relax as R

from sparse_tvm.passes.split_recurrent import split_recurrent

steps = TypeVar("steps")

ATTRIBUTES = {
    "activations": ["Sigmoid", "Tanh", "Tanh"],
    "clip": None,
    "direction": "forward",
    "inputs": ["X", "W", "R", "B"],
    "layout": 0,
    "linear_before_reset": 0,
}
LSTM = json.dumps(ATTRIBUTES)
RECURRENT = json.dumps(
    {"cell": "lstm", "functions": ["sigmoid", "tanh", "tanh"], "layer": "r", "matrix": [32, 8]}
)


@I.ir_module
class Before:
    @R.function
    def main(
        x: R.Tensor((steps, 2, 6), "float32"),
        w: R.Tensor((1, 32, 6), "float32"),
        r: R.Tensor((1, 32, 8), "float32"),
        b: R.Tensor((1, 64), "float32"),
    ) -> R.Tensor((steps, 1, 2, 8), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            outputs = R.call_dps_packed(
                "onnx.LSTM",
                (x, w, r, b, R.str(LSTM)),
                out_ty=[
                    R.Tensor((steps, 1, 2, 8), "float32"),
                    R.Tensor((1, 2, 8), "float32"),
                    R.Tensor((1, 2, 8), "float32"),
                ],
            )
            y = outputs[0]
            R.output(y)
        return y


@I.ir_module
class Expected:
    @R.function
    def main(
        x: R.Tensor((steps, 2, 6), "float32"),
        w_: R.Tensor((32, 6), "float32"),
        b_: R.Tensor((32,), "float32"),
        r_: R.Tensor((32, 8), "float32"),
    ) -> R.Tensor((steps, 1, 2, 8), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            tokens = R.reshape(x, (1, steps * 2, 6))
            weight = R.permute_dims(w_)
            product = R.matmul(tokens, weight)
            biased = R.add(product, b_)
            gates = R.reshape(biased, (steps, 2, 32))
            states = R.call_dps_packed(
                "sparse_tvm.recurrent",
                (gates, r_, R.str(RECURRENT)),
                out_ty=R.Tensor((steps + 2, 2, 8), "float32"),
            )
            hidden = R.strided_slice(states, [0], [0], [steps], assume_inbound=True)
            y = R.reshape(hidden, (steps, 1, 2, 8))
            R.output(y)
        return y


def test_lstm():
    after = assert_becomes(split_recurrent, program(Before), Expected)
    assert after.layers["w_"] == "w"
    assert after.layers["r_"] == "r"
