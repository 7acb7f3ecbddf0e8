"""Operators whose results say how much of them counts: that is known when the data is.

Each returns tensors as long as they could become, and in ``count``, of one element, how many of
their first elements are there. What comes after reads those only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_tvm.operators.base import Operator


@dataclass(frozen=True, kw_only=True)
class SelectNonzero(Operator):
    """Where ``x``, taken as a vector, is not zero: positions int64 ``[size of x]``, count."""

    name: ClassVar[str] = "select_nonzero"
    operands: ClassVar[str] = "x"


@dataclass(frozen=True, kw_only=True)
class SuppressBoxes(Operator):
    """Boxes of the best scores, without those that overlap a better one: NonMaxSuppression.

    Of boxes ``[batch, N, 4]`` and scores ``[batch, classes, N]``, this returns rows of batch, class
    and box, int64 ``[batch * classes * most, 3]``, and
    count. The other operands have one element
    each; the last is -inf where all scores will do.

    Attributes
    ----------
    centred : bool
        Boxes are centre and size, ``x, y, width, height``; otherwise two opposite corners.
    most : int | None
        At most so many boxes of a class, where that is known; N if it is not.
    """

    name: ClassVar[str] = "suppress_boxes"
    operands: ClassVar[str] = "boxes, scores, most boxes of a class, overlap, least score"

    centred: bool = False
    most: int | None = None


@dataclass(frozen=True, kw_only=True)
class UniqueRows(Operator):
    """The different rows of ``x`` ``[rows, size]``.

    Returns the row where each is first, which of them each row is, and how many rows are each, all
    int64 ``[rows]``, and count.

    Attributes
    ----------
    ascending : bool
        In order of their elements; otherwise in that in which they come.
    """

    name: ClassVar[str] = "unique_rows"
    operands: ClassVar[str] = "x"

    ascending: bool = True


@dataclass(frozen=True, kw_only=True)
class HoldSize(Operator):
    """A size that depends on data, int64 ``[1]``, once it is held to be as large as is needed.

    Running ends with an ``InputError`` where it is not.

    Attributes
    ----------
    least : int
        The smallest size that will do.
    reader : str
        What needs it, for the error.
    """

    name: ClassVar[str] = "hold_size"
    operands: ClassVar[str] = "size"

    least: int
    reader: str


@dataclass(frozen=True, kw_only=True)
class LargestElements(Operator):
    """The largest or smallest elements along an axis, in order, and their indices.

    How many is known by the shape of the result.
    """

    name: ClassVar[str] = "largest_elements"
    operands: ClassVar[str] = "x"

    axis: int
    largest: bool = True
