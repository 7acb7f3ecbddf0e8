"""Arm's low-precision instructions, one small function each, and their twins in plain arithmetic.

See :mod:`sparse_tvm.schedules.x86.instructions`: words are 32 bits, and vectors of them int32. Both
operands hold signed bytes here, and the twin of ``bfdot`` is ``cpu.bf16_dot.plain_bf16_dot``.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.bf16_dot import plain_bf16_dot
from sparse_tvm.schedules.cpu.dot_products import MultiplyAdd
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


def bfdot(acc: Expr, x: Expr, w: Expr) -> Expr:
    """``bfdot``, with w by element likewise, in functions of its ``CODE``.

    It adds the sum of two products, rounded to odd, and takes numbers below 2**-126 for 0.
    """
    word = w.value if isinstance(w, tirx.Broadcast) else None
    if isinstance(word, tirx.Shuffle):
        ((vector,), (element,)) = word.vectors, word.indices
        name = f"{_BFDOT}_{lanes_of(vector)}_{int(element)}"
        return tirx.call_pure_extern("float32x4", name, acc, x, vector)
    return tirx.call_pure_extern("float32x4", _BFDOT, acc, x, w)


_BFDOT, _BFMMLA = "sparse_tvm_bfdot", "sparse_tvm_bfmmla"


def _of_words(name: str, intrinsic: str) -> str:
    """A product of vectors of bf16, given as words."""
    return f"""
declare <4 x float> @llvm.aarch64.neon.{intrinsic}(<4 x float>, <8 x bfloat>, <8 x bfloat>)
define linkonce_odr <4 x float> @{name}(<4 x float> %acc, <4 x i32> %x, <4 x i32> %w)
    alwaysinline nounwind {{
  %a = bitcast <4 x i32> %x to <8 x bfloat>
  %b = bitcast <4 x i32> %w to <8 x bfloat>
  %sum = call <4 x float> @llvm.aarch64.neon.{intrinsic}(
      <4 x float> %acc, <8 x bfloat> %a, <8 x bfloat> %b)
  ret <4 x float> %sum
}}
"""


def _by_element(lanes: int, element: int) -> str:
    """A product by one element of so many words: LLVM 22 would spread it by an instruction."""
    words = f"<{lanes} x i32>"
    return f"""
define linkonce_odr <4 x float> @{_BFDOT}_{lanes}_{element}(
    <4 x float> %acc, <4 x i32> %x, {words} %w) alwaysinline nounwind {{
  %sum = call <4 x float> asm "bfdot $0.4s, $2.8h, $3.2h[{element}]", "=w,0,w,w"(
      <4 x float> %acc, <4 x i32> %x, {words} %w)
  ret <4 x float> %sum
}}
"""


_ELEMENTS = [_by_element(lanes, element) for lanes in (2, 4) for element in range(lanes)]
CODE = {
    "bfdot": "".join([_of_words(_BFDOT, "bfdot.v4f32.v8bf16"), *_ELEMENTS]),
    "bfmmla": _of_words(_BFMMLA, "bfmmla"),
}
"""What kernels bring in LLVM's own words, by the name of a :class:`Dot`."""


# Products of pairs: two rows of words by two tokens, two words deep, to sums [row, token]


def plain_pairs(dot: MultiplyAdd) -> MultiplyAdd:
    """The twin of ``smmla`` or ``bfmmla``, given that of the dot product of as few bits."""

    def multiply_add(acc: Expr, x: Expr, w: Expr) -> Expr:
        for word in range(2):
            tokens = _picked(x, (word, 2 + word, word, 2 + word))
            acc = dot(acc, tokens, _picked(w, (word, word, 2 + word, 2 + word)))
        return acc

    return multiply_add


def _picked(words: Expr, places: tuple[int, ...]) -> Expr:
    return tirx.Shuffle([words], [tirx.const(place, "int32") for place in places])


def smmla(acc: Expr, x: Expr, w: Expr) -> Expr:
    """``smmla`` of signed bytes."""
    x, w = (T.reinterpret("int8x16", value) for value in (x, w))
    return T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.smmla.v4i32.v16i8", acc, w, x)


def bfmmla(acc: Expr, x: Expr, w: Expr) -> Expr:
    """``bfmmla``, which rounds as ``bfdot`` does, in a function of its ``CODE``."""
    return tirx.call_pure_extern("float32x4", _BFMMLA, acc, w, x)


MULTIPLY_ADD: dict[str, MultiplyAdd] = {
    "sdot": sdot,
    "bfdot": bfdot,
    "smmla": smmla,
    "bfmmla": bfmmla,
    "plain-sdot": plain_sdot,
    "plain-smmla": plain_pairs(plain_sdot),
    "plain-bfmmla": plain_pairs(plain_bf16_dot),
}
"""``(acc, x, w)`` to acc plus the products, by the name of a :class:`Dot`."""
