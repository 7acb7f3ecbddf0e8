"""What is no layer, estimated: how long it takes on a target that is not there to be measured.

Every call of the program that multiplies with no weight reads its operands and writes its result
once, from the second cache; products of activations, as in attention, do their multiply-adds at
half of the peak. It is a rough figure: where the target is at hand, planning measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm import ir, relax

from sparse_tvm.operators import Attention, WeightedOperator
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.program import Program

_VIEWS = {"relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten"}
_LOOKS_UP = {"relax.take", "relax.gather_nd", "relax.gather_elements"}
_MATMUL = ir.Op.get("relax.matmul")


def rest_seconds(program: Program, context: Context) -> float | None:
    """Seconds on one core of all but the layers, of a program before its weights are stored.

    None where the backend knows nothing of them.
    """
    total = 0.0
    for binding in Rewrite(program).graph.bindings:
        value = binding.value
        if not isinstance(value, relax.Call) or dialect.match(value, WeightedOperator):
            continue
        name = getattr(value.op, "name", "")
        if name in _VIEWS:
            continue
        output = _elements(binding.var)
        operands = list(value.args[1].fields if _of_ours(value) else value.args)
        read = output if name in _LOOKS_UP else sum(map(_elements, operands))
        multiplications = output * _products(value, operands)
        seconds = context.backend.other_seconds(read + output, multiplications, context.target)
        if seconds is None:
            return None
        total += seconds
    return total


def _products(call: relax.Call, operands: Sequence[Any]) -> float:
    """Multiplications for each element of a call's output."""
    if dialect.match(call, Attention) is not None:
        rows = prod(_shape(operands[1])[:-1]) // max(1, prod(_shape(operands[1])[:-2]))
        return 2.0 * rows
    return float(_shape(operands[0])[-1]) if call.op == _MATMUL else 0.0


def _of_ours(call: relax.Call) -> bool:
    return getattr(call.op, "name", "") == "relax.call_dps_packed"


def _shape(value: Any) -> tuple[int, ...]:
    found = getattr(value, "ty", None)
    if not isinstance(found, relax.TensorType) or found.shape is None:
        return (0,)
    return tuple(int(dim) for dim in found.shape.values)


def _elements(value: Any) -> int:
    return prod(_shape(value))
