"""Measuring again what a falling clock spoilt, and giving up where it does not come back.

A machine that is hot, or gets too little power, lowers its clock, by a quarter or more, until that
changes. What is measured meanwhile is of another machine. So a measurement is taken again, after a
while for cooling, when the clock was far below the best of the session, or when the machine says
that it is slowed down.

Other guests of a virtual machine's host move its clock as well, for seconds, and so may a host that
has more to do from then on. That is seen by the machine saying nothing, and by how much it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from sparse_tvm.errors import ThrottledError
from sparse_tvm.machine_state import State, described, doubts, remedies, says_nothing, signs
from sparse_tvm.tuning.job import Job, ScheduleJob
from sparse_tvm.tuning.measuring import Measurer

_STEADY = 0.8
"""Pace from which on a clock is as good as the best. Layouts are chosen by what they take beside
another, so a slow change is harmless that is not large. A virtual machine's neighbours take an
eighth for seconds, for they share its turbo (AMD EPYC, Zen 4: never below 0.84 in a quarter of an
hour); a board that is slowed down loses a third or more, or says that it is."""

_TOLERATED = 0.67
"""Pace below which no clock may stay. Down to it the host of a virtual machine may do so that has
more to do than before; a Raspberry Pi that is slowed down has 0.66 of its pace, or less."""

_PAUSES = (0.5, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)
"""Seconds to wait for the clock, until it is looked at again. A board cools in a minute or two."""

_MARGIN = 3.0
"""How much cooler than where it is slowed down, in °C, a machine is to be after a wait."""

_AGAIN = 3
"""How often one measurement is taken again."""


@dataclass(frozen=True)
class Notice:
    """What a user should know while it is tuned: a sentence."""

    text: str


class SteadyMeasurer:
    """Has another measurer measure while the clock is steady.

    Each of its results gets a ``pace``: how fast the clock was, 1 being the best of the session.

    Parameters
    ----------
    measurer : Measurer
        What measures.
    notify : Callable[[Notice], None]
        Told what happens.
    ignore : bool
        Keep what is measured, however fast the clock is.
    sleep : Callable[[float], None]
        Waits so many seconds.
    """

    def __init__(
        self,
        measurer: Measurer,
        notify: Callable[[Notice], None],
        *,
        ignore: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._measurer, self._machine = measurer, measurer.name
        self._notify, self._ignore, self._sleep = notify, ignore, sleep
        self._best: float | None = None
        self._least = _STEADY
        self._throttled: dict[int, int | None] = {}  # by CPU, when it was first looked at
        self._spoilt, self._waited = 0, 0.0

    def __call__(self, job: Job, matrix: np.ndarray) -> dict[str, Any]:
        """Measure a candidate for a layer, as the other measurer does."""
        return self._steady(lambda: self._measurer(job, matrix))

    def schedule(self, job: ScheduleJob) -> dict[str, Any]:
        """List the schedules of an operator, or measure one, as the other measurer does."""
        if job["schedule"] is None:
            return self._measurer.schedule(job)
        return self._steady(lambda: self._measurer.schedule(job))

    def remarks(self) -> Iterator[str]:
        """What became of measurements, if not all is well."""
        if self._spoilt and self._ignore:
            yield f"made while {self._machine} was slowed down: {self._spoilt} measurements"
        elif self._spoilt:
            yield (
                f"made again, because {self._machine} was slowed down: {self._spoilt} "
                f"measurements; waiting for it took {self._waited:.0f} s"
            )

    def _steady(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self._best is None:
            self._begin()
        for taken in count(1):
            answer = measure()
            seen = self._seen(answer)
            if seen is None or (seen.pace >= self._least and not signs(seen.state)):
                break
            self._spoilt += 1
            if self._ignore:
                break
            if taken > _AGAIN:
                self._tolerate(seen, f"is slowed down whenever it measures, {taken} times in turn")
                break
            self._wait(seen)
        return answer

    def _begin(self) -> None:
        """See how the machine is before anything is measured."""
        found = self._measurer.observe()
        if "failure" in found:  # whatever it is, measuring meets it too
            return
        seen = self._look(self._pace(found["clock"]), found["state"])
        if says_nothing(seen.state):
            self._say(
                f"{self._machine} says nothing of its frequency and its temperature: if it is "
                "slowed down all the time, that is not seen"
            )
        for doubt in doubts(seen.state):
            self._say(doubt)
        if now := signs(seen.state):
            if self._ignore:
                self._say(f"{self._machine} is slowed down: {'; '.join(now)}")
            else:
                self._wait(seen)

    def _seen(self, answer: Mapping[str, Any]) -> _Seen | None:
        """How fast the clock was at each result, which gets its pace, and the slowest of all."""
        timed = [one for one in answer.get("results", ()) if "clock" in one]
        if not timed:
            return None
        for result in timed:
            result["pace"] = self._pace(result["clock"])
        return self._look(min(one["pace"] for one in timed), answer["state"])

    def _look(self, pace: float, state: State) -> _Seen:
        before = self._throttled.setdefault(state["cpu"], state["throttled"])
        return _Seen(pace, state, heated=state["throttled"] != before)

    def _pace(self, seconds: float) -> float:
        self._best = min(self._best or seconds, seconds)
        return self._best / seconds

    def _wait(self, seen: _Seen) -> None:
        """Wait until the clock is steady again.

        Raises
        ------
        ThrottledError
            When that takes too long.
        """
        for number, pause in enumerate(_PAUSES, 1):
            if number > 1:  # most are over by then
                self._say(
                    f"{self._machine} is slowed down: {seen}; waiting {pause:g} s "
                    f"({number - 1} of {len(_PAUSES) - 1})"
                )
            self._sleep(pause)
            self._waited += pause
            found = self._measurer.observe()
            if "failure" in found:
                return
            seen = self._look(self._pace(found["clock"]), found["state"])
            if seen.pace >= self._least and not signs(seen.state, _MARGIN):
                return
        self._tolerate(seen, f"is still slowed down after {sum(_PAUSES):.0f} s of waiting")

    def _tolerate(self, seen: _Seen, what: str) -> None:
        """Go on with a clock that is lower than it was, if nothing speaks for heat or for power.

        Raises
        ------
        ThrottledError
            Otherwise.
        """
        if signs(seen.state, _MARGIN) or seen.heated or seen.pace < _TOLERATED:
            raise ThrottledError(
                f"{self._machine} {what}: {seen}",
                hint=f"{', '.join(remedies(seen.state))}, or measure on fewer threads; what was "
                "measured is kept, and the same command goes on from there; --ignore-throttling "
                "goes on regardless",
            )
        self._least = _TOLERATED
        self._say(
            f"{self._machine} {what}: {seen}; from here on, a clock is good enough that has "
            f"{_TOLERATED:.0%} of its best pace"
        )

    def _say(self, text: str) -> None:
        self._notify(Notice(text))


@dataclass(frozen=True)
class _Seen:
    """How fast a machine was, 1 being the best of the session, and what it said.

    ``heated`` tells whether heat has slowed it down since the CPU was first looked at.
    """

    pace: float
    state: State
    heated: bool

    def __str__(self) -> str:
        return f"its clock has {self.pace:.0%} of its best pace; {described(self.state)}"
