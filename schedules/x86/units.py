"""x86's units for numbers of few bits: what they need of a CPU, and what they cost.

Needs no TVM; :mod:`sparse_tvm.schedules.x86.instructions` has the instructions.
"""

from __future__ import annotations

from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.precision import BF16

TILE_ROWS = 16
"""Rows of a tile register, and lines of one."""

AMX_FEATURES = ("amx-tile", "amx-int8", "amx-bf16", "avx512vbmi2", "avx512bw", "avx512vl")

AMX_RATE = 8.0
"""Words that AMX multiplies while AVX-512 multiplies one float32: 256 a cycle, and 32."""


_BF16_FEATURES = ("avx512bf16", "avx512vl", "avx512bw")

AVX512_VNNI = Dot("avx512vnni", 16, 32, ("avx512vnni", "avx512vl", "avx512bw"), None)
AVX512_BF16 = Dot("avx512bf16", 16, 32, _BF16_FEATURES, None, precision=BF16)
AVX_VNNI = Dot("avxvnni", 8, 16, ("avxvnni", "avx2"), 1.1)
AVX2 = Dot("avx2", 8, 16, ("avx2",), 2.2, largest_weight=64, gathered=2.8)
AVX2_SIGNED = Dot(
    "avx2-signed", 8, 16, ("avx2",), 3.3, largest_weight=127, signed=True, gathered=2.8
)
SSSE3 = Dot("ssse3", 4, 16, ("ssse3",), 4.4, largest_weight=64)
SSSE3_SIGNED = Dot("ssse3-signed", 4, 16, ("ssse3",), 6.6, largest_weight=127, signed=True)
AVX2_HALVES = Dot("avx2-halves", 8, 16, ("avx2",), 3.0, halves=True)
SSE2_HALVES = Dot("sse2-halves", 4, 16, ("ssse3",), 6.0, halves=True)
IMAGE_DOTS = (AVX512_VNNI, AVX_VNNI, AVX2_HALVES, SSE2_HALVES)
"""Of dense convolutions, exact for all bytes, the fastest first."""

SPARSE_IMAGE_DOTS = (AVX512_VNNI, AVX_VNNI, AVX2, SSSE3)
"""Of sparse ones, where a word with too large a pair of weights is stored as two."""

DOTS = (AVX512_VNNI, AVX512_BF16, AVX_VNNI, AVX2, AVX2_SIGNED, SSSE3, SSSE3_SIGNED)
"""The fastest first: those with smaller weights lose a bit of them, and are half as fast again."""
