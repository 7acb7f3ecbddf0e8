"""Tuning operators without a kernel of ours: TVM's loops, our schedule for any, or MetaSchedule's.

Kernels in several forms (:mod:`~sparse_tvm.tuning.kernel_calls`) are tuned in the same way, a form
being what a schedule is there.

They are what the compiler's passes leave at the end, so they are looked for once layers are tuned,
at the concrete sizes of the model: MetaSchedule knows no others. Each schedule's results are
compared with those of TVM's own loops, or of the usual form, before it is timed, in turns with the
usual one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx

from sparse_tvm.passes.cpu.schedule_rest import without_kernel
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.lower_kernels import lower_kernels
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.searched import fingerprint
from sparse_tvm.tuning.job import Machine, ScheduleJob
from sparse_tvm.tuning.kernel_calls import kernel_calls
from sparse_tvm.tuning.layers import until
from sparse_tvm.tuning.provenance import measured_on
from sparse_tvm.tuning.records import append_record
from sparse_tvm.tuning.rest_operator import RestOperator
from sparse_tvm.tuning.schedule_records import GENERIC, NAIVE, ScheduleRecord, Schedules
from sparse_tvm.tuning.throttling import SteadyMeasurer

_LEAST_ELEMENTS = 1 << 12
"""Of all operands of a function: with fewer, calling it takes longer than it does."""

_SECONDS, _FINAL_SECONDS = 0.1, 0.4
"""How long one timing of a schedule takes, and one more of what seems to be the best."""

_FINALISTS = 3
"""How many are timed once more, at most."""


@dataclass(frozen=True)
class ScheduleTrial:
    """A schedule that was measured, and how many operators are still to come."""

    operator: RestOperator
    schedule: str
    records: list[ScheduleRecord]
    left: int


def rest_of(
    program: Program, context: Context, tokens: Sequence[int] | None = None
) -> tuple[list[RestOperator], list[str]]:
    """What an imported model needs besides its layers: kernels in several forms, for so many tokens
    where run time decides, then operators without a kernel, those of most elements first.

    Returns
    -------
    tuple[list[RestOperator], list[str]]
        The operators, and why others were left out.
    """
    program = until(lower_kernels, program, context)
    kernels = kernel_calls(program, context, tokens)
    program = lower_kernels(program, context)
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
    rest = sorted(found.values(), key=lambda one: -one.calls * one.elements)
    return [*kernels, *rest], left_out


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

    def run(self, measurer: SteadyMeasurer, trials: int, limit: float) -> None:
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

    def _measure_best(self, measurer: SteadyMeasurer, operator: RestOperator) -> None:
        """Measure what seems to be the best once more, until that is what is the best."""
        sure = {operator.usual, None}  # none is where all failed
        while operator.best not in sure and len(sure) < _FINALISTS + 2:
            best = operator.best
            assert best is not None
            sure.add(best)
            self._measure(measurer, operator, best, _FINAL_SECONDS)

    def _measure(
        self, measurer: SteadyMeasurer, operator: RestOperator, schedule: str, seconds: float
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
            and (record.target, record.tokens) == (self.context.target.name, operator.tokens)
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
            "arguments": operator.arguments,
            "expected": NAIVE if operator.arguments is None else GENERIC,
            "schedule": schedule,
            "samples": samples,
            "tokens": [operator.tokens or 1],
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
                measured_on(self.machine, now, result.get("pace")),
                operator.tokens,
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
