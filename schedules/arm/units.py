"""Arm's units for numbers of few bits: what they need of a CPU, and what they cost.

Needs no TVM; :mod:`sparse_tvm.schedules.arm.instructions` has the instructions.
"""

from __future__ import annotations

from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.precision import BF16

SDOT = Dot("sdot", 4, 32, ("dotprod",), None)
BFDOT = Dot("bfdot", 4, 32, ("bf16",), None, precision=BF16)
SMMLA = Dot("smmla", 4, 32, ("i8mm",), None, depth=2)
BFMMLA = Dot("bfmmla", 4, 32, ("bf16",), None, precision=BF16, depth=2)
DOTS = (SDOT, BFDOT, SMMLA, BFMMLA)
