"""Dot product instructions of words, as packing, costs and kernels see those of any CPU.

Needs no TVM.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparse_tvm.schedules.cpu.precision import INT8, Precision
from sparse_tvm.schedules.cpu.simd import LANES
from sparse_tvm.targets import Target


@dataclass(frozen=True)
class Dot:
    """A dot product instruction of bytes, or of pairs of bf16.

    Attributes
    ----------
    name : str
        For layouts and titles of kernels.
    lanes : int
        Words in a vector.
    registers : int
        Vector registers.
    features : tuple[str, ...]
        What a CPU must have, by LLVM's names.
    cycles : float or None
        For sixteen words; None where they take as long as float32 multiply-adds of as many bits.
    largest_weight : int
        The magnitude of the weights that it multiplies exactly.
    signed : bool
        Whether it takes the zero point off x; else the product of the zero point and the weights
        is left to subtract.
    halves : bool
        Whether each word of the weight is two, its even bytes and its odd ones in 16 bits each.
    gathered : float
        Cycles that a line of x takes longer from the second cache than from the first, where that
        is known to be more than in float32 kernels.
    precision : Precision
        What a word holds: int8 is summed up in int32, bf16 in float32.
    depth : int
        Lines that it multiplies: with 2 it is of pairs of rows and of tokens, and does twice as
        much at once.
    """

    name: str
    lanes: int
    registers: int
    features: tuple[str, ...]
    cycles: float | None
    largest_weight: int = 128
    signed: bool = False
    halves: bool = False
    gathered: float = 0.0
    precision: Precision = INT8
    depth: int = 1

    def cycles_on(self, target: Target) -> float:
        """Cycles of a target for sixteen words."""
        return self.cycles or LANES / self.lanes * target.costs.fma / self.depth
