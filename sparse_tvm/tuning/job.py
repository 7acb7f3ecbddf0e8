"""What a worker is told, and what it says of its machine."""

from __future__ import annotations

from typing import Any, TypedDict


class Job(TypedDict):
    """A candidate to measure.

    ``call`` is the operator with the layout, as the codec writes it; ``weight`` the name of a
    matrix ``[N, K]`` that the worker was sent; ``leading`` the activations' other extents, null
    where they are free; ``copies`` of the weight take turns; ``seconds`` is how long each timing
    may take. ``beside`` is the operator with the layout that it is held against, null for none.
    """

    backend: str
    target: str
    operator: str
    call: dict[str, Any]
    leading: list[int | None]
    weight: str
    tokens: list[int]
    threads: list[int]
    copies: int
    seconds: float
    beside: dict[str, Any] | None


class ScheduleJob(TypedDict):
    """A schedule of an operator without a kernel, or a form of a kernel, to measure or to list.

    ``function`` is TVM's JSON of it, at concrete sizes; of a kernel, which comes with its
    ``arguments``, :class:`sparse_tvm.tuning.forms.KernelCall` writes it. Without a ``schedule`` the
    worker answers with those that there are, of which it takes so many ``samples``. Results have to
    be those of the schedule ``expected``. ``tokens`` is one number, any one where sizes are
    concrete, and ``copies`` 1: there is no weight.
    """

    backend: str
    target: str
    function: str
    arguments: list[Any] | None
    expected: str
    schedule: str | None
    samples: int
    tokens: list[int]
    threads: list[int]
    copies: int
    seconds: float
    beside: str | None


class Machine(TypedDict):
    """Where a worker runs: its CPU, and the versions of what builds kernels there."""

    cpu: str
    architecture: str
    features: list[str]
    cores: int
    sparse_tvm: str
    tvm: str


def this_machine() -> Machine:
    """The machine that this runs on."""
    from importlib import metadata

    from sparse_tvm import __version__
    from sparse_tvm.cpu import architecture, cpu_model, host_features, usable_cores

    return {
        "cpu": cpu_model(),
        "architecture": architecture(),
        "features": sorted(host_features()),
        "cores": usable_cores(),
        "sparse_tvm": __version__,
        "tvm": metadata.version("apache-tvm"),
    }
