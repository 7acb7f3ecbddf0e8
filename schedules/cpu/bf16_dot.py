"""The dot product of pairs of bf16, which every CPU that has one calls by a function of LLVM's.

TVM has no vectors of bf16: it would widen them. Kernels bring the functions that they call for
them in LLVM's own words.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import Expr
from sparse_tvm.schedules.cpu.low_precision import words_like
from sparse_tvm.schedules.cpu.vector_math import lanes_of


def plain_bf16_dot(acc: Expr, x: Expr, w: Expr) -> Expr:
    """The twin in plain arithmetic: the two halves of x by those of w, in float32."""
    lanes = lanes_of(acc)
    low = [T.shift_left(value, words_like(16, lanes)) for value in (x, w)]
    high = [T.bitwise_and(value, words_like(-0x10000, lanes)) for value in (x, w)]
    for factors in (low, high):
        a, b = (T.reinterpret(f"float32x{lanes}", value) for value in factors)
        acc = acc + a * b
    return acc


def with_code(kernel: tirx.PrimFunc, code: str | None) -> tirx.PrimFunc:
    """A kernel, and the functions that it calls, as LLVM writes them; None if it calls none."""
    if code is None:
        return kernel
    zero = tirx.const(0, "int32")
    return kernel.with_body(tirx.AttrStmt(zero, "pragma_import_llvm", code, kernel.body))
