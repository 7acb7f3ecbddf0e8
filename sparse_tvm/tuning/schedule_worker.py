"""What a worker does with operators without a kernel: builds, checks and times their schedules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from sparse_tvm.tuning.building import compiled
from sparse_tvm.tuning.job import ScheduleJob
from sparse_tvm.tuning.schedule_records import NAIVE
from sparse_tvm.tuning.timing import Calls, compare

_TOLERANCE = 1e-3
"""By how much of the largest value results may differ: sums are taken in another order."""

_KEPT = 2
"""Functions whose usual schedule and results are remembered."""


@dataclass(frozen=True)
class _Side:
    """A schedule that is compiled, and arguments of its own."""

    run: Callable[..., Any]
    idle: Callable[..., Any]
    arguments: Sequence[Any]

    @classmethod
    def of(cls, function: Any, schedule: str, target: Any) -> _Side:
        from sparse_tvm.schedules.cpu.searched import apply_schedule
        from sparse_tvm.schedules.cpu.simd import Simd

        scheduled = apply_schedule(function, schedule, Simd.of(target))
        return cls(*compiled(scheduled, target), arguments_of(function))

    def results(self) -> list[np.ndarray]:
        """All arguments after a call, results among them."""
        self.run(*self.arguments)
        return [argument.numpy() for argument in self.arguments]


class ScheduleWorker:
    """Answers jobs, and remembers what those to come are held against."""

    def __init__(self) -> None:
        self._sides: dict[tuple[str, str], _Side] = {}
        self._expected: dict[str, list[np.ndarray]] = {}

    def __call__(self, job: ScheduleJob) -> Mapping[str, Any]:
        """List the schedules, or time one under all conditions."""
        import tvm

        from sparse_tvm.backends import get_backend
        from sparse_tvm.schedules.cpu.searched import candidates
        from sparse_tvm.schedules.cpu.simd import Simd

        text, schedule = job["function"], job["schedule"]
        known = get_backend(job["backend"]).targets
        target: Any = next(one for one in known if one.name == job["target"])
        function = tvm.ir.load_json(text)
        if schedule is None:
            cores = max(job["threads"])
            options = target.tvm_target(), cores, job["samples"], Simd.of(target)
            return {"schedules": candidates(function, *options)}
        side = _Side.of(function, schedule, target)
        if text not in self._expected:
            self._forget()
            self._expected[text] = _Side.of(function, NAIVE, target).results()
        if not _alike(side.results(), self._expected[text]):
            return {"failure": "its results are other ones"}
        sides, beside = [side], job["beside"]
        if beside is not None:
            if (text, beside) not in self._sides:
                self._sides[text, beside] = _Side.of(function, beside, target)
            sides.insert(0, self._sides[text, beside])
        return {"results": list(_timed(sides, job))}

    def _forget(self) -> None:
        if len(self._expected) >= _KEPT:
            self._expected.clear()
            self._sides.clear()


def arguments_of(function: Any) -> list[Any]:
    """Arrays for a function's parameters: normal values, and zeros where they are whole numbers.

    Whole numbers may be indices, of which 0 is always one.
    """
    import tvm

    random = np.random.default_rng(0)
    made = []
    for parameter in function.params:
        shape, dtype = [int(size) for size in parameter.ty.shape], str(parameter.ty.dtype)
        array = np.zeros(shape, dtype)
        if array.dtype.kind == "f":
            array[...] = random.standard_normal(prod(shape), np.float32).reshape(shape)
        made.append(tvm.runtime.tensor(array))
    return made


def _timed(sides: Sequence[_Side], job: ScheduleJob) -> Any:
    from sparse_tvm.machine_limits import use_threads

    for threads in job["threads"]:
        use_threads(threads)
        calls = [Calls(side.run, [side.arguments], 0) for side in sides]
        idle = [Calls(side.idle, [side.arguments], 0) for side in sides]
        yield {"threads": threads, **compare(calls, idle, job["seconds"])}


def _alike(results: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> bool:
    for found, right in zip(results, expected, strict=True):
        finite = right[np.isfinite(right)] if right.dtype.kind == "f" else right
        size = float(np.abs(finite).max(initial=0)) if right.dtype.kind in "fiu" else 0.0
        with contextlib.suppress(TypeError):
            if not np.allclose(found, right, _TOLERANCE, _TOLERANCE * size, equal_nan=True):
                return False
    return True
