"""The tuner: which candidate of which kernel is measured next, until time or trials are used up.

Every kernel gets its turns in rounds, so that whenever tuning ends, each has had its most promising
candidates measured. First come what is chosen without measuring and, by prediction, the fastest of
dense and sparse forms, which are what the compiler compares; then what is predicted to be fastest,
where predictions are corrected by what was measured of the same format and block. Candidates that
are so predicted to be far from the best are left alone.

Each candidate takes turns with the one that is chosen without measuring, and its seconds are as
many times those as it took as long beside it: so all are of one state of the clock. The fastest of
many measurements is too good to be true, so the best is measured once more, for longer, at the end,
and then whichever is best after that, until the few best all are.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import ceil, inf
from pathlib import Path
from statistics import median
from typing import Any

from sparse_tvm.backends import BackendTarget, resolve_target
from sparse_tvm.compilation import in_model_precision
from sparse_tvm.errors import OptionError
from sparse_tvm.files import check_writable
from sparse_tvm.frontends.detect import open_source
from sparse_tvm.frontends.input_shapes import InputShapes
from sparse_tvm.frontends.source import SourceOptions
from sparse_tvm.operators import Layout, to_json
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.program import Program
from sparse_tvm.passes.set_precision import check_precisions
from sparse_tvm.targets import NATIVE, Target
from sparse_tvm.tuning.evidence import Evidence
from sparse_tvm.tuning.job import Job, Machine
from sparse_tvm.tuning.kernel import Kernel, kernel_of
from sparse_tvm.tuning.layers import layers_of
from sparse_tvm.tuning.measuring import Measurer
from sparse_tvm.tuning.provenance import measured_on
from sparse_tvm.tuning.records import (
    Condition,
    Record,
    Records,
    append_record,
    read_records,
    tidy,
)
from sparse_tvm.tuning.rest import RestTuner, ScheduleTrial, rest_of
from sparse_tvm.tuning.rest_operator import RestOperator
from sparse_tvm.tuning.throttling import Notice, SteadyMeasurer

PathLike = str | os.PathLike[str]

TRIALS = 16
"""Candidates of a kernel that are measured unless told otherwise."""

_NOISY = 0.2
"""Distance of the quartiles, as a share of the median, from which on a user should know."""

_SECONDS = 0.1
"""How long one timing of a candidate takes."""

_FINAL_SECONDS = 0.4
"""How long the best are timed once more."""

_LAYERS = 0.7
"""Share of the time for layers; other operators have what is left."""

_SEARCH = 0.8
"""Share of the time after which no other candidate is tried."""


@dataclass(frozen=True)
class Trial:
    """A candidate that was measured.

    Attributes
    ----------
    kernel : Kernel
        Of which kernel.
    layout : Layout
        The candidate.
    records : list[Record]
        One for each condition.
    left : int
        Candidates of all kernels that are still to come, at most.
    """

    kernel: Kernel
    layout: Layout
    records: list[Record]
    left: int


Progress = Callable[[Trial | ScheduleTrial | Notice], None]


@dataclass(frozen=True)
class Tuned:
    """What tuning came to.

    Attributes
    ----------
    kernels : Sequence[Kernel]
        All of the model's layers', in the order of their weight.
    operators : Sequence[RestOperator]
        Attention, and those without a kernel of ours.
    remarks : Sequence[str]
        What was left out, or passed over in the records.
    """

    kernels: Sequence[Kernel]
    operators: Sequence[RestOperator]
    remarks: Sequence[str]


def tune(
    model: Any,
    records: PathLike,
    *,
    target: str = "native",
    trials: int = TRIALS,
    seconds: float | None = None,
    layers: str | None = None,
    tokens: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    precision: str | None = None,
    input_shapes: InputShapes | None = None,
    allow_pickle: bool = False,
    measurer: Measurer | None = None,
    progress: Progress | None = None,
    exhaustive: bool = False,
    operators: bool = True,
    ignore_throttling: bool = False,
) -> Tuned:
    """Measure candidates for the kernels of a model, and keep what they take.

    What ``records`` has of them already is not measured again.

    Parameters
    ----------
    model : path, torch.nn.Module, keras.Model or onnx.ModelProto
        As :func:`sparse_tvm.compile` takes it.
    records : path
        The file that measurements are added to, each as soon as it is made.
    target : str
        A target that this machine runs.
    trials : int
        Candidates per kernel, at most.
    seconds : float | None
        How long to measure; None without a limit.
    layers : str | None
        A regular expression; only layers, and other operators, whose name it matches are tuned.
    tokens : Sequence[int] | None
        Numbers of tokens to measure where run time decides; by default typical ones.
    threads : Sequence[int] | None
        Numbers of threads to measure; by default 1 and all cores.
    precision : str | None
        As :func:`sparse_tvm.compile` takes it.
    input_shapes, allow_pickle
        As :func:`sparse_tvm.compile` takes them.
    measurer : Measurer | None
        What measures; by default a worker process.
    progress : Callable[[Trial | ScheduleTrial | Notice], None] | None
        Called after each candidate, and when there is something to say of the machine.
    exhaustive : bool
        Measure those too that are predicted to be far from the best, as far as `trials` goes.
    operators : bool
        Tune attention, and operators without a kernel of ours, as well.
    ignore_throttling : bool
        Go on however hot the machine is, and however slow its clock.

    Raises
    ------
    SparseTvmError
        A subclass that says what is wrong with the model, an option, the records or the machine.
    """
    if trials < 1:
        raise OptionError(f"trials must be at least 1, not {trials}")
    pattern = _pattern(layers)
    check_writable(records)
    with measurer if measurer is not None else Measurer() as own:
        machine = own.machine()
        threads = _threads(threads, machine)
        context = _context(target, precision, machine)
        program, context = _imported(model, context, precision, input_shapes, allow_pickle)
        found, left_out = layers_of(program, context)
        found = [one for one in found if any(pattern.search(layer) for layer in one.layers)]
        if tokens:
            found = [one.at(_positive(tokens, "tokens")) for one in found]
        path, started = Path(records), time.monotonic()
        known = _known(path, machine)
        kernels = [kernel_of(one, context, known, threads, exhaustive) for one in found]
        tuner = _Tuner(context, machine, kernels, threads, path, progress)
        limit, rest = inf if seconds is None else seconds, _Rest([], [])
        steady = SteadyMeasurer(own, progress or _silent, ignore=ignore_throttling)
        try:
            tuner.run(steady, trials, limit * (_LAYERS if operators else 1))
            if operators:
                rest = _Rest.of(program, context, _known(path, machine), pattern, tokens)
                left = limit - (time.monotonic() - started)
                rest.tuner(tuner).run(steady, trials, left)
        finally:
            if path.exists():
                tidy(path)
    if not found and not rest.operators:
        raise OptionError(
            "there is nothing to tune" + (f" that matches {layers!r}" if layers else ""),
            hint="; ".join([*left_out, *rest.left_out])
            or "`sparse-tvm inspect MODEL` lists the layers",
        )
    remarks = [*known.remarks, *left_out, *rest.left_out, *tuner.doubts(), *steady.remarks()]
    return Tuned(kernels, rest.operators, remarks)


def _silent(notice: Notice) -> None:
    """What tells nobody."""


def _known(path: Path, machine: Machine) -> Records:
    """What was measured on a machine before."""
    return read_records([path], machine["cpu"]) if path.exists() else Records()


@dataclass(frozen=True)
class _Rest:
    """Operators without a kernel, and why some were left out."""

    operators: Sequence[RestOperator]
    left_out: Sequence[str]
    known: Records = field(default_factory=Records)

    @classmethod
    def of(
        cls,
        program: Program,
        context: Context,
        known: Records,
        pattern: re.Pattern[str],
        tokens: Sequence[int] | None,
    ) -> _Rest:
        """Those of a model whose layers are as measurements so far have them."""
        found, left_out = rest_of(program, replace(context, evidence=Evidence(known)), tokens)
        return cls([one for one in found if pattern.search(one.title)], left_out, known)

    def tuner(self, tuner: _Tuner) -> RestTuner:
        """What tunes them where, and as, layers are tuned."""
        schedules, how = self.known.schedules, (tuner.threads, tuner.path, tuner.progress)
        return RestTuner(tuner.context, tuner.machine, self.operators, schedules, *how)


def _imported(
    model: Any,
    context: Context,
    precision: str | None,
    input_shapes: InputShapes | None,
    allow_pickle: bool,
) -> tuple[Program, Context]:
    """The model as the compiler imports it, and the precision that it gets there."""
    options = SourceOptions(allow_pickle=allow_pickle, input_shapes=input_shapes or {})
    imported = open_source(model, options).load(input_shapes)
    context = in_model_precision(context, imported, precision)
    return Program(imported.module, dict(imported.weights), dict(imported.layers)), context


@dataclass
class _Tuner:
    context: Context
    machine: Machine
    kernels: Sequence[Kernel]
    threads: Sequence[int]
    path: Path
    progress: Progress | None
    noise: list[float] = field(default_factory=list)

    def doubts(self) -> Iterator[str]:
        """Why the measurements should not be trusted, if so."""
        if self.noise and median(self.noise) > _NOISY:
            yield (
                f"half of the timings varied by more than {median(self.noise):.0%}: something else "
                "runs on this machine; `sparse-tvm doctor` may tell"
            )

    def run(self, measurer: SteadyMeasurer, trials: int, limit: float | None) -> None:
        """Measure round by round, and in the end the best ones once more."""
        started, limit = time.monotonic(), inf if limit is None else limit
        for kernel, layout in self._rounds(trials):
            if time.monotonic() - started > _SEARCH * limit:
                break
            records = self._measure(measurer, kernel, layout, _SECONDS)
            kernel.fresh = True
            if self.progress is not None:
                self.progress(Trial(kernel, layout, records, self._left(trials)))
        for kernel in self.kernels:
            while kernel.fresh and (finalist := kernel.finalist()) is not None:
                if time.monotonic() - started > limit:
                    return
                kernel.confirmed.add(finalist)
                self._measure(measurer, kernel, finalist, _FINAL_SECONDS)

    def _measure(
        self, measurer: SteadyMeasurer, kernel: Kernel, layout: Layout, seconds: float
    ) -> list[Record]:
        """Measure a candidate, and keep what it took."""
        answer = measurer(self._job(kernel, layout, seconds), kernel.layer.matrix)
        records = list(self._records(kernel, layout, answer))
        for record in records:
            append_record(self.path, record)
            if record.seconds is None:
                kernel.failed.add(layout)
                kernel.measured.pop(layout, None)
            else:
                self.noise.append(record.noise)
                kernel.measured.setdefault(layout, {})[record.condition] = record.seconds
        return records

    def _rounds(self, trials: int) -> Iterator[tuple[Kernel, Layout]]:
        while True:
            waiting = False
            for kernel in self.kernels:
                layout = kernel.next() if kernel.tried < trials else None
                if layout is not None:
                    waiting = True
                    yield kernel, layout
            if not waiting:
                return

    def _left(self, trials: int) -> int:
        return sum(
            min(trials, len(kernel.predicted)) - min(trials, kernel.tried)
            for kernel in self.kernels
            if kernel.next() is not None
        )

    def _job(self, kernel: Kernel, layout: Layout, seconds: float) -> Job:
        layer, op = kernel.layer, kernel.layer.problem.op
        paired = kernel.untuned in kernel.measured and layout != kernel.untuned
        return {
            "backend": self.context.backend.name,
            "target": self.context.target.name,
            "operator": layer.call.op.name,
            "call": to_json(replace(op, layout=layout)),
            "leading": list(layer.call.leading),
            "weight": str(self.kernels.index(kernel)),
            "tokens": list(layer.tokens),
            "threads": list(self.threads),
            "copies": ceil(layer.weight.copies),
            "seconds": seconds,
            "beside": to_json(replace(op, layout=kernel.untuned)) if paired else None,
        }

    def _records(
        self, kernel: Kernel, layout: Layout, answer: Mapping[str, Any]
    ) -> Iterator[Record]:
        weight = kernel.layer.weight
        n, k = kernel.layer.call.op.matrix
        rows = layout.block[0]
        stored = weight.stored_blocks(layout.block) if layout.sparse else -(-n // rows) * k
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        failure = answer.get("failure")
        results = answer.get("results") or [
            {"tokens": tokens, "threads": threads, "seconds": None, "noise": 0.0}
            for tokens in kernel.layer.tokens
            for threads in self.threads
        ]
        for result in results:
            condition, seconds = Condition(result["tokens"], result["threads"]), result["seconds"]
            if "relative" in result:
                seconds = result["relative"] * kernel.measured[kernel.untuned][condition]
            yield Record(
                kernel.layer.problem,
                condition,
                layout,
                stored,
                answer.get("copies", 0),
                seconds,
                result["noise"],
                failure,
                measured_on(self.machine, now, result.get("pace")),
            )


def _context(name: str, precision: str | None, machine: Machine) -> Context:
    backend, target = resolve_target(name)
    fitting = [known for known in backend.targets if _fits(known, machine)]
    if name == NATIVE and target not in fitting and fitting:
        target = fitting[0]  # of another machine than this one
    if backend.device != "cpu" or target not in fitting:
        raise OptionError(
            f"target {target.name} does not run on {machine['cpu']}, so nothing can be measured",
            hint="tune on a machine of that kind, or with --host, and pass the records on",
        )
    context = Context(backend, target, FormatOptions.parse(precision=precision or "fp32"))
    check_precisions(context)
    return context


def _fits(target: BackendTarget, machine: Machine) -> bool:
    """Whether a machine has what the target's code needs; backends of others have to know."""
    if not isinstance(target, Target):
        return True
    fits = target.architecture == machine["architecture"]
    return fits and set(target.features) <= set(machine["features"])


def _threads(threads: Sequence[int] | None, machine: Machine) -> Sequence[int]:
    cores = machine["cores"]
    chosen = _positive(threads or [1, cores], "threads")
    if max(chosen) > cores:
        raise OptionError(f"{max(chosen)} threads on {cores} cores of {machine['cpu']}")
    return chosen


def _positive(numbers: Sequence[int], what: str) -> Sequence[int]:
    for number in numbers:
        if number < 1:
            raise OptionError(f"{what} must be at least 1, not {number}")
    return list(dict.fromkeys(numbers))


def _pattern(text: str | None) -> re.Pattern[str]:
    try:
        return re.compile(text or "")
    except re.error as error:
        raise OptionError(f"--layer {text!r}: bad regular expression: {error}") from error
