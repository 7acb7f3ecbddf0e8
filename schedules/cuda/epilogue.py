"""What happens to a layer's sums before they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, sqrt
from typing import Any

from tvm import tirx

from sparse_tvm.operators import Activation, Epilogue
from sparse_tvm.schedules.cuda.storage import as_type

Expr = Any


def epilogue_value(
    total: Expr, epilogue: Epilogue, operands: Sequence[Expr], dtype: str, stored: str | None = None
) -> Expr:
    """The output for a sum in float32; ``operands`` are elements of what the steps read.

    ``stored`` is the type that the output of type ``dtype`` ends up in, where that is another.
    """
    rest = iter(operands)
    for step in epilogue:
        if isinstance(step, Activation):
            total = _activated(total, step.function, (stored or dtype) != "float32")
        else:
            total = total + tirx.Cast("float32", next(rest))
    return as_type(total, dtype) if dtype != "float32" else total


def _activated(x: Expr, function: str, short: bool) -> Expr:
    one = tirx.const(1.0, "float32")
    if function == "relu":
        return tirx.max(x, tirx.const(0.0, "float32"))
    if function == "gelu" and short:
        return tirx.call_extern("float32", "stvm_gelu", x)
    if function == "gelu":
        error = tirx.call_extern("float32", "stvm_erf", x * tirx.const(sqrt(0.5), "float32"))
        return x * (error + one) * 0.5
    if function == "gelu_tanh":
        inner = tirx.const(sqrt(2 / pi), "float32") * (x + 0.044715 * x * x * x)
        return x * (tirx.tanh(inner) + one) * 0.5
    if function == "silu":
        return x / (one + tirx.exp(-x))
    if function == "sigmoid":
        return one / (one + tirx.exp(-x))
    assert function == "tanh"
    return tirx.tanh(x)
