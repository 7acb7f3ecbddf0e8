"""The calls of a model whose kernels have several forms, to be tuned as operators without one are.

They have no weight, and what decides their time are extents: those of the call, or, where run time
decides, those of as many tokens as are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tvm import relax, tirx
from tvm_ffi import structural_walk

from sparse_tvm.families import TYPICAL_TOKENS
from sparse_tvm.operators import Attention, Operator
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.lower_kernels import extents_of, tensor_extents
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.simd import LANES
from sparse_tvm.tuning.forms import KernelCall
from sparse_tvm.tuning.layer_kernel import sizes_known
from sparse_tvm.tuning.rest_operator import RestOperator
from sparse_tvm.tuning.runner import CAUSAL, Argument

_SMALL = 3
"""What random whole numbers are below."""

_MASK = 3
"""The operand of attention that is its mask."""


def kernel_calls(
    program: Program, context: Context, tokens: Sequence[int] | None
) -> list[RestOperator]:
    """Calls of kernels in several forms, in a program whose kernels are not built yet.

    Parameters
    ----------
    tokens : Sequence[int] | None
        For how many, where run time decides; None for usual numbers of more than a lane tile, for
        fewer do not tell forms apart.
    """
    counts = tokens or [count for count in TYPICAL_TOKENS if count > LANES]
    found: dict[tuple[str, int | None], RestOperator] = {}
    for binding in Rewrite(program).graph.bindings:
        match = dialect.match(binding.value, Operator)
        if match is None or isinstance(binding.var.ty, relax.TupleType):
            continue
        operands, output = [extents_of(arg) for arg in match.args], tensor_extents(binding.var.ty)
        call = KernelCall(match.op, operands, output)
        family = context.backend.family_for(match.op, context.target)
        if len(call.forms(family, context.target)) == 1:
            continue
        title = family.build(match.op, operands, output, context.target).title
        lead, others = _symbols(match.args, binding.var)
        for count in counts if lead | others else (None,):
            sizes = {**dict.fromkeys(others, count or 1), **dict.fromkeys(lead, 1)}
            key = call.fingerprint, count
            if key not in found:
                arguments = _arguments(match, binding.var, sizes)
                elements = sum(_elements(one) for one in arguments)
                found[key] = RestOperator(
                    title, call.text, call.fingerprint, 0, elements, count, arguments
                )
            found[key].calls += 1
    return list(found.values())


def _symbols(operands: Sequence[Any], output: Any) -> tuple[set[Any], set[Any]]:
    """What extents depend on that run time knows: the first one of the output, and others."""
    first, *rest = output.ty.shape.values
    lead = _in([first])
    others = _in(rest).union(*(_in(_dims(operand)) for operand in operands))
    return lead, others - lead


def _in(dims: Sequence[Any]) -> set[Any]:
    found: set[Any] = set()
    for dim in dims:
        structural_walk(dim, (tirx.Var, found.add))
    return found


def _dims(operand: Any) -> Sequence[Any]:
    shape = operand if isinstance(operand, relax.ShapeExpr) else operand.ty.shape
    return list(shape.values)


def _arguments(
    match: dialect.OperatorCall[Operator], output: Any, sizes: dict[Any, int]
) -> list[Argument]:
    """What the kernel is called with at these sizes."""
    known = sizes_known(sizes)

    def all_arguments() -> Iterator[Argument]:
        for place, operand in enumerate([*match.args, output]):
            dims = _dims(operand)
            numbers = [int(known.simplify(dim)) for dim in dims]
            if isinstance(operand, relax.ShapeExpr):  # those known are in the kernel already
                for dim, number in zip(dims, numbers, strict=True):
                    if not isinstance(dim, tirx.IntImm):
                        yield number
            else:
                values = CAUSAL if _hides(match.op, place) else _SMALL
                yield [numbers, str(operand.ty.dtype), values]

    return list(all_arguments())


def _hides(op: Operator, place: int) -> bool:
    """Whether an operand may well be a causal mask: of queries, and of all heads alike, which a
    bias is not."""
    if not isinstance(op, Attention) or op.mask is None or place != _MASK:
        return False
    _, heads, queries, keys = op.mask
    return queries and keys and not heads


def _elements(argument: Argument) -> int:
    if not isinstance(argument, list):
        return 0
    count = 1
    for size in argument[0]:
        count *= size
    return count
