"""What is known of how long a layer takes, as the choice of its layout asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sparse_tvm.operators import WeightedOperator
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.tuning.records import Condition, Records, Seconds, nearest
from sparse_tvm.tuning.schedule_records import Chosen


@dataclass(frozen=True)
class Measured:
    """Layouts of one layer that were measured under the same conditions.

    Attributes
    ----------
    conditions : dict[int, list[Condition]]
        Under which ones, by the number of tokens that they stand for; a number is missing where
        nothing near it was measured.
    seconds : dict[Layout, dict[Condition, float]]
        Of every layout that was measured under all of these.
    shipped : bool
        Whether by records that come with the package.
    """

    conditions: dict[int, list[Condition]]
    seconds: Seconds
    shipped: bool = False


@dataclass(frozen=True)
class Evidence:
    """Records, and how the model is to run.

    Attributes
    ----------
    records : Records
        What was measured; nothing by default.
    threads : int | None
        On how many threads the layers will run; None for any number that was measured.
    shipped : Records
        Those that come with the package: for layers of which the others know nothing.
    """

    records: Records = field(default_factory=Records)
    threads: int | None = None
    shipped: Records = field(default_factory=Records)

    def of(
        self, op: WeightedOperator, weight: WeightStatistics, target: str, tokens: Sequence[int]
    ) -> Measured | None:
        """What was measured of such a layer, of dense layouts and of others, or None."""
        for records in (self.records, self.shipped):
            measured = self._of(records, op, weight, target, tokens)
            if measured is not None:
                return replace(measured, shipped=records is self.shipped)
        return None

    def _of(
        self,
        records: Records,
        op: WeightedOperator,
        weight: WeightStatistics,
        target: str,
        tokens: Sequence[int],
    ) -> Measured | None:
        seconds = records.seconds(op, weight, target)
        dense = [found for layout, found in seconds.items() if not layout.sparse]
        known = {condition for found in dense for condition in found}
        threads = {condition.threads for condition in known}
        if self.threads in threads:
            known = {condition for condition in known if condition.threads == self.threads}
        conditions: dict[int, list[Condition]] = {}
        for count in tokens:
            near = nearest(count, {condition.tokens for condition in known})
            if near is not None:
                conditions[count] = sorted(c for c in known if c.tokens == near)
        needed = {condition for column in conditions.values() for condition in column}
        complete = {layout: s for layout, s in seconds.items() if needed <= s.keys()}
        if not needed or all(layout.sparse for layout in complete):
            return None
        return Measured(conditions, complete)

    def schedule(self, function: str, target: str) -> Chosen | None:
        """The best schedule of an operator without a kernel, by its fingerprint, if measured."""
        return self.records.schedules.choose(function, target, self.threads)
