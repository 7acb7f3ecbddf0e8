"""What choosing a weight's layout needs to know of it: measured, or assumed before there is one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from sparse_tvm.sparsity.analysis import Structure, analyse, density_map
from sparse_tvm.sparsity.formats import occupied_blocks
from sparse_tvm.sparsity.sliced import steps_per_slot, window_steps

TYPICAL_COPIES = 12.0
"""How many weights of a layer's size a model has: as many as an encoder has layers."""


class WeightStatistics(ABC):
    """The zeros of one ``[N, K]`` weight, as kernel families ask about them.

    Attributes
    ----------
    shape : tuple[int, int]
        ``(N, K)``.
    copies : float
        How many weights of its size the model goes through before it reads this one again: which
        cache still has it then.
    """

    shape: tuple[int, int]
    copies: float = TYPICAL_COPIES

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """Share of zeros, 0 to 1."""

    @property
    @abstractmethod
    def block(self) -> tuple[int, int] | None:
        """The largest block (rows, columns) that the zeros follow, if any larger than a value."""

    @property
    def n_m(self) -> tuple[int, int] | None:
        """``(N, M)`` where at most N of any M neighbours in a row are not 0, by design."""
        return None

    @abstractmethod
    def stored_blocks(self, block: tuple[int, int]) -> int:
        """How many blocks of this size, laid from the first corner, hold a value other than 0."""

    def window_steps(self, lanes: int) -> int:
        """How many steps sliced rows take; here, were the values at random places.

        See :class:`sparse_tvm.sparsity.sliced.SlicedRows`.
        """
        n, k = self.shape
        return round(steps_per_slot(round(1 - self.sparsity, 2), lanes) * -(-n // lanes) * k)

    @property
    def nonzeros(self) -> int:
        """Number of values other than 0."""
        return round((1 - self.sparsity) * self.shape[0] * self.shape[1])


class MeasuredWeight(WeightStatistics):
    """The zeros of a weight that is there."""

    def __init__(self, w: np.ndarray, copies: float = TYPICAL_COPIES) -> None:
        self.shape, self.copies = (int(w.shape[0]), int(w.shape[1])), copies
        self._mask = w != 0
        self._stored: dict[tuple[int, int], int] = {}
        self._steps: dict[int, int] = {}

    @cached_property
    def structure(self) -> Structure:
        """What analysis finds in it."""
        return analyse(self._mask)

    @property
    def density(self) -> np.ndarray:
        """Where its non-zeros are; see :func:`sparse_tvm.sparsity.analysis.density_map`."""
        return density_map(self._mask)

    @property
    def sparsity(self) -> float:
        return self.structure.sparsity

    @property
    def block(self) -> tuple[int, int] | None:
        return self.structure.block

    @property
    def n_m(self) -> tuple[int, int] | None:
        return self.structure.n_m

    @property
    def nonzeros(self) -> int:
        return self.structure.nnz

    def stored_blocks(self, block: tuple[int, int]) -> int:
        if block not in self._stored:
            self._stored[block] = int(np.count_nonzero(occupied_blocks(self._mask, block)))
        return self._stored[block]

    def window_steps(self, lanes: int) -> int:
        if lanes not in self._steps:
            self._steps[lanes] = window_steps(self._mask, lanes)
        return self._steps[lanes]


@dataclass(frozen=True)
class AssumedWeight(WeightStatistics):
    """The zeros of a weight as pruning would leave them, for a plan made before pruning.

    Attributes
    ----------
    shape : tuple[int, int]
        ``(N, K)``.
    share : float
        Share of zeros, 0 to 1.
    structure : tuple[int, int]
        Blocks that are zero as a whole, at random places.
    neighbours : tuple[int, int] | None
        ``(N, M)`` where pruning keeps N of every M neighbours.
    """

    shape: tuple[int, int]
    share: float
    structure: tuple[int, int] = (1, 1)
    neighbours: tuple[int, int] | None = None

    @property
    def n_m(self) -> tuple[int, int] | None:
        return self.neighbours

    @property
    def sparsity(self) -> float:
        return self.share

    @property
    def block(self) -> tuple[int, int] | None:
        return None if self.structure == (1, 1) else self.structure

    def stored_blocks(self, block: tuple[int, int]) -> int:
        by_rows, by_columns = map(_overlaps, self.shape, block, self.structure)
        expected = sum(
            rows * columns * (1 - self.share ** (r * c))
            for r, rows in by_rows.items()
            for c, columns in by_columns.items()
        )
        return round(expected)


@cache
def _overlaps(extent: int, size: int, pruned: int) -> Counter[int]:
    """How many stored blocks lie over how many pruned ones, along one axis."""
    starts = range(0, extent, size)
    ends = [min(start + size, extent) for start in starts]
    spans = zip(starts, ends, strict=True)
    return Counter((end - 1) // pruned - start // pruned + 1 for start, end in spans)
