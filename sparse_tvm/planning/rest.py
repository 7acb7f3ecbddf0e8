"""What is no layer, estimated: how long it takes on a target that is not there to be measured.

Every call of the program that multiplies with no weight reads its operands and writes its result
once, from the second cache; products of activations, as in attention, do their multiply-adds at
half of the peak. It is a rough figure: where the target is at hand, planning measures.
"""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import relax

from sparse_tvm.operators import Attention, WeightedOperator
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite
from sparse_tvm.passes.program import Program
from sparse_tvm.targets import Target

_VIEWS = {"relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten"}
_LOOKS_UP = {"relax.take", "relax.gather_nd", "relax.gather_elements"}
_REACHED = 0.5
"""Share of the peak that products of activations reach."""


def rest_seconds(program: Program, target: Target) -> float:
    """Seconds on one core of all but the layers, of a program before its weights are stored."""
    costs = target.costs
    cycles = 0.0
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
        cycles += 4 * (read + output) / costs.second
        attention = dialect.match(value, Attention)
        if attention is not None:
            rows = prod(_shape(operands[1])[:-1]) // max(1, prod(_shape(operands[1])[:-2]))
            multiplications = 2.0 * output * rows
            cycles += multiplications / target.lanes * costs.fma / _REACHED
    return target.seconds(cycles)


def _of_ours(call: relax.Call) -> bool:
    return getattr(call.op, "name", "") == "relax.call_dps_packed"


def _shape(value: Any) -> tuple[int, ...]:
    found = getattr(value, "ty", None)
    if not isinstance(found, relax.TensorType) or found.shape is None:
        return (0,)
    return tuple(int(dim) for dim in found.shape.values)


def _elements(value: Any) -> int:
    return prod(_shape(value))
