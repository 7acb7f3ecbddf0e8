"""Shifts of bits, by as many as there are bits and more, too: processors disagree about those."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.frontends.importer.operators.elementwise import on_tensors
from sparse_tvm.frontends.importer.rules import Node, rule


@rule("BitShift")
def _bit_shift(node: Node) -> Any:
    """By too many bits, or negative ones, all is lost but copies of the sign."""
    right = node.attributes["direction"] == b"RIGHT"
    return on_tensors(node, _right if right else _left)


def _left(value: relax.Expr, count: relax.Expr) -> relax.Expr:
    dtype = str(value.ty.dtype)
    zero, most = relax.const(0, dtype), relax.const(_bits(dtype) - 1, dtype)
    far = _far(count, most)
    shifted = relax.op.left_shift(value, relax.op.where(far, zero, count))
    return relax.op.where(far, zero, shifted)


def _right(value: relax.Expr, count: relax.Expr) -> relax.Expr:
    dtype = str(value.ty.dtype)
    zero, most = relax.const(0, dtype), relax.const(_bits(dtype) - 1, dtype)
    far = _far(count, most)
    shifted = relax.op.right_shift(value, relax.op.where(far, most, count))
    return relax.op.where(far, zero, shifted) if dtype.startswith("uint") else shifted


def _bits(dtype: str) -> int:
    return np.dtype(dtype).itemsize * 8


def _far(count: relax.Expr, most: relax.Expr) -> relax.Expr:
    """Whether a count is that of no bit."""
    zero = relax.const(0, str(count.ty.dtype))
    return relax.op.logical_or(relax.op.less(count, zero), relax.op.greater(count, most))
