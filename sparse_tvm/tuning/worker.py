"""The process that builds and times kernels: one job a line in, one result a line out.

``python -m sparse_tvm.tuning.worker`` reads jobs from standard input, weights in front of them, and
answers on standard output; to an empty job it answers where it runs. It is a process of its own so
that a kernel which aborts, hangs or uses an instruction that the CPU lacks takes nothing else with
it; :mod:`~sparse_tvm.tuning.measuring` notices and starts another.

A kernel is timed as a model runs it: its activations are in the cache, and its weight is as far
away as the model's other weights push it between two runs. For these stand copies of its own, as
many as the model has weights of its size. What a call costs that computes nothing is taken off.

A clock that moves by a quarter from one second to the next would decide more than the kernels do.
So a candidate and the layout it is held against take turns of a millisecond, and what counts is the
median of how many times as long the candidate took as its neighbours did.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_tvm.cpu import allow_amx
from sparse_tvm.tuning.job import Job, this_machine
from sparse_tvm.vm import runtime

if TYPE_CHECKING:
    from sparse_tvm.tuning.layer_kernel import LayerKernel

_PASS_SECONDS = 1e-3
"""Least length of a pass, whose mean is one sample."""

_LEAST_PASSES = 7
_LEAST_SECONDS = 1e-8
"""What a kernel takes at least: a difference of two timings may come out below zero."""

_LEAST_COPIES = 2
_MOST_BYTES = 1 << 29
"""Of all copies of a weight."""

_CACHED_BYTES, _REFRESHED_SECONDS = 64 << 20, 5e-3
"""Of copies that a last cache may hold, and of the time to read all of them: if they take no more,
they are read again before each pass, for the other side has pushed them out."""


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
                    _Calls(side.run, rotation, side.nbytes * len(each))
                    for side, rotation, each in zip(sides, rotations, copies, strict=True)
                ]
                idle = [_Calls(s.idle, r[:1], 0) for s, r in zip(sides, rotations, strict=True)]
                overhead = np.median(_in_turns(idle, job["seconds"] / 10), axis=0)
                samples = np.maximum(_in_turns(calls, job["seconds"]) - overhead, _LEAST_SECONDS)
                results.append({"tokens": tokens, "threads": threads, **_summary(samples)})
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
    return Built(job, kernel, call.sizes, *_compiled(kernel.function, target))


def _compiled(function: Any, target: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A kernel, and the same with nothing in it: it still checks its arguments."""
    import tvm
    from tvm import tirx

    from sparse_tvm.schedules.cpu.intrinsics import FAST_MATH

    functions = {"kernel": function, "idle": function.with_body(tirx.Evaluate(0))}
    module = tvm.IRModule(
        {name: each.with_attr("global_symbol", name) for name, each in functions.items()}
    )
    context = tvm.transform.PassContext(opt_level=3, config=FAST_MATH)
    with tvm.target.Target(target.tvm_target()) as tvm_target, context:
        library = tvm.compile(module, tvm_target).jit()
    return library["kernel"], library["idle"]


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


class _Calls:
    """Calls of a function with each of several lists of arguments in turn, many to a pass."""

    def __init__(
        self, run: Callable[..., Any], rotation: Sequence[Sequence[Any]], nbytes: int
    ) -> None:
        self._run, self._rotation, self._at = run, rotation, 0
        self._all(rotation)
        cached = nbytes <= _CACHED_BYTES and self._all(rotation) <= _REFRESHED_SECONDS
        self._refreshed = rotation if cached else ()
        self._per_pass = 1
        while (seconds := self() * self._per_pass) < _PASS_SECONDS / 2:
            more = int(self._per_pass * _PASS_SECONDS / max(seconds, 1e-6))
            self._per_pass = max(2 * self._per_pass, more)

    def __call__(self) -> float:
        """Mean seconds of a call in one pass."""
        rotation = self._rotation
        chosen = [rotation[(self._at + i) % len(rotation)] for i in range(self._per_pass)]
        self._at += self._per_pass
        self._all(self._refreshed)
        return self._all(chosen) / self._per_pass

    def _all(self, chosen: Sequence[Sequence[Any]]) -> float:
        """Seconds of a call with each of these lists."""
        run, started = self._run, time.perf_counter()
        for arguments in chosen:
            run(*arguments)
        return time.perf_counter() - started


def _in_turns(sides: Sequence[_Calls], budget: float) -> np.ndarray:
    """Seconds of a call of each side, pass by pass: float64 ``[passes, sides]``."""
    samples: list[list[float]] = []
    deadline = time.perf_counter() + budget
    while len(samples) < _LEAST_PASSES or time.perf_counter() < deadline:
        order = list(enumerate(sides))
        taken = {place: side() for place, side in order[:: (-1) ** len(samples)]}
        samples.append([taken[place] for place, _ in order])
    return np.array(samples)


def _summary(samples: np.ndarray) -> dict[str, float]:
    """Of the last side, the first being what it is held against."""
    own = samples[:, -1]
    relative = samples[:, -1] / samples[:, 0] if samples.shape[1] > 1 else own
    low, middle, high = np.quantile(relative, (0.25, 0.5, 0.75))
    found = {"seconds": float(np.median(own)), "noise": float((high - low) / middle)}
    return {**found, "relative": float(middle)} if samples.shape[1] > 1 else found


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
            answer = _answer(message, weights, incumbents) if message else this_machine()
        except Exception as error:  # whatever it is, the candidate cannot be used
            text = (str(error).strip().splitlines() or [""])[-1]
            answer = {"failure": f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
