"""What a worker does with operators without a kernel: builds, checks and times their schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparse_tvm.tuning.building import Built
from sparse_tvm.tuning.job import ScheduleJob
from sparse_tvm.tuning.runner import OTHER_RESULTS, Argument, Side, alike, measure
from sparse_tvm.tuning.schedule_records import NAIVE

_KEPT = 2
"""Functions whose usual schedule and results are remembered."""

_ANY_INDEX = 1
"""What whole numbers are below: they may be indices, of which 0 is always one."""


class ScheduleWorker:
    """Answers jobs, and remembers what those to come are held against."""

    def __init__(self) -> None:
        self._sides: dict[tuple[str, str], Side] = {}
        self._expected: dict[str, list[np.ndarray]] = {}

    def build(self, job: ScheduleJob) -> Built:
        """Build a function in a schedule."""
        from sparse_tvm.schedules.cpu.searched import apply_schedule
        from sparse_tvm.schedules.cpu.simd import Simd

        function, target = _loaded(job)
        assert job["schedule"] is not None
        scheduled = apply_schedule(function, job["schedule"], Simd.of(target))
        arguments = dict.fromkeys(job["tokens"], arguments_of(function))
        return Built(scheduled, target, {}, arguments, job["schedule"])

    def __call__(self, job: ScheduleJob) -> Mapping[str, Any]:
        """List the schedules, or time one under all conditions."""
        text, beside = job["function"], job["beside"]
        if job["schedule"] is None:
            return {"schedules": _listed(job)}
        sides = [self.build(job).side()]
        if text not in self._expected:
            self._forget()
            self._expected[text] = self.build({**job, "schedule": NAIVE}).side().results()
        if not alike(sides[0].results(), self._expected[text]):
            return {"failure": OTHER_RESULTS}
        if beside is not None:
            if (text, beside) not in self._sides:
                self._sides[text, beside] = self.build({**job, "schedule": beside}).side()
            sides.insert(0, self._sides[text, beside])
        return measure(sides, job)

    def _forget(self) -> None:
        if len(self._expected) >= _KEPT:
            self._expected.clear()
            self._sides.clear()


def _loaded(job: ScheduleJob) -> tuple[Any, Any]:
    """A job's function and target."""
    import tvm

    from sparse_tvm.backends import get_backend

    known = get_backend(job["backend"]).targets
    return tvm.ir.load_json(job["function"]), next(t for t in known if t.name == job["target"])


def _listed(job: ScheduleJob) -> list[str]:
    from sparse_tvm.schedules.cpu.searched import candidates
    from sparse_tvm.schedules.cpu.simd import Simd

    function, target = _loaded(job)
    options = target.tvm_target(), max(job["threads"]), job["samples"], Simd.of(target)
    return candidates(function, *options)


def arguments_of(function: Any) -> list[Argument]:
    """Random arrays for a function's parameters."""
    return [
        [[int(size) for size in parameter.ty.shape], str(parameter.ty.dtype), _ANY_INDEX]
        for parameter in function.params
    ]
