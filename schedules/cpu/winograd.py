"""Winograd's minimal filtering along the columns of an image: matrices, and how rows are cut.

Of ``m`` neighbouring outputs of a filter of three taps, a direct sum takes ``3 m`` products, this
``m + 2``: ``y = A ((G g) * (B d))``, with ``d`` the ``m + 2`` inputs and ``g`` the taps (Lavin and
Gray, arXiv:1509.09308). The matrices are Toom's and Cook's, of polynomials at ``m + 1`` points and
at infinity; errors grow with ``m`` and with how far points are from one (Barabasz et al.,
arXiv:1803.10986).

It is applied to the three taps of each column of a 3x3 kernel, one column at a time: vectors then
are of neighbouring pixels throughout, where tiles in two dimensions would be taken apart and put
together by shuffles.

Needs no TVM for numbers; extents may be symbols of TVM's, which calculate alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import prod
from typing import Any

import numpy as np

from sparse_tvm.schedules.cpu.planes import Extent

TAPS = 3
"""Of a column of the kernel."""

_POINTS = tuple(map(Fraction, ("0", "1", "-1", "1/2", "-2", "-1/2")))
"""Where polynomials are evaluated; fewer outputs want the first of them only."""

OUTPUTS = range(2, len(_POINTS))
"""How many rows may be computed together."""


@dataclass(frozen=True)
class Transforms:
    """The matrices for ``m`` outputs.

    Attributes
    ----------
    weight : np.ndarray
        G, ``[m + 2, 3]``, float64.
    input, output : tuple of rows
        B, ``[m + 2, m + 2]``, and A, ``[m, m + 2]``.
    """

    weight: np.ndarray
    input: tuple[tuple[float, ...], ...]
    output: tuple[tuple[float, ...], ...]


@cache
def transforms(outputs: int) -> Transforms:
    """The matrices for so many outputs."""
    points = _POINTS[: outputs + 1]
    scales = [prod((p - q for q in points if q != p), start=Fraction(1)) for p in points]
    infinity = [Fraction(0)] * (TAPS - 1) + [Fraction(1)]
    weight = [[p**k / scale for k in range(TAPS)] for p, scale in zip(points, scales, strict=True)]
    rows = [[*_polynomial(q for q in points if q != p), Fraction(0)] for p in points]
    output = [
        [*(p**row for p in points), Fraction(int(row == outputs - 1))] for row in range(outputs)
    ]
    return Transforms(
        np.array([*weight, infinity], np.float64),
        tuple(tuple(map(float, row)) for row in (*rows, _polynomial(points))),
        tuple(tuple(map(float, row)) for row in output),
    )


def _polynomial(roots: Iterable[Fraction]) -> list[Fraction]:
    """Coefficients, from the constant on, of the polynomial with these roots."""
    found = [Fraction(1)]
    for root in roots:
        found = [
            (found[i - 1] if i else Fraction(0)) - root * (found[i] if i < len(found) else 0)
            for i in range(len(found) + 1)
        ]
    return found


@dataclass(frozen=True)
class Bands:
    """How the rows of an output are cut into bands, and each row into vectors.

    Attributes
    ----------
    height, width : int or expression
        Of the output.
    outputs : int
        Rows of a band.
    lanes : int
        Elements of a vector.
    """

    height: Extent
    width: Extent
    outputs: int
    lanes: int

    @property
    def points(self) -> int:
        """Rows of a transformed band."""
        return self.outputs + TAPS - 1

    @property
    def count(self) -> Extent:
        """Number of bands; the last one may be partial."""
        return (self.height + (self.outputs - 1)) // self.outputs

    @property
    def span(self) -> Extent:
        """Elements of a row that vectors cover."""
        if isinstance(self.width, int):
            return max(self.width, self.lanes)
        from tvm import tirx

        return tirx.max(self.width, self.lanes)

    @property
    def read_span(self) -> Extent:
        """Elements of a transformed row, which has columns for all taps."""
        return self.span + (TAPS - 1)

    @property
    def vectors(self) -> Extent:
        """Vectors of a row."""
        return self._vectors(self.span)

    @property
    def read_vectors(self) -> Extent:
        """Vectors of a transformed row."""
        return self._vectors(self.read_span)

    def _vectors(self, elements: Extent) -> Extent:
        return (elements + (self.lanes - 1)) // self.lanes

    @property
    def pitch(self) -> Extent:
        """Elements from one transformed row to the next."""
        return self.read_vectors * self.lanes

    def start_of(self, vector: Any, elements: Extent) -> Any:
        """Where the vector with this number begins, an expression: the last one ends the row."""
        from tvm import tirx

        return tirx.min(vector * self.lanes, elements - self.lanes)
