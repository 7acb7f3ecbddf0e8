"""Tuning operators without a kernel of ours: TVM's loops, our schedule for any, or MetaSchedule's.

They are what the compiler's passes leave at the end, so they are looked for once layers are tuned,
at the concrete sizes of the model: MetaSchedule knows no others. Each schedule's results are
compared with those of TVM's own loops before it is timed, in turns with the usual one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx

from sparse_tvm.passes.cpu.schedule_rest import schedule_rest, without_kernel
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.searched import fingerprint
from sparse_tvm.tuning.job import Machine, ScheduleJob
from sparse_tvm.tuning.layers import until
from sparse_tvm.tuning.measuring import Measurer
from sparse_tvm.tuning.provenance import measured_on
from sparse_tvm.tuning.records import append_record
from sparse_tvm.tuning.schedule_records import GENERIC, NAIVE, ScheduleRecord, Schedules

_LEAST_ELEMENTS = 1 << 12
"""Of all operands of a function: with fewer, calling it takes longer than it does."""

_SECONDS, _FINAL_SECONDS = 0.1, 0.4
"""How long one timing of a schedule takes, and one more of what seems to be the best."""

_FINALISTS = 3
"""How many are timed once more, at most."""


@dataclass
class RestOperator:
    """A function of the model that has no kernel, and what is known of its schedules.

    Attributes
    ----------
    title : str
        Its name.
    text : str
        TVM's JSON of it.
    fingerprint : str
        As records have it.
    calls : int
        How often the model calls it.
    elements : int
        Of all its operands.
    records : dict[str, list[ScheduleRecord]]
        By schedule, those on each number of threads.
    """

    title: str
    text: str
    fingerprint: str
    calls: int
    elements: int
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


@dataclass(frozen=True)
class ScheduleTrial:
    """A schedule that was measured, and how many operators are still to come."""

    operator: RestOperator
    schedule: str
    records: list[ScheduleRecord]
    left: int


def rest_of(program: Program, context: Context) -> tuple[list[RestOperator], list[str]]:
    """Operators without a kernel that an imported model needs, those of most elements first.

    Returns
    -------
    tuple[list[RestOperator], list[str]]
        The operators, and why others were left out.
    """
    program = until(schedule_rest, program, context)
    calls = _calls(program)
    found: dict[str, RestOperator] = {}
    symbolic = []
    for var, function in without_kernel(program):
        elements = _elements(function)
        if elements is None:
            symbolic.append(var.name_hint)
            continue
        if elements < _LEAST_ELEMENTS:
            continue
        key, count = fingerprint(function), calls.get(var.name_hint, 0)
        text = tvm.ir.save_json(function)
        known = found.setdefault(key, RestOperator(var.name_hint, text, key, 0, elements))
        known.calls += count
    left_out = []
    if symbolic:
        left_out.append(
            f"{len(symbolic)} operators without a kernel: their sizes are not known; give "
            "--input-shape"
        )
    return sorted(found.values(), key=lambda one: -one.calls * one.elements), left_out


@dataclass
class RestTuner:
    """Measures schedules of operators, one operator after the other."""

    context: Context
    machine: Machine
    operators: Sequence[RestOperator]
    known: Schedules
    threads: Sequence[int]
    path: Path
    progress: Callable[[ScheduleTrial], None] | None

    def run(self, measurer: Measurer, trials: int, limit: float) -> None:
        """Measure so many schedules of each, as long as there is time."""
        deadline = time.monotonic() + limit
        for place, operator in enumerate(self.operators):
            if time.monotonic() > deadline:
                return
            listed = measurer.schedule(self._job(operator, None, samples=max(0, trials - 2)))
            # What lists them may crash as well: the two schedules without a search are left.
            fresh = False
            for schedule in listed.get("schedules", [GENERIC, NAIVE])[:trials]:
                if time.monotonic() > deadline:
                    break
                if (kept := self._kept(operator, schedule)) is not None:
                    operator.records[schedule] = kept
                    continue
                fresh = True
                self._measure(measurer, operator, schedule, _SECONDS)
                if self.progress is not None:
                    found, left = operator.records[schedule], len(self.operators) - place - 1
                    self.progress(ScheduleTrial(operator, schedule, found, left))
            if fresh:
                self._measure_best(measurer, operator)

    def _measure_best(self, measurer: Measurer, operator: RestOperator) -> None:
        """Measure what seems to be the best once more, until that is what is the best."""
        sure = {operator.usual}
        while operator.best not in sure and len(sure) <= _FINALISTS:
            best = operator.best
            assert best is not None
            sure.add(best)
            self._measure(measurer, operator, best, _FINAL_SECONDS)

    def _measure(
        self, measurer: Measurer, operator: RestOperator, schedule: str, seconds: float
    ) -> None:
        """Measure a schedule, and keep what it took."""
        answer = measurer.schedule(self._job(operator, schedule, seconds=seconds))
        operator.records[schedule] = list(self._records(operator, schedule, answer))
        for record in operator.records[schedule]:
            append_record(self.path, record)

    def _kept(self, operator: RestOperator, schedule: str) -> list[ScheduleRecord] | None:
        """What the records have of a schedule already, if it is all that is needed."""
        found = {
            record.threads: record
            for record in self.known
            if (record.function, record.schedule) == (operator.fingerprint, schedule)
            and record.target == self.context.target.name
        }
        complete = all(threads in found for threads in self.threads)
        return [found[threads] for threads in self.threads] if complete else None

    def _job(
        self,
        operator: RestOperator,
        schedule: str | None,
        samples: int = 0,
        seconds: float = _SECONDS,
    ) -> ScheduleJob:
        usual = operator.usual
        paired = usual not in (None, schedule) and operator.seconds(str(usual)) is not None
        return {
            "backend": self.context.backend.name,
            "target": self.context.target.name,
            "function": operator.text,
            "schedule": schedule,
            "samples": samples,
            "tokens": [1],
            "copies": 1,
            "threads": list(self.threads),
            "seconds": seconds,
            "beside": usual if paired else None,
        }

    def _records(
        self, operator: RestOperator, schedule: str, answer: Mapping[str, Any]
    ) -> Iterator[ScheduleRecord]:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        nothing: list[dict[str, Any]]
        nothing = [{"threads": each, "seconds": None, "noise": 0.0} for each in self.threads]
        beside = dict(zip(self.threads, operator.seconds(operator.usual or "") or (), strict=False))
        for result in answer.get("results") or nothing:
            seconds = result["seconds"]
            if "relative" in result:
                seconds = result["relative"] * beside[result["threads"]]
            yield ScheduleRecord(
                operator.fingerprint,
                operator.title,
                schedule,
                self.context.target.name,
                result["threads"],
                seconds,
                result["noise"],
                answer.get("failure"),
                measured_on(self.machine, now),
            )


def _elements(function: tirx.PrimFunc) -> int | None:
    """Elements of all operands; None if run time decides, or some operand is no array."""
    count = 0
    for parameter in function.params:
        shape = getattr(parameter.ty, "shape", None)
        if shape is None or not all(isinstance(size, tirx.IntImm) for size in shape):
            return None
        count += math.prod(int(size) for size in shape)
    return count


def _calls(program: Program) -> dict[str, int]:
    """How often each function is called."""
    found: dict[str, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call) and node.args:
            name = getattr(node.args[0], "name_hint", None)
            if name is not None:
                found[name] = found.get(name, 0) + 1

    relax.analysis.post_order_visit(program.module["main"].body, visit)
    return found
