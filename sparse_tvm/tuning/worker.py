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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
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
_MOST_BYTES = 1 << 30
"""Of all copies of a weight."""


@dataclass(frozen=True)
class Built:
    """A candidate that is compiled, and has yet to be timed."""

    job: Job
    kernel: LayerKernel
    sizes: Callable[[int], Sequence[int]]
    run: Callable[..., Any]
    idle: Callable[..., Any]

    def measure(self) -> dict[str, Any]:
        """Time it under all conditions."""
        from sparse_tvm.machine_limits import use_threads

        job, kernel = self.job, self.kernel
        copies, results = _copies(kernel.weight, job["copies"]), []
        for tokens in job["tokens"]:
            rotation = _rotation(kernel.arguments(self.sizes(tokens)), copies)
            for threads in job["threads"]:
                use_threads(threads)
                overhead, _ = _timed(self.idle, rotation[:1], job["seconds"] / 10)
                seconds, noise = _timed(self.run, rotation, job["seconds"])
                seconds = max(seconds - overhead, _LEAST_SECONDS)
                results.append(
                    {"tokens": tokens, "threads": threads, "seconds": seconds, "noise": noise}
                )
        rotated = len(copies) * sum(array.nbytes for array in kernel.weight.values())
        return {"title": kernel.title, "rotated_bytes": rotated, "results": results}


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


def _timed(
    run: Callable[..., Any], rotation: Sequence[Sequence[Any]], budget: float
) -> tuple[float, float]:
    """Median seconds of a call, and the distance of the quartiles as a share of it."""
    for arguments in rotation:
        run(*arguments)
    samples: list[float] = []
    at, per_pass, deadline = 0, 1, time.perf_counter() + budget
    while len(samples) < _LEAST_PASSES or time.perf_counter() < deadline:
        chosen = [rotation[(at + i) % len(rotation)] for i in range(per_pass)]
        at += per_pass
        started = time.perf_counter()
        for arguments in chosen:
            run(*arguments)
        seconds = time.perf_counter() - started
        if seconds < _PASS_SECONDS / 2 and not samples:
            per_pass = max(2 * per_pass, int(per_pass * _PASS_SECONDS / max(seconds, 1e-6)))
            continue
        samples.append(seconds / per_pass)
    low, _, high = quantiles(samples, n=4)
    middle = median(samples)
    return middle, (high - low) / middle


def serve() -> None:
    """Answer jobs until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a kernel or a compiler prints is no answer
    os.environ["TVM_BIND_THREADS"] = "1"  # two threads may share a core for long otherwise
    allow_amx()
    runtime()  # sets the other defaults of the thread pool, before TVM loads
    weights: dict[str, np.ndarray] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "npy" in message:
            array = np.load(io.BytesIO(base64.b64decode(message["npy"])))
            weights[message["weight"]] = array
            continue
        answer: Mapping[str, Any]
        try:
            answer = (
                built(message, weights[message["weight"]]).measure() if message else this_machine()
            )
        except Exception as error:  # whatever it is, the candidate cannot be used
            text = (str(error).strip().splitlines() or [""])[-1]
            answer = {"failure": f"{type(error).__name__}: {text}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
