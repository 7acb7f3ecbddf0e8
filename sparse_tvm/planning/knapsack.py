"""Which option of each layer gives the least error within a budget: a multiple-choice knapsack.

Costs are rounded up to buckets of the budget, so a plan never costs more than it may; by dynamic
programming over layers, the least error is found for every budget up to the largest at once, which
is the frontier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

BUCKETS = 1 << 16
"""Into which the largest budget is cut: of a hundred layers, rounding takes less than a thousandth
of it, which is less than a hundredth of what is left when they are pruned furthest."""

_ROUNDING = 1e-9
"""By how much a cost may exceed a whole number of buckets and still be that many."""


@dataclass(frozen=True)
class Option:
    """One choice for one item.

    Attributes
    ----------
    cost : float
        In the unit of the budget; not negative.
    error : float
        What is to be small, summed over all items.
    """

    cost: float
    error: float


class Knapsack:
    """The best choices for every budget up to a largest one.

    Parameters
    ----------
    items : Sequence[Sequence[Option]]
        The options of each item, of which one is chosen.
    largest : float
        The largest budget that will be asked for; positive.
    buckets : int
        Into how many parts it is cut.
    """

    def __init__(
        self, items: Sequence[Sequence[Option]], largest: float, buckets: int = BUCKETS
    ) -> None:
        self._items, self._bucket, self._buckets = items, largest / buckets, buckets
        self._error = np.zeros(buckets + 1)
        self._chosen = [self._take(options) for options in items]

    def _take(self, options: Sequence[Option]) -> np.ndarray:
        """Add an item: the least error for each budget, and which option gives it."""
        errors = np.full((len(options), self._buckets + 1), np.inf)
        for row, option in zip(errors, options, strict=True):
            steps = self._steps(option.cost)
            if steps <= self._buckets:
                row[steps:] = self._error[: self._buckets + 1 - steps] + option.error
        chosen: np.ndarray = errors.argmin(axis=0).astype(np.int16)
        self._error = errors[chosen, np.arange(self._buckets + 1)]
        return chosen

    def _steps(self, cost: float) -> int:
        return ceil(cost / self._bucket - _ROUNDING)

    def best(self, budget: float) -> list[int] | None:
        """The index of each item's option for a budget; None if nothing fits it."""
        left = min(int(budget / self._bucket + _ROUNDING), self._buckets)
        if left < 0 or not np.isfinite(self._error[left]):
            return None
        found = []
        for options, chosen in zip(reversed(self._items), reversed(self._chosen), strict=True):
            index = int(chosen[left])
            found.append(index)
            left -= self._steps(options[index].cost)
        return found[::-1]

    def frontier(self) -> list[tuple[float, float]]:
        """Budgets, and the least error within each: those where it becomes less."""
        finite = np.isfinite(self._error)
        less = np.append(True, self._error[1:] < self._error[:-1])
        return [
            (float(at * self._bucket), float(self._error[at]))
            for at in np.flatnonzero(finite & less)
        ]
