"""The process that builds and times kernels: one job a line in, one result a line out.

``python -m sparse_tvm.tuning.worker`` reads jobs from standard input, weights in front of them, and
answers on standard output; asked to observe, it answers how fast its clock is. Or it only builds,
for a :mod:`~sparse_tvm.tuning.runner` on another machine to time. It is a process of its own so
that a kernel which aborts, hangs or uses an instruction that the CPU lacks takes nothing else with
it; :mod:`~sparse_tvm.tuning.measuring` notices and starts another.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tvm.machine_state import observe
from sparse_tvm.tuning.building import Built
from sparse_tvm.tuning.job import Job
from sparse_tvm.tuning.runner import Side, answers, failure_of, measure, prepare
from sparse_tvm.tuning.schedule_worker import ScheduleWorker


def build(job: Job, w: np.ndarray) -> Built:
    """Build the kernel of a candidate for the weight ``[N, K]``."""
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
    arguments = {tokens: kernel.arguments(call.sizes(tokens)) for tokens in job["tokens"]}
    return Built(kernel.function, target, kernel.weight, arguments, kernel.title)


def _answer(
    job: Job, weights: Mapping[str, np.ndarray], incumbents: dict[str, Side]
) -> Mapping[str, Any]:
    """Build and time a candidate, in turns with an incumbent that is built once."""
    w, sides = weights[job["weight"]], []
    if job["beside"] is not None:
        incumbent: Job = {**job, "call": job["beside"], "beside": None}
        key = json.dumps([job["weight"], job["operator"], job["leading"], job["beside"]])
        if key not in incumbents:
            incumbents[key] = build(incumbent, w).side()
        sides.append(incumbents[key])
    candidate = build(job, w)
    return {"title": candidate.title, **measure([*sides, candidate.side()], job)}


def serve() -> None:
    """Answer jobs until there are no more."""
    replies = answers()
    prepare()
    schedules = ScheduleWorker()
    weights: dict[str, np.ndarray] = {}
    incumbents: dict[str, Side] = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "npy" in message:
            array = np.load(io.BytesIO(base64.b64decode(message["npy"])))
            weights[message["weight"]] = array
            continue
        answer: Mapping[str, Any]
        try:
            job = message.get("ship", message)
            if "observe" in job:
                answer = observe()
            elif job is not message:
                one = (
                    schedules.build(job)
                    if "function" in job
                    else build(job, weights[job["weight"]])
                )
                answer = one.ship(Path(message["path"]))
            elif "function" in job:
                answer = schedules(job)
            else:
                answer = _answer(job, weights, incumbents)
        except Exception as error:  # whatever it is, the candidate cannot be used
            answer = failure_of(error)
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    serve()
