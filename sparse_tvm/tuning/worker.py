"""The process that builds and times kernels: one job a line in, one result a line out.

``python -m sparse_tvm.tuning.worker`` reads jobs from standard input, weights in front of them, and
answers on standard output; to an empty job it answers where it runs. It is a process of its own so
that a kernel which aborts, hangs or uses an instruction that the CPU lacks takes nothing else with
it; :mod:`~sparse_tvm.tuning.measuring` notices and starts another.

A kernel is timed as a model runs it: its activations are in the cache, and its weight is as far
away as the model's other weights push it between two runs. For these stand copies of its own, as
many as the model has weights of its size. What a call costs that computes nothing is taken off.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_tvm.cpu import allow_amx
from sparse_tvm.tuning.building import compiled
from sparse_tvm.tuning.job import Job, this_machine
from sparse_tvm.tuning.schedule_worker import ScheduleWorker
from sparse_tvm.tuning.timing import Calls, compare
from sparse_tvm.vm import runtime

if TYPE_CHECKING:
    from sparse_tvm.tuning.layer_kernel import LayerKernel

_LEAST_COPIES = 2
_MOST_BYTES = 1 << 29
"""Of all copies of a weight."""


@dataclass(frozen=True)
class Built:
    """A candidate that is compiled, and has yet to be timed."""

    job: Job
    kernel: LayerKernel
    sizes: Callable[[int], Sequence[int]]
    run: Callable[..., Any]
    idle: Callable[..., Any]

    @property
    def nbytes(self) -> int:
        """Size of one copy of the weight."""
        return sum(array.nbytes for array in self.kernel.weight.values())

    def measure(self, beside: Built | None = None) -> dict[str, Any]:
        """Time it under all conditions, in turns with another candidate if there is one."""
        from sparse_tvm.machine_limits import use_threads

        job, results = self.job, []
        sides = [self] if beside is None else [beside, self]
        copies = [_copies(side.kernel.weight, job["copies"]) for side in sides]
        for tokens in job["tokens"]:
            rotations = [
                _rotation(side.kernel.arguments(side.sizes(tokens)), each)
                for side, each in zip(sides, copies, strict=True)
            ]
            for threads in job["threads"]:
                use_threads(threads)
                calls = [
                    Calls(side.run, rotation, side.nbytes * len(each))
                    for side, rotation, each in zip(sides, rotations, copies, strict=True)
                ]
                idle = [Calls(s.idle, r[:1], 0) for s, r in zip(sides, rotations, strict=True)]
                found = compare(calls, idle, job["seconds"])
                results.append({"tokens": tokens, "threads": threads, **found})
        return {"title": self.kernel.title, "copies": len(copies[-1]), "results": results}


def built(job: Job, w: np.ndarray) -> Built:
    """Build a candidate."""
    from sparse_tvm.backends import get_backend
    from sparse_tvm.operators import WeightedOperator, from_json
    from sparse_tvm.passes.infrastructure import Context
    from sparse_tvm.tuning.layer_kernel import Call, build_kernel

    backend = get_backend(job["backend"])
    target = next(known for known in backend.targets if known.name == job["target"])
    op = from_json(job["operator"], job["call"])
    assert isinstance(op, WeightedOperator)
    call = Call(op, tuple(job["leading"]))
    kernel = build_kernel(call, w, op.stored, Context(backend, target))
    return Built(job, kernel, call.sizes, *compiled(kernel.function, target))


def _copies(weight: dict[int, np.ndarray], count: int) -> list[dict[int, Any]]:
    """A weight's arrays so many times, as far as there is room."""
    import tvm

    nbytes = sum(array.nbytes for array in weight.values())
    count = max(_LEAST_COPIES, min(count, _MOST_BYTES // nbytes))
    return [
        {place: tvm.runtime.tensor(array) for place, array in weight.items()} for _ in range(count)
    ]


def _rotation(arguments: Sequence[Any], copies: Sequence[dict[int, Any]]) -> list[list[Any]]:
    """Lists of arguments that share all but the weight, of which each has a copy."""
    import tvm

    weight = copies[0].keys()
    shared = [
        a if isinstance(a, int) or place in weight else tvm.runtime.tensor(a)
        for place, a in enumerate(arguments)
    ]
    return [[own.get(place, a) for place, a in enumerate(shared)] for own in copies]


def _answer(
    job: Job, weights: Mapping[str, np.ndarray], incumbents: dict[str, Built]
) -> Mapping[str, Any]:
    """Build and time a candidate, in turns with an incumbent that is built once."""
    w, beside = weights[job["weight"]], None
    if job["beside"] is not None:
        incumbent: Job = {**job, "call": job["beside"], "beside": None}
        key = json.dumps([job["weight"], job["operator"], job["leading"], job["beside"]])
        if key not in incumbents:
            incumbents[key] = built(incumbent, w)
        beside = incumbents[key]
    return built(job, w).measure(beside)


def serve() -> None:
    """Answer jobs until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a kernel or a compiler prints is no answer
    # Two threads may share a core for long otherwise; but TVM binds them to the first cores.
    every_core = len(os.sched_getaffinity(0)) == os.cpu_count()
    os.environ["TVM_BIND_THREADS"] = str(int(every_core))
    allow_amx()
    runtime()  # sets the other defaults of the thread pool, before TVM loads
    schedules = ScheduleWorker()
    weights: dict[str, np.ndarray] = {}
    incumbents: dict[str, Built] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "npy" in message:
            array = np.load(io.BytesIO(base64.b64decode(message["npy"])))
            weights[message["weight"]] = array
            continue
        answer: Mapping[str, Any]
        try:
            if "function" in message:
                answer = schedules(message)
            else:
                answer = _answer(message, weights, incumbents) if message else this_machine()
        except Exception as error:  # whatever it is, the candidate cannot be used
            text = (str(error).strip().splitlines() or [""])[-1]
            answer = {"failure": f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
