"""What a worker does with operators without a kernel: builds, checks and times their schedules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparse_tvm.tuning.building import Built
from sparse_tvm.tuning.forms import KernelCall
from sparse_tvm.tuning.job import ScheduleJob
from sparse_tvm.tuning.runner import OTHER_RESULTS, Argument, Side, alike, measure
from sparse_tvm.tuning.schedule_records import kind

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

        assert job["schedule"] is not None
        if job["arguments"] is not None:
            return _in_form(job, job["schedule"], job["arguments"])
        function, target = _loaded(job)
        scheduled = apply_schedule(function, job["schedule"], Simd.of(target))
        arguments = dict.fromkeys(job["tokens"], arguments_of(function))
        return Built(scheduled, target, {}, arguments, job["schedule"])

    def __call__(self, job: ScheduleJob) -> Mapping[str, Any]:
        """List the schedules, or time one under all conditions."""
        key, beside = json.dumps([job["function"], job["tokens"]]), job["beside"]
        if job["schedule"] is None:
            return {"schedules": _listed(job)}
        sides = [self.build(job).side()]
        if key not in self._expected:
            self._forget()
            right = self.build({**job, "schedule": job["expected"]}).side()
            self._expected[key] = right.results()
        if not alike(sides[0].results(), self._expected[key]):
            return {"failure": OTHER_RESULTS}
        if beside is not None:
            if (key, beside) not in self._sides:
                self._sides[key, beside] = self.build({**job, "schedule": beside}).side()
            sides.insert(0, self._sides[key, beside])
        return measure(sides, job)

    def _forget(self) -> None:
        if len(self._expected) >= _KEPT:
            self._expected.clear()
            self._sides.clear()


def _loaded(job: ScheduleJob) -> tuple[Any, Any]:
    """A job's function and target."""
    import tvm

    return tvm.ir.load_json(job["function"]), _target(job)[1]


def _target(job: ScheduleJob) -> tuple[Any, Any]:
    """A job's backend and target."""
    from sparse_tvm.backends import get_backend

    backend = get_backend(job["backend"])
    return backend, next(known for known in backend.targets if known.name == job["target"])


def _in_form(job: ScheduleJob, form: str, arguments: list[Argument]) -> Built:
    """Build a kernel in a form."""
    call, (backend, target) = KernelCall.read(job["function"]), _target(job)
    family = backend.family_for(call.op, target)
    forms = call.forms(family, target)
    if form not in forms:
        raise ValueError(f"{target.name} has no {kind(form)} of {family.name}: {', '.join(forms)}")
    kernel = family.build(forms[form], call.operands, call.output, target)
    return Built(kernel.function, target, {}, dict.fromkeys(job["tokens"], arguments), kernel.title)


def _listed(job: ScheduleJob) -> list[str]:
    if job["arguments"] is not None:
        call, (backend, target) = KernelCall.read(job["function"]), _target(job)
        return list(call.forms(backend.family_for(call.op, target), target))

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
