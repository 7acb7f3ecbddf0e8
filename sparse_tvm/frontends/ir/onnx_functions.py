"""Operators of ONNX that an imported module calls by name, computed by ONNX Runtime.

The compiler replaces these calls; TVM alone, which is the reference for a saved module, has to be
told what they compute.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import onnx
import tvm
from onnx import helper

from sparse_tvm.reference import Reference

_NAMES = {
    "LSTM": ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
    "GRU": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "RNN": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
}


def register() -> None:
    """Let TVM's virtual machine find ``onnx.LSTM`` and its like."""
    for operator in _NAMES:
        tvm.register_global_func(f"onnx.{operator}", partial(_compute, operator), override=True)


def _compute(operator: str, *arguments: Any) -> None:
    """Fill the last arguments, the outputs, from the inputs and the attributes in front."""
    place = next(i for i, argument in enumerate(arguments) if isinstance(argument, str))
    attributes = json.loads(arguments[place])
    given = attributes.pop("inputs")
    tensors, outputs = arguments[:place], arguments[place + 1 :]
    feed = dict(zip(given, (tensor.numpy() for tensor in tensors), strict=True))
    model = _model(operator, attributes, feed, outputs).SerializeToString()
    results = Reference(model, threads=1).run(feed)
    for output, result in zip(outputs, results.values(), strict=True):
        output.copyfrom(result)


def _model(
    operator: str, attributes: dict[str, Any], feed: dict[str, Any], outputs: tuple[Any, ...]
) -> onnx.ModelProto:
    known = {name: value for name, value in attributes.items() if value is not None}
    known["hidden_size"] = feed["R"].shape[-1]
    if operator != "GRU":
        del known["linear_before_reset"]
    names = [f"output_{i}" for i in range(len(outputs))]
    inputs = [name if name in feed else "" for name in _NAMES[operator]]
    node = helper.make_node(operator, inputs, names, **known)

    def info(name: str, dtype: Any, shape: Any) -> onnx.ValueInfoProto:
        element = helper.np_dtype_to_tensor_dtype(dtype)
        return helper.make_tensor_value_info(name, element, [int(size) for size in shape])

    graph = helper.make_graph(
        [node],
        operator,
        [info(name, value.dtype, value.shape) for name, value in feed.items()],
        [
            info(name, feed["X"].dtype, output.shape)
            for name, output in zip(names, outputs, strict=True)
        ],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 14)])
