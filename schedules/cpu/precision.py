"""Number formats of few bits, and how activations of them are laid out in lines of words.

Needs no TVM: kernels, families and packing ask here. The layout is described in
:mod:`sparse_tvm.schedules.cpu.low_precision`.
"""

from __future__ import annotations

from dataclasses import dataclass

LINES = 16
"""Lines that a matrix unit multiplies at once."""

HEAD_STEP = 32
"""Features of an attention's head, and keys, come in steps of a bf16 tile's columns."""

ZERO_POINT = 128
"""How an int8 activation of 0 is stored where dot products take unsigned bytes."""


@dataclass(frozen=True)
class Precision:
    """A number format of weights and activations that are multiplied.

    Attributes
    ----------
    name : str
        As users spell it.
    dtype : str
        Of one element.
    unit : int
        Features in a word of 32 bits.
    """

    name: str
    dtype: str
    unit: int

    @property
    def scaled(self) -> bool:
        """Whether tiles end with a line of scales."""
        return self.name == "int8"

    def data_lines(self, features: int) -> int:
        """Lines of a tile that hold features or padding."""
        step = LINES * self.unit
        return -(-features // step) * LINES

    def lines(self, features: int) -> int:
        """All lines of a tile."""
        return self.data_lines(features) + (1 if self.scaled else 0)


INT8 = Precision("int8", "int8", 4)
BF16 = Precision("bf16", "bfloat16", 2)
PRECISIONS = {precision.dtype: precision for precision in (INT8, BF16)}
"""By element type."""
