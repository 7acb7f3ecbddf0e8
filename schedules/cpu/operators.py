"""Operators that only the CPU backend has: in and out of its layouts, and onto caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_tvm.operators import Operator


@dataclass(frozen=True, kw_only=True)
class LanePack(Operator):
    """``[lead, rows, features]`` to lane tiles (see :mod:`sparse_tvm.schedules.cpu.lane_tiles`)."""

    name: ClassVar[str] = "lane_pack"
    operands: ClassVar[str] = "x"


@dataclass(frozen=True, kw_only=True)
class LaneUnpack(Operator):
    """Lane tiles to ``[lead, rows, features]``."""

    name: ClassVar[str] = "lane_unpack"
    operands: ClassVar[str] = "x"


@dataclass(frozen=True, kw_only=True)
class LineRound(Operator):
    """Lane tiles of float32 to lines of ``types.output``, by scales of their own if there are none.

    See :mod:`sparse_tvm.schedules.cpu.low_precision`.
    """

    name: ClassVar[str] = "line_round"
    operands: ClassVar[str] = "x, scale?, zero point?"


@dataclass(frozen=True, kw_only=True)
class AppendRows(Operator):
    """Tensors ``[lead, rows, size]`` behind each other along their rows."""

    name: ClassVar[str] = "append_rows"
    operands: ClassVar[str] = "x, ..."


@dataclass(frozen=True, kw_only=True)
class RotateHeads(Operator):
    """Heads out of ``[batch, rows, features]``, turned by rotary positions (arXiv:2104.09864).

    Of the first ``turned`` features of a head, each of the first half turns with that of the second
    half, ``a * cos - b * sin`` and ``b * cos + a * sin``; the others stay.

    Attributes
    ----------
    heads, size : int
        Heads, and features of one.
    first, stride : int
        The first feature of the first head in x, and from a head to the next.
    turned : int
        How many features of a head turn, of as many cosines and sines; 0 without such operands.
    """

    name: ClassVar[str] = "rotate_heads"
    operands: ClassVar[str] = "x, cos?, sin?"

    heads: int
    size: int
    first: int
    stride: int
    turned: int = 0
