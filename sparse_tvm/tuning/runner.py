"""Running and timing functions that are built, on this machine or another one.

``serve`` is what another machine runs: it is sent this file and the few that it needs, then
libraries, weights and the shapes of arguments, a line of JSON each, and answers with what they
took. It needs NumPy, ``tvm_ffi`` and ``libtvm_runtime`` only, no compiler and no sparse-tvm.

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
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tvm.cpu import (
    allow_amx,
    architecture,
    cpu_model,
    host_features,
    usable_cores,
    use_threads,
)
from sparse_tvm.errors import ArtifactError
from sparse_tvm.machine_state import clock, observe, read_state
from sparse_tvm.tuning.timing import Calls, compare
from sparse_tvm.vm import runtime

Argument = int | list[Any] | None
"""A number; ``[shape, dtype, modulus]`` of an array; None for a part of the weight."""

_LEAST_COPIES = 2
_MOST_BYTES = 1 << 29
"""Of all copies of a weight."""

_ALIGNMENT = 64
_TOLERANCE = 1e-3
"""By how much of the largest value results may differ: sums are taken in another order."""

CAUSAL = 0
"""Of an array of floats, in place of what whole numbers are below: it is a causal mask."""

_HIDDEN = float(np.finfo(np.float32).min)
_VALUES = np.random.default_rng(0).standard_normal(1 << 16, np.float32)


def random_array(shape: Sequence[int], dtype: str, modulus: int = 3) -> np.ndarray:
    """Values that take no kernel longer than others: normal ones, and small whole numbers.

    Parameters
    ----------
    modulus : int
        Whole numbers are below it: 1 where they may be indices into anything. ``CAUSAL`` for a
        mask ``[..., tiles, keys, queries of a tile]``.
    """
    if modulus == CAUSAL:
        return _causal(shape).astype(dtype)
    count = prod(shape)
    if np.dtype(dtype).kind == "f":
        return np.resize(_VALUES, count).astype(dtype).reshape(shape)
    return (np.arange(count) % modulus).astype(dtype).reshape(shape)


def _causal(shape: Sequence[int]) -> np.ndarray:
    """A mask that shows each query the keys up to its own, the last query all of them."""
    *_, tiles, keys, lanes = shape
    query = np.arange(tiles * lanes).reshape(tiles, 1, lanes) + max(0, keys - tiles * lanes)
    hidden = np.arange(keys)[:, None] > query
    return np.broadcast_to(np.where(hidden, _HIDDEN, 0.0), shape)


@dataclass(frozen=True)
class Side:
    """A function that is built, the same with nothing in it, and what it is called with.

    Attributes
    ----------
    run, idle : Callable[..., Any]
        The functions.
    weight : Mapping[int, np.ndarray]
        The arrays that a layer's weight became, by their place among the arguments.
    arguments : Mapping[int, Sequence[Argument]]
        All arguments, by the number of tokens.
    """

    run: Callable[..., Any]
    idle: Callable[..., Any]
    weight: Mapping[int, np.ndarray]
    arguments: Mapping[int, Sequence[Argument]]

    @property
    def nbytes(self) -> int:
        """Size of one copy of the weight."""
        return sum(array.nbytes for array in self.weight.values())

    def copies(self, count: int) -> list[dict[int, Any]]:
        """The weight's arrays so many times, as far as there is room."""
        if not self.weight:
            return [{}]
        count = max(_LEAST_COPIES, min(count, _MOST_BYTES // self.nbytes))
        return [{at: _tensor(array) for at, array in self.weight.items()} for _ in range(count)]

    def rotation(self, tokens: int, copies: Sequence[dict[int, Any]]) -> list[list[Any]]:
        """Lists of arguments that share all but the weight, of which each has a copy."""
        shared = [
            _tensor(random_array(*one)) if isinstance(one, list) else one
            for one in self.arguments[tokens]
        ]
        return [[own.get(place, a) for place, a in enumerate(shared)] for own in copies]

    def results(self) -> list[np.ndarray]:
        """All its arrays after a call, results among them; it has no weight."""
        (arguments,) = self.arguments.values()
        made = [_aligned(random_array(*a)) if isinstance(a, list) else a for a in arguments]
        self.run(*(_from_dlpack(a) if isinstance(a, np.ndarray) else a for a in made))
        return [a for a in made if isinstance(a, np.ndarray)]


def measure(sides: Sequence[Side], job: Mapping[str, Any]) -> dict[str, Any]:
    """Time the last of one or two functions under all conditions, in turns with the first.

    ``job`` has ``tokens`` and ``threads``, a list each, ``copies`` and ``seconds``, as
    :class:`sparse_tvm.tuning.job.Job` has them. Beside each result stands the slower ``clock``
    before and after it, beside all what the machine's ``state`` is then.
    """
    results = []
    copies = [side.copies(job["copies"]) for side in sides]
    for tokens in job["tokens"]:
        rotations = [side.rotation(tokens, each) for side, each in zip(sides, copies, strict=True)]
        for threads in job["threads"]:
            use_threads(threads)
            calls = [
                Calls(side.run, rotation, side.nbytes * len(each))
                for side, rotation, each in zip(sides, rotations, copies, strict=True)
            ]
            idle = [Calls(s.idle, r[:1], 0) for s, r in zip(sides, rotations, strict=True)]
            before = clock()
            found = compare(calls, idle, job["seconds"])
            found["clock"] = max(before, clock())
            results.append({"tokens": tokens, "threads": threads, **found})
    return {"copies": len(copies[-1]), "results": results, "state": read_state()}


def alike(results: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> bool:
    """Whether results are equal but for the order in which sums are taken."""
    for found, right in zip(results, expected, strict=True):
        if right.dtype.kind not in "fiu":
            if not np.array_equal(found, right):
                return False
            continue
        finite = right[np.isfinite(right)]
        size = float(np.abs(finite).max(initial=0))
        if not np.allclose(found, right, _TOLERANCE, _TOLERANCE * size, equal_nan=True):
            return False
    return True


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy where kernels may read it with aligned loads."""
    memory = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _from_dlpack(array: np.ndarray) -> Any:
    return runtime().from_dlpack(array)


def _tensor(array: np.ndarray) -> Any:
    return _from_dlpack(_aligned(array))


class Runner:
    """Answers messages on another machine."""

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}
        self._weights: dict[str, dict[int, np.ndarray]] = {}
        self._refused: dict[str, Exception] = {}

    def load(self, message: Mapping[str, Any]) -> None:
        """Take a library, and the weight that its kernel reads; what fails is told when asked."""
        self._refused.pop(message["load"], None)
        try:
            self._load(message)
        except Exception as error:  # no room, another C library: of many kinds
            self._refused[message["load"]] = error

    def _load(self, message: Mapping[str, Any]) -> None:
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(base64.b64decode(message["library"]))
            file.flush()
            self._functions[message["load"]] = runtime().load_module(file.name)
        arrays = np.load(io.BytesIO(base64.b64decode(message["weight"])))
        self._weights[message["load"]] = {int(place): arrays[place] for place in arrays.files}

    def __call__(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Time what was loaded, after comparing its results with others if that is asked for."""
        sides = [self._side(one) for one in message["sides"]]
        expected = message["expected"]
        if expected is not None:
            right = self._side(expected).results()
            if not alike(sides[-1].results(), right):
                return {"failure": OTHER_RESULTS}
        answer = measure(sides, message)
        for key in message["forget"]:
            del self._functions[key], self._weights[key]
        return answer

    def _side(self, described: Mapping[str, Any]) -> Side:
        if described["key"] in self._refused:
            raise self._refused[described["key"]]
        library = self._functions[described["key"]]
        arguments = {int(tokens): found for tokens, found in described["arguments"].items()}
        weight = self._weights[described["key"]]
        return Side(library["kernel"], library["idle"], weight, arguments)


OTHER_RESULTS = "its results are other ones"


def prepare() -> None:
    """Load TVM's runtime as a process needs it that times kernels.

    Raises
    ------
    ArtifactError
        When it is not installed.
    """
    # Two threads may share a core for long otherwise; but TVM binds them to the first cores.
    every_core = len(os.sched_getaffinity(0)) == os.cpu_count()
    os.environ["TVM_BIND_THREADS"] = str(int(every_core))
    allow_amx()
    runtime()  # sets the other defaults of the thread pool, before TVM loads


def failure_of(error: Exception) -> dict[str, str]:
    """What an answer says of an exception."""
    text = (str(error).strip().splitlines() or [""])[-1]
    return {"failure": f"{type(error).__name__}: {text}"}


def answers() -> Any:
    """Where answers go: whatever a kernel or a compiler prints is none."""
    found = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return found


def _machine() -> dict[str, Any]:
    """This machine, as :class:`sparse_tvm.tuning.job.Machine` has it, and its runtime."""
    return {
        "cpu": cpu_model(),
        "architecture": architecture(),
        "features": sorted(host_features()),
        "cores": usable_cores(),
        "tvm": metadata.version("apache-tvm"),
    }


def serve() -> None:
    """Answer until there are no more messages."""
    replies, runner = answers(), Runner()
    try:
        prepare()
    except ArtifactError as error:
        sys.exit(str(error))
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if "load" in message:
            runner.load(message)
            continue
        answer: Mapping[str, Any]
        try:
            if "observe" in message:
                answer = observe()
            else:
                answer = runner(message) if message else _machine()
        except Exception as error:  # whatever it is, the candidate cannot be used
            answer = failure_of(error)
        print(json.dumps(answer), file=replies, flush=True)


def bundle() -> bytes:
    """A zip file of all that ``serve`` needs: this file and those that it imports."""
    import zipfile

    here = Path(__file__).parents[1]
    files = ("cpu", "errors", "devices", "machine_state", "vm", "tuning/timing", "tuning/runner")
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as file:
        for package in ("__init__", "tuning/__init__"):
            file.writestr(f"sparse_tvm/{package}.py", "")
        for name in files:
            file.write(here / f"{name}.py", f"sparse_tvm/{name}.py")
    return memory.getvalue()


BOOT = (
    "import sys, tempfile; i = sys.stdin.buffer; f = tempfile.NamedTemporaryFile(suffix='.zip'); "
    "f.write(i.read(int(i.readline()))); f.flush(); sys.path.insert(0, f.name); "
    "from sparse_tvm.tuning.runner import serve; serve()"
)
"""A program that reads the length of :func:`bundle` and the file itself, and serves."""
