"""What this machine takes: the model compiled a few times, and each layer timed within it.

A trial is the model with every layer pruned in some way, so that over all trials, layers of one
kind meet each structure at more than one sparsity. All trials, the first of which is the model as
it is, are timed in turns, so that whatever else the machine does meets all of them alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np

from sparse_tvm.interleave import time_runs
from sparse_tvm.planning.settings import DENSE, Setting
from sparse_tvm.planning.subject import Kind, Subject
from sparse_tvm.random_inputs import random_inputs
from sparse_tvm.runtime import Model, load

_PROBED = (0.9, 0.7, 0.97, 0.8, 0.95, 0.6)
"""Sparsities that trials try, the most telling first."""

_PER_STRUCTURE = 3
"""Trials for each structure."""

_ROUNDS = 20
"""Short ones, and many: a machine that is shared is slow for seconds at a time."""

_RUN_SECONDS = 0.06
"""Of plain runs in each round."""

_UNDISTURBED = 10
"""Percentile of a call's times that stands for what it takes when nothing else runs. Taken call by
call, as on a shared machine a short call is often left alone, and a whole run hardly ever."""

_TRACED = 2
"""Runs of each round in which every kernel is timed."""

_REPEATED = re.compile(r" \(\d+\)$")
"""What a layer's name ends in where its weight is used once more."""


@dataclass(frozen=True)
class Trial:
    """One pruned model, timed kernel by kernel.

    Attributes
    ----------
    settings : dict[str, Setting]
        How each layer was pruned.
    formats : dict[str, str]
        How the compiler then stored it.
    layers : dict[str, float]
        Seconds of each layer in a run.
    others : float
        Seconds of all other kernels.
    fastest : float
        Seconds of the fastest whole run.
    """

    settings: Mapping[str, Setting]
    formats: Mapping[str, str]
    layers: Mapping[str, float]
    others: float
    fastest: float

    @property
    def seconds(self) -> float:
        """Of all kernels."""
        return self.others + sum(self.layers.values())

    def rest(self, layers: Iterable[str]) -> float:
        """Seconds of all kernels but these layers'."""
        return self.seconds - sum(self.layers[name] for name in layers)


def trial_settings(subject: Subject, structures: Sequence[str]) -> list[dict[str, Setting]]:
    """How the layers are pruned in each trial; the first prunes none."""
    probes = list(
        dict.fromkeys(
            Setting.parse(structure) if ":" in structure else Setting(structure, sparsity)
            for sparsity in _PROBED
            for structure in structures
        )
    )
    count = min(_PER_STRUCTURE * len(structures), len(probes))
    members: Counter[tuple[Kind, ...]] = Counter()
    trials: list[dict[str, Setting]] = [{} for _ in range(count + 1)]
    for layer in subject.layers:
        first = members[layer.kinds] * count
        members[layer.kinds] += 1
        trials[0][layer.name] = DENSE
        for number in range(count):
            trials[1 + number][layer.name] = probes[(first + number) % len(probes)]
    return trials


def build_trials(
    subject: Subject,
    trials: Sequence[Mapping[str, Setting]],
    directory: Path,
    compile: Callable[..., object],
    progress: Callable[[str], None],
) -> list[Path]:
    """Compile the model once for each trial."""
    paths = []
    for number, settings in enumerate(trials):
        progress(f"compile trial {number + 1} of {len(trials)}")
        path = directory / f"trial{number}.so"
        compile(subject.pruned(settings), path)
        paths.append(path)
    return paths


def measure_trials(
    trials: Sequence[Mapping[str, Setting]],
    paths: Sequence[Path],
    threads: int | None,
    rounds: int = _ROUNDS,
) -> list[Trial]:
    """Time all trials in turns."""
    timed = [_Timed(load(path, threads=threads)) for path in paths]
    for _ in range(rounds):
        for one in timed:
            one.round()
    names = set(trials[0])
    return [one.trial(settings, names) for one, settings in zip(timed, trials, strict=True)]


class _Timed:
    """A trial's artifact, and what was timed of it."""

    def __init__(self, model: Model) -> None:
        self._model, self._feed = model, random_inputs(model.inputs)
        self._kernels = model.manifest["kernels"]
        self._fastest = inf
        self._calls: list[list[float]] = []
        self._layers: list[str | None] = []

    def round(self) -> None:
        """A few runs, and a few more with every kernel observed."""
        self._model.run(self._feed)  # brings it back into the caches
        runs = time_runs(lambda: self._model.run(self._feed), _RUN_SECONDS)
        self._fastest = min(self._fastest, *runs)
        for calls in self._model.trace(self._feed, _TRACED):
            observing = min(call.seconds for call in calls)
            self._calls.append([call.seconds - observing for call in calls])
            self._layers = list(self._served(call.function for call in calls))

    def _served(self, functions: Iterable[str]) -> Iterator[str | None]:
        """The layer of each call."""
        seen: Counter[str] = Counter()
        for function in functions:
            served = self._kernels.get(function, {}).get("layers", [])
            at, seen[function] = seen[function], seen[function] + 1
            yield _REPEATED.sub("", served[at]) if at < len(served) else None

    def trial(self, settings: Mapping[str, Setting], names: set[str]) -> Trial:
        """What it came to, for the layers of these names."""
        layers, others = dict.fromkeys(names, 0.0), 0.0
        undisturbed = np.percentile(self._calls, _UNDISTURBED, axis=0)
        for layer, seconds in zip(self._layers, undisturbed, strict=True):
            if layer in names:
                layers[str(layer)] += float(seconds)
            else:
                others += float(seconds)
        formats = {layer["name"]: layer["format"] for layer in self._model.manifest["layers"]}
        return Trial(settings, formats, layers, others, self._fastest)
