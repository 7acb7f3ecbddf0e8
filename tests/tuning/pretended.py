"""What the tests of tuning share: layers, records, and a measurer that measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sparse_tvm.machine_state import State
from sparse_tvm.operators import Bias, Dense, Layout, WeightedOperator, from_json, to_json
from sparse_tvm.sparsity.masks import prune_array
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.targets import get_target
from sparse_tvm.tuning.job import Job
from sparse_tvm.tuning.measuring import Measurer
from sparse_tvm.tuning.provenance import here
from sparse_tvm.tuning.records import Condition, Problem, Record

NATIVE = get_target().name
DENSE, CSR = Layout("matmul", "dense", (6, 1)), Layout("matmul", "csr")


def sparse_weight(n: int = 96, k: int = 64, sparsity: float = 0.9) -> np.ndarray:
    w = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    return prune_array(w, sparsity, "unstructured") if sparsity else w


def layer_of(w: np.ndarray) -> Dense:
    return Dense(layer="fc", matrix=(w.shape[0], w.shape[1]), epilogue=(Bias(),))


def job(
    op: WeightedOperator,
    layout: Layout,
    leading: Sequence[int | None] = (None,),
    tokens: Sequence[int] = (1, 20),
    threads: Sequence[int] = (1,),
) -> Job:
    """What a worker is told of a candidate."""
    return {
        "backend": "cpu",
        "target": NATIVE,
        "operator": op.name,
        "call": to_json(replace(op, layer="", layout=layout)),
        "leading": list(leading),
        "weight": op.name,
        "tokens": list(tokens),
        "threads": list(threads),
        "copies": 4,
        "seconds": 0.01,
        "beside": None,
    }


def schedule_job(function: str, expected: str, schedule: str | None, **changes: Any) -> Any:
    """What a worker is told of a schedule of an operator."""
    return {
        "backend": "cpu",
        "target": NATIVE,
        "function": function,
        "arguments": None,
        "expected": expected,
        "schedule": schedule,
        "samples": 0,
        "tokens": [1],
        "copies": 1,
        "threads": [1],
        "seconds": 0.01,
        "beside": None,
        **changes,
    }


def record(
    w: np.ndarray,
    layout: Layout,
    seconds: float | None,
    tokens: int = 128,
    threads: int = 1,
    date: str = "2026-01-01T00:00:00+00:00",
    target: str = NATIVE,
    copies: int = 2,
    **provenance: str,
) -> Record:
    """What measuring a layer of this weight would leave."""
    weight = MeasuredWeight(w)
    stored = weight.stored_blocks(layout.block) if layout.sparse else w.size // layout.block[0]
    return Record(
        Problem.of(layer_of(w), weight, target),
        Condition(tokens, threads),
        layout,
        stored,
        copies,
        seconds,
        0.01,
        None if seconds is not None else "killed by SIGABRT",
        replace(here(date), **provenance),
    )


SILENT: State = {
    "cpu": 0,
    "governor": None,
    "mhz": None,
    "least_mhz": None,
    "most_mhz": None,
    "highest_mhz": None,
    "zones": [],
    "throttled": None,
    "firmware": None,
}
"""What a machine says that says nothing."""


class Pretender(Measurer):
    """Answers from a function of the layout, and remembers what it was asked.

    ``clock`` and ``state`` are what its machine is observed to be, at each look.
    """

    def __init__(
        self,
        seconds: Callable[[Layout], float],
        noise: float = 0.0,
        clock: Callable[[], float] = lambda: 1.0,
        state: Callable[[], State] = lambda: SILENT,
    ) -> None:
        super().__init__()
        self.jobs: list[Any] = []
        self._seconds, self._noise = seconds, noise
        self._clock, self._state = clock, state

    def observe(self) -> dict[str, Any]:
        return {"clock": self._clock(), "state": self._state()}

    def __call__(self, job: Any, matrix: np.ndarray) -> dict[str, Any]:
        self.jobs.append(job)
        layout = from_json(job["operator"], job["call"]).stored
        same = {"noise": self._noise, "clock": self._clock()}
        results = [
            {"tokens": t, "threads": n, "seconds": self._seconds(layout), **same}
            for t in job["tokens"]
            for n in job["threads"]
        ]
        return {
            "title": "pretended",
            "copies": job["copies"],
            "results": results,
            "state": self._state(),
        }
