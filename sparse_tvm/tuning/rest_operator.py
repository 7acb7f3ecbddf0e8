"""An operator whose schedules, or a kernel whose forms are measured: what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from sparse_tvm.tuning.runner import Argument
from sparse_tvm.tuning.schedule_records import ScheduleRecord


@dataclass
class RestOperator:
    """A function of the model that has no kernel, or has one in several forms.

    Attributes
    ----------
    title : str
        Its name.
    text : str
        TVM's JSON of it, or what :class:`~sparse_tvm.tuning.forms.KernelCall` writes.
    fingerprint : str
        As records have it.
    calls : int
        How often the model calls it.
    elements : int
        Of all its operands.
    tokens : int | None
        At how many it is measured, if run time decides how many there are.
    arguments : list[Argument] | None
        Of a kernel.
    records : dict[str, list[ScheduleRecord]]
        By schedule, those on each number of threads.
    """

    title: str
    text: str
    fingerprint: str
    calls: int
    elements: int
    tokens: int | None = None
    arguments: list[Argument] | None = None
    records: dict[str, list[ScheduleRecord]] = field(default_factory=dict)

    def seconds(self, schedule: str) -> list[float] | None:
        """What a schedule takes on each number of threads; None if it was not measured."""
        found = [record.seconds for record in self.records.get(schedule, ())]
        return [one for one in found if one is not None] or None if None not in found else None

    @property
    def best(self) -> str | None:
        """The fastest schedule so far, in the mean over numbers of threads."""
        known = {s: found for s in self.records if (found := self.seconds(s)) is not None}
        return min(known, key=lambda one: prod(known[one]), default=None)

    @property
    def usual(self) -> str | None:
        """The schedule that the others are held against: the first that was measured."""
        return next(iter(self.records), None)

    def gain(self) -> float | None:
        """How many times as fast as the usual one the best is; None if not known."""
        usual = self.seconds(self.usual) if self.usual is not None else None
        if usual is None or self.best is None:
            return None
        best = self.seconds(self.best)
        assert best is not None
        return float((prod(usual) / prod(best)) ** (1 / len(usual)))
