"""Records of operators without a kernel of ours: one schedule of one function, timed.

Such an operator is found by its fingerprint, which :mod:`sparse_tvm.schedules.cpu.searched` takes
of the function at its concrete sizes.

Needs no TVM.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, TypedDict

from sparse_tvm.manifest import Natural, check
from sparse_tvm.tuning.provenance import VERSION, Provenance, Source, check_outcome

NAIVE, GENERIC = "naive", "generic"
"""TVM's own loops, and the schedule that every operator gets which was not measured."""

_BLOCKS = re.compile(r"[1-9]\d*x[1-9]\d*")
"""What forms of kernels are called: the blocks that they compute."""

_CERTAIN = 1.02
"""How much faster than the usual one a schedule has to be measured."""


class _Sized(TypedDict, total=False):
    """What lines have of functions at sizes that run time decides."""

    tokens: Natural


class _Line(_Sized, Source):
    """The schema of a line."""

    version: Natural
    function: str
    title: str
    schedule: Any
    target: str
    threads: Natural
    seconds: float | None
    noise: float
    failure: str | None


def kind(schedule: str) -> str:
    """What a schedule is called, for people."""
    names = {NAIVE: "plain loops", GENERIC: "usual schedule"}
    usual = f"blocks of {schedule}" if _BLOCKS.fullmatch(schedule) else "auto-scheduled"
    return names.get(schedule, usual)


@dataclass(frozen=True)
class ScheduleRecord:
    """One schedule, measured.

    Attributes
    ----------
    function : str
        The function's fingerprint.
    title : str
        Its name in the model it was measured for.
    schedule : str
        A name, or MetaSchedule's trace as JSON; of a kernel its form, ``generic`` the usual one.
    target : str
        Name of the target.
    threads : int
        On how many it ran.
    seconds : float | None
        Median of a call; None where there is none, as ``failure`` explains.
    noise : float
        Distance of the quartiles, as a share of the median.
    failure : str | None
        Why the schedule cannot be used.
    provenance : Provenance
        Where, when and with what.
    tokens : int | None
        For how many, where run time decides; None where sizes are part of the function.
    """

    function: str
    title: str
    schedule: str
    target: str
    threads: int
    seconds: float | None
    noise: float
    failure: str | None
    provenance: Provenance
    tokens: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What two records have in common of which one is enough."""
        condition = (self.tokens, self.threads)
        return (self.function, self.target, self.schedule, condition, self.provenance.cpu)

    def as_json(self) -> dict[str, Any]:
        """The record as a line has it."""
        left_out = {"provenance"} if self.tokens is not None else {"provenance", "tokens"}
        own = {name: value for name, value in vars(self).items() if name not in left_out}
        own["schedule"] = self.schedule if _named(self.schedule) else json.loads(self.schedule)
        return {"version": VERSION, **own, **self.provenance.as_json()}

    @classmethod
    def from_json(cls, value: Any) -> ScheduleRecord:
        """Read a line.

        Raises
        ------
        ValueError
            When it is no record; it says why not.
        """
        check(value, _Line, "it")
        schedule, seconds = value["schedule"], value["seconds"]
        if isinstance(schedule, list):
            schedule = json.dumps(schedule)
        elif not isinstance(schedule, str) or not _named(schedule):
            raise ValueError(f"its schedule is {schedule!r}")
        check_outcome(seconds, value["failure"])
        tokens = value.get("tokens")
        if min(value["threads"], 1 if tokens is None else tokens) < 1:
            raise ValueError("its tokens and threads have to be 1 or more")
        names = ("function", "title", "target", "threads", "seconds", "noise", "failure")
        own = {name: value[name] for name in names}
        return cls(schedule=schedule, provenance=Provenance.from_json(value), tokens=tokens, **own)


def _named(schedule: str) -> bool:
    return schedule in (NAIVE, GENERIC) or _BLOCKS.fullmatch(schedule) is not None


@dataclass(frozen=True)
class Chosen:
    """The fastest schedule of a function, and how many times as fast as the usual one it is."""

    schedule: str
    gain: float


@dataclass
class Schedules:
    """Records of schedules, the newest of each kind."""

    _newest: dict[tuple[Any, ...], ScheduleRecord] = field(default_factory=dict)

    def add(self, record: ScheduleRecord) -> None:
        """Add a record; of two of a kind the newer one stays."""
        known = self._newest.get(record.key)
        if known is None or _rank(record) >= _rank(known):
            self._newest[record.key] = record

    def __iter__(self) -> Iterator[ScheduleRecord]:
        """In an order that does not depend on when a record was added."""
        return iter(sorted(self._newest.values(), key=_text))

    def __len__(self) -> int:
        return len(self._newest)

    def seconds(self, function: str, target: str) -> dict[str, dict[tuple[int | None, int], float]]:
        """What was measured of a function: by schedule, and numbers of tokens and threads."""
        found: dict[str, dict[tuple[int | None, int], float]] = {}
        for record in self._of(function, target):
            if record.seconds is not None:
                condition = record.tokens, record.threads
                found.setdefault(record.schedule, {})[condition] = record.seconds
        return found

    def failures(self, function: str, target: str) -> set[str]:
        """Schedules with which a function could not be measured."""
        return {r.schedule for r in self._of(function, target) if r.failure is not None}

    def choose(self, function: str, target: str, threads: int | None) -> Chosen | None:
        """The fastest schedule on so many threads, or in the mean over all that were measured.

        It is the mean over all numbers of tokens in any case.
        None where the usual one, or TVM's where that does not fit, was not measured.
        """
        found = self.seconds(function, target)
        usual = next((name for name in (GENERIC, NAIVE) if name in found), None)
        if usual is None:
            return None
        known = found[usual].keys()
        wanted = {condition for condition in known if condition[1] == threads} or known

        def loss(schedule: str) -> float:
            return mean(math.log(found[schedule][each]) for each in wanted)

        best = min((one for one in found if wanted <= found[one].keys()), key=loss)
        gain = math.exp(loss(usual) - loss(best))
        return Chosen(best, gain) if gain > _CERTAIN else Chosen(usual, 1.0)

    def _of(self, function: str, target: str) -> Iterator[ScheduleRecord]:
        for record in self._newest.values():
            if (record.function, record.target) == (function, target):
                yield record


def _rank(record: ScheduleRecord) -> tuple[str, str]:
    return (record.provenance.date, _text(record))


def _text(record: ScheduleRecord) -> str:
    return json.dumps(record.as_json(), sort_keys=True)
