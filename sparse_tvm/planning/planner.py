"""From a latency, a speed-up or a size to the sparsity and the structure of each layer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import expm1, log1p
from typing import Any

import numpy as np

from sparse_tvm.backends import resolve_target
from sparse_tvm.errors import OptionError
from sparse_tvm.frontends.detect import open_source
from sparse_tvm.frontends.source import SourceOptions
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.set_precision import check_precisions
from sparse_tvm.planning.calibration import input_products
from sparse_tvm.planning.document import LayerPlan, Plan
from sparse_tvm.planning.knapsack import Knapsack, Option
from sparse_tvm.planning.prediction import Prediction, predict
from sparse_tvm.planning.sensitivity import errors_of, measured_errors
from sparse_tvm.planning.settings import DENSE, SPARSITIES, TOKENS, Setting, settings_of
from sparse_tvm.planning.subject import Subject
from sparse_tvm.sparsity.calibration import Data
from sparse_tvm.sparsity.pruning import tokenizer_of
from sparse_tvm.targets import NATIVE
from sparse_tvm.tuning.shipped import evidence_for

GOALS = ("latency", "speedup", "size")

_LARGEST_ERROR = 1 - 1e-9

Errors = Mapping[Setting, float]
"""Of a layer, by how it is pruned."""

_FRONTIER_POINTS = 200
"""Of a plan's file."""


def plan(
    model: Any,
    *,
    latency: float | None = None,
    speedup: float | None = None,
    size: float | None = None,
    target: str = NATIVE,
    precision: str | None = None,
    tokens: int = TOKENS,
    threads: int | None = None,
    input_shapes: Mapping[str, Sequence[Any]] | None = None,
    structures: Sequence[str] | None = None,
    layers: str | None = None,
    exclude: str | None = None,
    records: Sequence[Any] = (),
    calibrate: Data | None = None,
    measure: bool | None = None,
    allow_pickle: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Find how far to prune each layer of a model, to reach a goal with the least error.

    Parameters
    ----------
    model : path, torch.nn.Module, keras.Model or onnx.ModelProto
        As :func:`sparse_tvm.compile` takes it.
    latency, speedup, size : float | None
        The goal, one of them: seconds of a run, how many times faster than the model as it is, or
        bytes of all weights.
    target, precision : str, str | None
        As :func:`sparse_tvm.compile` takes them; no ``auto``.
    tokens : int
        Size of symbolic dimensions that do not lead an input, where `input_shapes` says nothing.
    threads : int | None
        How many run; by default all cores of this machine, and one of another.
    input_shapes : Mapping[str, Sequence] | None
        Shapes of inputs by name.
    structures : Sequence[str] | None
        Among which it may choose, as :func:`sparse_tvm.prune` takes them; by default those that
        kernels of the target skip in this precision.
    layers, exclude : str | None
        Regular expressions: plan only for layers whose name matches, for all but those.
    records : Sequence[path]
        What ``sparse-tvm tune`` measured.
    calibrate : path or mapping | None
        Data on which errors are measured: as :func:`sparse_tvm.prune` takes them.
    measure : bool | None
        Compile the model pruned in several ways and time it, or trust predictions; by default
        measure where the target's code runs on this machine.
    allow_pickle : bool
        As :func:`sparse_tvm.compile` takes it.
    progress : Callable[[str], None] | None
        Called with what comes next.

    Returns
    -------
    Plan
        For :func:`~sparse_tvm.planning.document.write_plan`.

    Raises
    ------
    SparseTvmError
        A subclass that says what is wrong with the model or an option, or why the goal cannot be
        reached.
    """
    goal, value = _goal(latency=latency, speedup=speedup, size=size)
    for structure in structures or ():
        settings_of(structure)
    told = progress if progress is not None else lambda phase: None
    told("import")
    subject = open_subject(
        model,
        target=target,
        precision=precision,
        tokens=tokens,
        threads=threads,
        input_shapes=input_shapes or {},
        layers=layers,
        exclude=exclude,
        records=records,
        allow_pickle=allow_pickle,
    )
    structures = structures or subject.structures
    errors: dict[str, Errors] = {}
    if calibrate is not None:
        offered = [DENSE, *(s for structure in structures for s in settings_of(structure))]
        refs = {layer.name: layer for layer in subject.layers}
        errors = {
            name: measured_errors(subject.matrix(refs[name]), offered, products)
            for name, products in input_products(
                subject.model,
                [layer.ref for layer in subject.layers],
                calibrate,
                tokenizer=tokenizer_of(subject.source),
                progress=told,
            )
        }
    prediction = predict(
        subject, structures, threads=threads, measure=measure, records=records, progress=told
    )
    told("choose")
    return Planner(prediction, structures, errors).plan(goal, value)


def open_subject(
    model: Any,
    *,
    target: str,
    precision: str | None = None,
    tokens: int,
    threads: int | None,
    input_shapes: Mapping[str, Sequence[Any]],
    layers: str | None = None,
    exclude: str | None = None,
    records: Sequence[Any] = (),
    allow_pickle: bool = False,
) -> Subject:
    """Open a model to plan for it; parameters as for :func:`plan`."""
    for what, number in (("tokens", tokens), ("threads", threads)):
        if number is not None and number < 1:
            raise OptionError(f"{what} must be at least 1, not {number}")
    backend, chosen = resolve_target(target)
    measured = evidence_for(target, records, threads, shipped=False)
    wished = FormatOptions.parse(precision=precision or backend.precision)
    context = Context(backend, chosen, wished, measured)
    check_precisions(context)
    options = SourceOptions(allow_pickle=allow_pickle, input_shapes=input_shapes)
    source = open_source(model, options)
    return Subject(source, context, target, input_shapes, tokens, layers, exclude)


@dataclass(frozen=True)
class Planner:
    """Plans for one model, for as many goals as are asked for.

    Attributes
    ----------
    prediction : Prediction
        What the model takes.
    structures : Sequence[str]
        Among which it may choose.
    measured : Mapping[str, Errors]
        Errors on calibration data by layer, where they are known.
    """

    prediction: Prediction
    structures: Sequence[str]
    measured: Mapping[str, Errors] = field(default_factory=dict)

    @cached_property
    def errors(self) -> dict[str, Errors]:
        """The error of each setting of each layer."""
        settings = [s for structure in self.structures for s in settings_of(structure)]
        subject = self.prediction.subject
        return {
            layer.name: self.measured.get(layer.name)
            or errors_of(subject.matrix(layer), [DENSE, *settings])
            for layer in self.prediction.layers
        }

    def plan(self, goal: str, value: float) -> Plan:
        """The least error that reaches a goal, one of :data:`GOALS`.

        Raises
        ------
        OptionError
            When it is out of reach.
        """
        by_size = goal == "size"
        budget = value if goal != "speedup" else self.prediction.seconds({}) / value
        choice = self._choices(by_size)
        settings = choice.within(budget - self._rest(by_size))
        if settings is None:
            raise self._unreachable(goal, value, choice)
        return self._document(goal, value, settings, choice)

    def error(self, settings: Mapping[str, Setting]) -> float:
        """What a layer loses in the (geometric) mean."""
        return _mean_error(
            sum(
                _loss(self._error(layer.name, settings.get(layer.name, DENSE)))
                for layer in self.prediction.layers
            ),
            len(self.prediction.layers),
        )

    def uniform_for(self, structure: str, seconds: float) -> Setting | None:
        """The least sparsity of all layers alike that is as fast; None if none is."""
        fine = [round(0.5 + 0.0025 * step, 4) for step in range(189)]
        found = [Setting(structure, sparsity) for sparsity in fine]
        if ":" in structure:
            found = settings_of(structure)
        prediction = self.prediction
        fits = (s for s in found if prediction.seconds(prediction.uniform(s)) <= seconds)
        return next(fits, None)

    def _error(self, layer: str, setting: Setting) -> float:
        """Of any sparsity: a straight line between those that were looked at."""
        known = self.errors[layer]
        if setting in known:
            return known[setting]
        alike = [one for one in known if one.structure == setting.structure]
        column = sorted([(0.0, 0.0), *((one.sparsity, known[one]) for one in alike)])
        sparsities, errors = zip(*column, strict=True)
        return float(np.interp(setting.sparsity, sparsities, errors))

    def _rest(self, by_size: bool) -> float:
        return self.prediction.rest_bytes if by_size else self.prediction.rest_seconds

    def _choices(self, by_size: bool) -> _Choices:
        costs = self.prediction.costs
        cost = costs.nbytes if by_size else costs.seconds
        offers = {
            layer.name: _worthwhile(
                [(s, Option(cost(layer, s), _loss(e))) for s, e in self.errors[layer.name].items()]
            )
            for layer in self.prediction.layers
        }
        return _Choices(offers)

    def _unreachable(self, goal: str, value: float, choice: _Choices) -> OptionError:
        """Why a goal is out of reach."""
        prediction, most = self.prediction, max(SPARSITIES)
        rest = self._rest(goal == "size")
        least = rest + choice.least
        if goal == "size":
            wanted, nearest = f"a size of {_mb(value)}", f"--size {1.01e-6 * least:.3g}MB"
            why = f"embeddings and what else is not pruned have {_mb(rest)}, "
            why += f"and with {most:.0%} zeros in all layers the model has {_mb(least)}"
        else:
            wanted, nearest = f"a latency of {_ms(value)}", f"--latency {1.01e3 * least:.3g}ms"
            why = f"the dense rest (embeddings, attention, norms) takes {_ms(rest)}, "
            why += f"and with {most:.0%} zeros in all layers the model takes {_ms(least)}"
        if goal == "speedup":
            fastest = prediction.seconds({}) / least
            wanted, nearest = f"a speed-up of {value:g}", f"--speedup {0.99 * fastest:.3g}"
        return OptionError(
            f"{prediction.subject.name}: {wanted} is out of reach: {why}",
            hint=f"{nearest} can be reached"
            + (
                "" if goal == "size" else "; fewer tokens, more threads or low precision go further"
            ),
        )

    def _document(
        self, goal: str, value: float, settings: Mapping[str, Setting], choice: _Choices
    ) -> Plan:
        prediction, subject = self.prediction, self.prediction.subject
        costs, by_size = prediction.costs, goal == "size"
        figure = prediction.nbytes if by_size else prediction.seconds
        layers = [
            LayerPlan(
                layer.name,
                layer.ref.shape,
                setting,
                costs.seconds(layer, setting),
                costs.seconds(layer, DENSE),
                round(costs.nbytes(layer, setting)),
                self._error(layer.name, setting),
            )
            for layer in prediction.layers
            for setting in [settings[layer.name]]
        ]
        uniform = {
            structure: [
                (figure(alike), self.error(alike))
                for setting in settings_of(structure)
                for alike in [prediction.uniform(setting)]
            ]
            for structure in self.structures
        }
        rest = self._rest(by_size)
        frontier = [(rest + cost, _mean_error(loss, len(layers))) for cost, loss in choice.frontier]
        return Plan(
            subject.name,
            subject.fingerprint,
            goal,
            value,
            subject.context.target.name,
            subject.context.options.precision,
            prediction.cpu,
            prediction.worst_error,
            prediction.threads,
            subject.shapes,
            prediction.seconds(settings),
            prediction.seconds({}),
            prediction.rest_seconds,
            round(prediction.nbytes(settings)),
            round(prediction.nbytes({})),
            self.error(settings),
            layers,
            _thinned(frontier),
            uniform,
        )


class _Choices:
    """The settings of each layer that are worth a look, and the best for any budget."""

    def __init__(self, offers: Mapping[str, Sequence[tuple[Setting, Option]]]) -> None:
        self._offers = offers
        options = [[option for _, option in found] for found in offers.values()]
        self._most = sum(max(option.cost for option in found) for found in options)
        # A little more, so that rounding up never keeps a layer from what it would be given.
        self._knapsack = Knapsack(options, self._most * 1.01)

    @property
    def frontier(self) -> list[tuple[float, float]]:
        """Costs, and the least sum of losses for each."""
        return [(min(cost, self._most), loss) for cost, loss in self._knapsack.frontier()]

    @property
    def least(self) -> float:
        """The least budget for which there are settings."""
        return self._knapsack.frontier()[0][0]

    def within(self, budget: float) -> dict[str, Setting] | None:
        """The settings of least error within a budget, None if there are none."""
        found = self._knapsack.best(budget) if budget > 0 else None
        if found is None:
            return None
        return {
            name: offers[index][0]
            for index, (name, offers) in zip(found, self._offers.items(), strict=True)
        }


def _loss(error: float) -> float:
    """What adds up over layers: of a signal that passes through all, shares that stay multiply."""
    return -log1p(-min(error, _LARGEST_ERROR))


def _mean_error(losses: float, layers: int) -> float:
    return -expm1(-losses / layers)


def _worthwhile(offers: Sequence[tuple[Setting, Option]]) -> list[tuple[Setting, Option]]:
    """Those that no other one beats in both cost and error, the dearest first."""
    kept: list[tuple[Setting, Option]] = []
    for setting, option in sorted(offers, key=lambda one: (one[1].cost, one[1].error)):
        if not kept or option.error < kept[-1][1].error:
            kept.append((setting, option))
    return kept[::-1]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """About as many points as a plot shows, spread over the costs."""
    costs = [cost for cost, _ in points]
    wanted = np.linspace(costs[0], costs[-1], _FRONTIER_POINTS)
    places = sorted({min(bisect_left(costs, cost), len(points) - 1) for cost in wanted})
    return [points[place] for place in places]


def _goal(**goals: float | None) -> tuple[str, float]:
    given = [(name, value) for name, value in goals.items() if value is not None]
    if len(given) != 1:
        raise OptionError(
            "a plan needs one goal: a latency, a speed-up or a size",
            hint="such as --latency 5ms, --speedup 4x or --size 20MB",
        )
    name, value = given[0]
    if not 0 < value < float("inf"):
        raise OptionError(f"--{name} has to be more than 0, not {value:g}")
    return name, value


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.3g} MB"
