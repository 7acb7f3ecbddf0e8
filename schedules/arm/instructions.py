"""Arm's low-precision instructions, one small function each, and their twins in plain arithmetic.

See :mod:`sparse_tvm.schedules.x86.instructions`: words are 32 bits, and vectors of them int32. Both
operands hold signed bytes here.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.dot_matmul import MultiplyAdd
from sparse_tvm.schedules.cpu.lane_tiles import Expr
from sparse_tvm.schedules.cpu.low_precision import words_like
from sparse_tvm.schedules.cpu.vector_math import lanes_of


def plain_sdot(acc: Expr, x: Expr, w: Expr) -> Expr:
    """The twin of ``sdot``: signed bytes of x by signed bytes of w."""
    lanes = lanes_of(acc)
    for byte in range(4):
        left, right = (T.shift_left(word, words_like(24 - 8 * byte, lanes)) for word in (x, w))
        down = words_like(24, lanes)
        acc = acc + T.shift_right(left, down) * T.shift_right(right, down)
    return acc


def sdot(acc: Expr, x: Expr, w: Expr) -> Expr:
    """``sdot``, with w by element where all its words are one element of a vector."""
    x, w = (T.reinterpret("int8x16", value) for value in (x, w))
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", acc, x, w)


MULTIPLY_ADD: dict[str, MultiplyAdd] = {"sdot": sdot, "plain-sdot": plain_sdot}
"""``(acc, x, w)`` to acc plus the products, by the name of a :class:`Dot`."""
