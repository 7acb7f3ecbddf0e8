"""Division and its remainder. What integers have no quotient for is 0: it must not end a process.

Processors trap where an integer is divided by 0, and where the lowest one is divided by -1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

from sparse_tvm.frontends.importer.operators.elementwise import elementwise, on_tensors
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.tensors import Tensor


@rule("Div")
def _div(node: Node) -> Any:
    """Quotients of integers are rounded towards zero."""
    if node.form is not Tensor:
        return elementwise(node)
    return on_tensors(node, None if _is_float(node) else _quotient)


@rule("Mod")
def _mod(node: Node) -> Any:
    """The remainder has the divisor's sign, or with ``fmod`` the dividend's."""
    if node.form is not Tensor:
        return elementwise(node)
    truncated = bool(node.attributes.get("fmod", 0))
    if not _is_float(node):
        return on_tensors(node, _remainder(truncated))
    remainder = on_tensors(node, relax.op.mod)
    if truncated:
        return remainder
    return node.emit(_with_sign_of(remainder.value, node.tensor(1)))


def _is_float(node: Node) -> bool:
    return node.dtype(0).startswith("float")


def _with_sign_of(remainder: relax.Expr, divisor: relax.Expr) -> relax.Expr:
    zero = relax.const(0.0, remainder.ty.dtype)
    differ = relax.op.logical_xor(relax.op.less(remainder, zero), relax.op.less(divisor, zero))
    wrong = relax.op.logical_and(differ, relax.op.not_equal(remainder, zero))
    return relax.op.where(wrong, relax.op.add(remainder, divisor), remainder)


def _quotient(left: relax.Expr, right: relax.Expr) -> relax.Expr:
    traps = _traps(right)
    if traps is None:
        return relax.op.divide(left, right)
    # Chosen by multiplying: inside of a choice TVM would drop the same condition on the divisor.
    dtype = str(right.ty.dtype)
    one, zero = relax.const(1, dtype), relax.const(0, dtype)
    sign = one if dtype.startswith("uint") else relax.op.where(traps, relax.op.negative(one), one)
    factor = relax.op.where(relax.op.equal(right, zero), zero, sign)
    return relax.op.multiply(relax.op.divide(left, relax.op.where(traps, one, right)), factor)


def _remainder(truncated: bool) -> Callable[..., relax.Expr]:
    operator = _truncated_remainder if truncated else relax.op.floor_mod

    def apply(left: relax.Expr, right: relax.Expr) -> relax.Expr:
        traps = _traps(right)
        if traps is not None:  # by 1 it leaves 0, too
            right = relax.op.where(traps, relax.const(1, str(right.ty.dtype)), right)
        return operator(left, right)

    return apply


def _traps(divisor: relax.Expr) -> relax.Expr | None:
    """Where a divisor is 0 or -1; None if it never is."""
    dtype = str(divisor.ty.dtype)
    numbers = (0,) if dtype.startswith("uint") else (0, -1)
    if isinstance(divisor, GenericConst) and not np.isin(divisor.value.numpy(), numbers).any():
        return None
    equal = [relax.op.equal(divisor, relax.const(number, dtype)) for number in numbers]
    return reduce(relax.op.logical_or, equal)


def _truncated_remainder(left: relax.Expr, right: relax.Expr) -> relax.Expr:
    return relax.op.subtract(left, relax.op.multiply(relax.op.divide(left, right), right))
