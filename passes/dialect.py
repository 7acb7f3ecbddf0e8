"""How our operators stand in a Relax module between the passes.

Relax operators are registered in C++, so ours are written as calls of a named destination-passing
function, ``R.call_dps_packed("sparse_tvm.dense", (x, w, bias, attributes), out)``, with the
operator's fields as a JSON string in last place. :mod:`sparse_tvm.operators` defines them. A
backend's ``lower_kernels`` turns every one into a kernel; none reaches the artifact.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import tvm
from tvm import relax

from sparse_tvm.operators import Operator, from_json, operator_called, to_json
from sparse_tvm.passes.program import Program

PREFIX = "sparse_tvm."

Op = TypeVar("Op", bound=Operator)


@dataclass(frozen=True)
class OperatorCall(Generic[Op]):
    """A call of one of our operators, taken apart."""

    op: Op
    args: list[Any]


def call(
    op: Operator, args: Sequence[Any], shape: Sequence[Any], dtype: str | None = None
) -> relax.Call:
    """Build a call that returns a tensor of ``shape``.

    Its elements are of the operator's output type, unless they are packed as ``dtype``.
    """
    return _call(op, args, relax.TensorType(tuple(shape), dtype or op.types.output))


def call_several(
    op: Operator, args: Sequence[Any], shape: Sequence[Any], dtypes: Sequence[str]
) -> relax.Call:
    """Build a call that returns a tuple of tensors of one shape."""
    return call_results(op, args, [(shape, dtype) for dtype in dtypes])


def call_results(
    op: Operator, args: Sequence[Any], results: Sequence[tuple[Sequence[Any], str]]
) -> relax.Call:
    """Build a call that returns a tuple of tensors of these shapes and types."""
    return _call(op, args, [relax.TensorType(tuple(shape), dtype) for shape, dtype in results])


def _call(op: Operator, args: Sequence[Any], types: Any) -> relax.Call:
    text = tvm.ir.StringImm(json.dumps(to_json(op), sort_keys=True))
    return relax.call_dps_packed(PREFIX + op.name, relax.Tuple([*args, text]), types)


def match(expr: Any, kind: type[Op]) -> OperatorCall[Op] | None:
    """Take a call of an operator of this kind apart, else None."""
    if not (
        isinstance(expr, relax.Call)
        and getattr(expr.op, "name", None) == "relax.call_dps_packed"
        and isinstance(expr.args[0], relax.ExternFunc)
        and expr.args[0].global_symbol.startswith(PREFIX)
    ):
        return None
    name = expr.args[0].global_symbol.removeprefix(PREFIX)
    if not issubclass(operator_called(name), kind):
        return None
    *args, text = expr.args[1].fields
    op = from_json(name, json.loads(text.value))
    assert isinstance(op, kind)
    return OperatorCall(op, list(args))


def calls(program: Program, kind: type[Op]) -> Iterator[OperatorCall[Op]]:
    """All calls of operators of this kind in ``main``, in order."""
    for block in program.module["main"].body.blocks:
        for binding in block.bindings:
            found = match(binding.value, kind)
            if found is not None:
                yield found


def described(found: Iterable[OperatorCall[Any]]) -> Iterator[str]:
    """How calls are named in messages."""
    for one in found:
        layer = getattr(one.op, "layer", None)
        yield f"{one.op.name} {layer}" if layer else one.op.name
