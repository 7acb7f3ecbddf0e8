"""Fitting a target's cost parameters to what was measured.

Least squares on the logarithms of predicted over measured seconds, over the logarithms of the
parameters, so that a factor of two too much and one too little count alike. Outliers count less.
What the records say nothing about stays as it is: every parameter is held, weakly, to what the
target's entry has. And parameters go no farther from it than choices profit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import exp, log
from typing import Any

import numpy as np

from sparse_tvm.backends import get_backend
from sparse_tvm.errors import OptionError
from sparse_tvm.extras import install_command
from sparse_tvm.operators import Layout
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import TARGETS, Costs, Target
from sparse_tvm.tuning.records import Condition, Problem, Record, Records

_FIXED = ("ghz", "scalars_per_load")
"""Parameters that are facts, or give only the unit of the others."""

_NONE = 0.25
"""From where a parameter is fitted that the entry has as 0."""

_LEAST_RECORDS = 30
_HELD = 0.2
"""How much a record's worth of parameter counts against a record's worth of time."""

_WAYS = (0.25, 0.5, 1.0)
"""How far parameters go from what they are to the fitted ones: as far as least is lost by choices.
Small errors are no aim of their own."""

_MOST_FACTOR = 8.0
"""By which no parameter changes more: beyond, the model is wrong and not its parameter."""


class _RecordedWeight(WeightStatistics):
    """The zeros of a weight as far as a record tells."""

    def __init__(self, record: Record) -> None:
        self.shape, self.copies = record.problem.op.matrix, record.copies
        self._problem, self._record = record.problem, record

    @property
    def sparsity(self) -> float:
        return 1 - self._problem.density

    @property
    def block(self) -> tuple[int, int] | None:
        return self._problem.block

    def stored_blocks(self, block: tuple[int, int]) -> int:
        if block != self._record.layout.block:
            raise ValueError(f"nobody counted the blocks of {block}")
        return self._record.stored_blocks


@dataclass(frozen=True)
class Quality:
    """How good predictions are.

    Attributes
    ----------
    error : float
        Median of how far a prediction is off, relatively.
    lost, lost_most : float
        How much slower than the best measured candidate the one predicted to be best is: the mean
        over all kernels and numbers of tokens, and the 95th percentile.
    """

    error: float
    lost: float
    lost_most: float


@dataclass(frozen=True)
class Fit:
    """Parameters of one target, fitted.

    Attributes
    ----------
    target, cpu : str
        Of which target, on which CPU.
    costs : Costs
        The parameters, to three digits.
    count : int
        How many records they rest on.
    before, after : Quality
        Of the predictions with the target's parameters, and with these.
    """

    target: str
    cpu: str
    costs: Costs
    count: int
    before: Quality
    after: Quality

    def entry(self) -> str:
        """The parameters as the target table has them."""
        lines = [f"    {f.name}={getattr(self.costs, f.name)!r}," for f in fields(self.costs)]
        return "\n".join(["costs=Costs(", *lines, "),"])


def fit(records: Records) -> list[Fit]:
    """Fit the parameters of every target and CPU that there are enough records of.

    Raises
    ------
    OptionError
        When there are none, or SciPy is not installed.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        known = record.problem.target in TARGETS
        if record.seconds is not None and record.condition.threads == 1 and known:
            groups.setdefault((record.problem.target, record.provenance.cpu), []).append(record)
    enough = {key: found for key, found in groups.items() if len(found) >= _LEAST_RECORDS}
    if not enough:
        most = max(map(len, groups.values()), default=0)
        raise OptionError(
            f"{most} records of kernels on one thread are too few to fit parameters to",
            hint=f"`sparse-tvm tune MODEL --threads 1`, until there are {_LEAST_RECORDS}",
        )
    return [_fit(TARGETS[target], cpu, found) for (target, cpu), found in enough.items()]


def _fit(target: Target, cpu: str, records: Sequence[Record]) -> Fit:
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        hint = install_command("tune")
        raise OptionError("fitting needs SciPy, which is not installed", hint=hint) from error

    names = [field.name for field in fields(Costs) if field.name not in _FIXED]
    start = np.array([log(getattr(target.costs, name) or _NONE) for name in names])
    measured = np.log([_seconds(record) for record in records])

    def costs_of(logarithms: np.ndarray) -> Costs:
        values: dict[str, Any] = dict(zip(names, map(exp, logarithms), strict=True))
        return replace(target.costs, **values)

    def residuals(logarithms: np.ndarray) -> np.ndarray:
        predicted = np.log(_predictions(replace(target, costs=costs_of(logarithms)), records))
        held = _HELD * (logarithms - start)
        return np.concatenate([predicted - measured, held])

    bounds = (start - log(_MOST_FACTOR), start + log(_MOST_FACTOR))
    found = least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=0.1)

    def way(share: float) -> Costs:
        costs = costs_of(start + share * (found.x - start))
        rounded: dict[str, Any] = {name: float(f"{getattr(costs, name):.3g}") for name in names}
        return replace(costs, **rounded)

    before = _quality(target, records)
    tried = [(before, target.costs)]
    for share in _WAYS:
        costs = way(share)
        tried.append((_quality(replace(target, costs=costs), records), costs))
    after, costs = min(tried, key=lambda one: (one[0].lost, one[0].error))
    return Fit(target.name, cpu, costs, len(records), before, after)


def _seconds(record: Record) -> float:
    assert record.seconds is not None
    return record.seconds


def _predictions(target: Target, records: Sequence[Record]) -> list[float]:
    """Predicted seconds."""
    backend = get_backend("cpu")
    return [
        backend.weighted_family(record.layout).cost(
            record.problem.op,
            record.layout,
            _RecordedWeight(record),
            record.condition.tokens,
            target,
        )
        for record in records
    ]


def _quality(target: Target, records: Sequence[Record]) -> Quality:
    predicted = _predictions(target, records)
    errors = [abs(p / _seconds(r) - 1) for p, r in zip(predicted, records, strict=True)]
    lost = list(_losses(predicted, records)) or [0.0]
    return Quality(float(np.median(errors)), float(np.mean(lost)), float(np.percentile(lost, 95)))


def _losses(predicted: Sequence[float], records: Sequence[Record]) -> Iterator[float]:
    """By how much the choice made by prediction is slower than the best, case by case."""
    cases: dict[tuple[Problem, Condition], dict[Layout, tuple[float, float]]] = {}
    for seconds, record in zip(predicted, records, strict=True):
        case = cases.setdefault((record.problem, record.condition), {})
        case[record.layout] = (seconds, _seconds(record))
    for case in cases.values():
        if len(case) > 1:
            chosen = min(case.values())[1]
            yield chosen / min(measured for _, measured in case.values()) - 1


def as_table(found: Fit) -> Mapping[str, Any]:
    """Before and after, as rows of a table."""
    return {
        "median error": (found.before.error, found.after.error),
        "lost by choices, mean": (found.before.lost, found.after.lost),
        "lost by choices, 95th percentile": (found.before.lost_most, found.after.lost_most),
    }
