"""The operators that our passes speak of before they become kernels.

Relax operators are registered in C++, so ours are written as calls of a named destination-passing
function, ``R.call_dps_packed("sparse_tvm.dense", (x, w, bias, attributes), out)``, with the
attributes as a JSON string in last place. ``lower_kernels`` turns every one of them into a TIR
kernel; none reaches the artifact.

| operator | arguments | attributes |
|---|---|---|
| ``dense`` | x, w ``[N, K]``, epilogue tensors | layer, epilogue |
| the same, converted | x, data, epilogue tensors | + format, block, weight (N, K) |
| ``sparse_dense`` | x, data, indices, indptr, partition, epilogue tensors | as above |
| ``attention`` | q, k, v, mask?, shape of the keys | heads, scale, mask |
| ``layer_norm`` | x, gamma, beta | epsilon |
| ``matmul`` | a, b, of any rank | axes: the stored axis of each logical one; right: shape of b |
| ``conv2d`` | x, data, indices or offsets, indptr?, partition?, epilogue tensors | conv, ... |
| ``depthwise_conv2d`` | x, w ``[channels, taps]``, epilogue tensors | layer, conv, epilogue |
| ``pack``, ``unpack`` | x | |
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

PREFIX = "sparse_tvm."


@dataclass(frozen=True)
class DialectCall:
    """A call of one of our operators, taken apart."""

    name: str
    args: list[Any]
    attributes: dict[str, Any]


def call(name: str, args: Sequence[Any], shape: Sequence[int], **attributes: Any) -> relax.Call:
    """Build a call that returns float32 of ``shape``."""
    text = tvm.ir.StringImm(json.dumps(attributes, sort_keys=True))
    return relax.call_dps_packed(
        PREFIX + name, relax.Tuple([*args, text]), relax.TensorType(tuple(shape), "float32")
    )


def match(expr: Any, *names: str) -> DialectCall | None:
    """Take a call of one of ``names`` (or of any of ours) apart, else None."""
    if not (
        isinstance(expr, relax.Call)
        and getattr(expr.op, "name", None) == "relax.call_dps_packed"
        and isinstance(expr.args[0], relax.ExternFunc)
        and expr.args[0].global_symbol.startswith(PREFIX)
    ):
        return None
    name = expr.args[0].global_symbol.removeprefix(PREFIX)
    if names and name not in names:
        return None
    *args, text = expr.args[1].fields
    return DialectCall(name, list(args), json.loads(text.value))
