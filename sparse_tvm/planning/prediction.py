"""What a model takes, however it is pruned: layers by their costs, and the rest beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sparse_tvm.cpu import cpu_model, usable_cores
from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.planning.costs import Costs
from sparse_tvm.planning.rest import rest_seconds
from sparse_tvm.planning.settings import DENSE, Setting, settings_of
from sparse_tvm.planning.subject import PlannedLayer, Subject
from sparse_tvm.planning.trials import Trial, build_trials, measure_trials, trial_settings
from sparse_tvm.targets import Target, runs_here


@dataclass(frozen=True)
class Prediction:
    """Seconds and bytes of a model under any settings.

    Attributes
    ----------
    subject : Subject
        The model.
    costs : Costs
        Of its layers.
    layers : Sequence[PlannedLayer]
        Those that pruning can make faster.
    threads : int
        How many run.
    rest_seconds : float
        Of all else, layers that pruning makes no faster included.
    cpu : str | None
        What was measured on; None where nothing was.
    trials : Sequence[Trial]
        What was measured.
    """

    subject: Subject
    costs: Costs
    layers: Sequence[PlannedLayer]
    threads: int
    rest_seconds: float
    cpu: str | None = None
    trials: Sequence[Trial] = ()

    def seconds(self, settings: Mapping[str, Setting]) -> float:
        """Seconds of a run, by the settings of layers that are pruned."""
        return self.rest_seconds + sum(
            self.costs.seconds(layer, settings.get(layer.name, DENSE)) for layer in self.layers
        )

    def nbytes(self, settings: Mapping[str, Setting]) -> float:
        """Bytes of all weights."""
        return self.rest_bytes + sum(
            self.costs.nbytes(layer, settings.get(layer.name, DENSE)) for layer in self.layers
        )

    @property
    def rest_bytes(self) -> float:
        """Bytes of all other weights."""
        layers = sum(4 * layer.ref.shape[0] * layer.ref.shape[1] for layer in self.layers)
        return max(0, self.subject.weight_bytes - layers)

    def uniform(self, setting: Setting) -> dict[str, Setting]:
        """The same setting for all layers."""
        return {layer.name: setting for layer in self.layers}

    @property
    def worst_error(self) -> float | None:
        """By how much the worst trial is off, relatively; None where nothing was measured."""
        if not self.trials:
            return None
        outside = _outside(self.trials)
        return max(
            abs(self.seconds(one.settings) / (one.seconds + outside) - 1) for one in self.trials
        )


def predict(
    subject: Subject,
    structures: Sequence[str],
    *,
    threads: int | None = None,
    measure: bool | None = None,
    records: Sequence[Any] = (),
    progress: Callable[[str], None] = lambda phase: None,
) -> Prediction:
    """Learn what a model takes.

    Parameters
    ----------
    subject : Subject
        The model.
    structures : Sequence[str]
        Which structures are asked for.
    threads : int | None
        How many run; by default all cores.
    measure : bool | None
        Compile and time trials, or trust predictions; by default measure where the target's code
        runs on this machine.
    records : Sequence[path]
        Of `sparse-tvm tune`: what the compiler will choose layouts by.
    progress : Callable[[str], None]
        Called with what comes next.

    Raises
    ------
    OptionError
        When measuring is asked for and cannot be.
    """
    target = subject.context.target
    here = isinstance(target, Target) and runs_here(target)
    if measure and not here:
        raise OptionError(
            f"target {target.name} does not run on this {cpu_model()}, so it cannot be measured",
            hint="leave --measure out: times are then predicted",
        )
    if here and measure is not False:
        return _measured(subject, structures, threads or usable_cores(), records, progress)
    count = (threads or 1) if isinstance(target, Target) else 1  # a device is a single one
    rest = rest_seconds(subject.program, subject.context)
    if rest is None:
        raise OptionError(
            f"nothing is known of what {target.name} takes for what is no layer",
            hint="plan on a machine of that kind",
        )
    costs = Costs(subject.context, count)
    layers = _prunable(subject, costs, structures)
    others = [layer for layer in subject.layers if layer not in layers]
    rest = rest / count + sum(costs.seconds(layer, DENSE) for layer in others)
    return Prediction(subject, costs, layers, count, rest)


def _measured(
    subject: Subject,
    structures: Sequence[str],
    threads: int,
    records: Sequence[Any],
    progress: Callable[[str], None],
) -> Prediction:
    from sparse_tvm.compiler import compile

    build = partial(
        compile,
        target=subject.target_name,
        input_shapes=subject.shapes,
        threads=threads,
        records=records,
        precision=subject.context.options.precision,
        verify=False,
    )
    settings = trial_settings(subject, structures)
    with tempfile.TemporaryDirectory(prefix="sparse-tvm-plan-") as directory:
        paths = build_trials(subject, settings, Path(directory), build, progress)
        progress("time the trials")
        trials = measure_trials(settings, paths, threads)
    return from_trials(subject, trials, structures, threads)


def from_trials(
    subject: Subject, trials: Sequence[Trial], structures: Sequence[str], threads: int
) -> Prediction:
    """A prediction that rests on trials."""
    costs = Costs(subject.context, threads)
    layers = _prunable(subject, costs, structures)
    costs.correct(layers, trials)
    names = [layer.name for layer in layers]
    rest = median(trial.rest(names) for trial in trials)
    return Prediction(subject, costs, layers, threads, rest + _outside(trials), cpu_model(), trials)


def _outside(trials: Sequence[Trial]) -> float:
    """Seconds of a run outside of its kernels: what no trial's fastest run does without."""
    return max(0.0, min(trial.fastest - trial.seconds for trial in trials))


def _prunable(subject: Subject, costs: Costs, structures: Sequence[str]) -> Sequence[PlannedLayer]:
    """Layers that the compiler makes sparse if only enough is zero.

    Raises
    ------
    ModelError
        When there is none.
    """
    furthest = [settings_of(structure)[-1] for structure in structures]
    found = [
        layer
        for layer in subject.layers
        if any(costs.choice(layer.kinds[0], setting).layout.sparse for setting in furthest)
    ]
    if not found:
        raise ModelError(
            f"{subject.name}: pruning makes no layer faster on {subject.context.target.name}",
            hint="layers this small stay dense; try another --structure",
        )
    return found
