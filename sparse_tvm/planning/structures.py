"""``prune --structure auto``: which structure for each layer, at a sparsity that is asked for.

A structure that the kernels reward loses more. One that is twice as fast may keep half as much:
chosen is the structure with the least time for the share of the weight's norm that it keeps,
``seconds / sqrt(1 - error)``, where errors are those of :mod:`sparse_tvm.planning.sensitivity`
without data. A layer that no structure makes faster is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import numpy as np

from sparse_tvm.planning.planner import open_subject
from sparse_tvm.planning.prediction import Prediction, predict
from sparse_tvm.planning.sensitivity import errors_of
from sparse_tvm.planning.settings import DENSE, TOKENS, Setting
from sparse_tvm.planning.subject import PlannedLayer
from sparse_tvm.sparsity.pattern import Goal, Pattern, asked_sparsity
from sparse_tvm.targets import NATIVE

_HALVES = "2:4"
"""Compared, too, where half of the values are to go."""


@dataclass(frozen=True)
class Candidate:
    """A structure of one layer.

    Attributes
    ----------
    setting : Setting
        The structure, at the sparsity that is asked for.
    faster : float
        How many times, against the layer as it is.
    kept : float
        Share of the weight's norm, 0 to 1.
    """

    setting: Setting
    faster: float
    kept: float

    @property
    def merit(self) -> float:
        """What the rule looks at: the larger, the better."""
        return self.faster * self.kept


@dataclass(frozen=True)
class LayerChoice:
    """What was compared for one layer.

    Attributes
    ----------
    name : str
        As ``prune --layers`` matches it.
    shape : tuple[int, int]
        ``(N, K)``.
    candidates : Sequence[Candidate]
        The best first; none where no structure makes the layer faster.
    """

    name: str
    shape: tuple[int, int]
    candidates: Sequence[Candidate]


@dataclass(frozen=True)
class StructureChoice:
    """Structures by layer, and what they give.

    Attributes
    ----------
    target : str
        For which they were chosen.
    precision : str
        In which the model is to compute.
    basis : str
        Whether times are ``measured`` or ``predicted``.
    threads : int | None
        How many run; None on a device of its own.
    seconds, dense_seconds : float
        Of a run, pruned and as it is.
    layers : Sequence[LayerChoice]
        In the model's order.
    """

    target: str
    precision: str
    basis: str
    threads: int | None
    seconds: float
    dense_seconds: float
    layers: Sequence[LayerChoice]

    @property
    def goals(self) -> dict[str, Goal]:
        """How each layer is to be pruned, as ``prune`` and ``Pruner`` take it."""
        return {
            one.name: Goal(Pattern.parse(best.setting.structure), best.setting.sparsity)
            for one in self.layers
            for best in one.candidates[:1]
        }


def choose_structures(
    model: Any,
    sparsity: float | None,
    *,
    target: str = NATIVE,
    precision: str | None = None,
    tokens: int | None = None,
    threads: int | None = None,
    input_shapes: Mapping[str, Sequence[Any]] | None = None,
    layers: str | None = None,
    exclude: str | None = None,
    records: Sequence[Any] = (),
    measure: bool = False,
    allow_pickle: bool = False,
    weights: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> StructureChoice:
    """Choose a structure for each layer of a model, at one sparsity for all.

    Parameters
    ----------
    sparsity : float
        Share of zeros, more than 0 and less than 1.
    weights : Mapping[str, np.ndarray] | None
        Float32 ``[N, K]`` by layer, where they are not the model's.
    measure : bool
        Compile the model pruned in several ways and time it, rather than predict.

    Other parameters are those of :func:`~sparse_tvm.planning.planner.plan`.

    Raises
    ------
    SparseTvmError
        When the model or an option is wrong, or pruning makes no layer faster.
    """
    share = asked_sparsity(sparsity)
    subject = open_subject(
        model,
        target=target,
        precision=precision,
        tokens=TOKENS if tokens is None else tokens,
        threads=threads,
        input_shapes=input_shapes or {},
        layers=layers,
        exclude=exclude,
        records=records,
        allow_pickle=allow_pickle,
    )
    halves = Setting.parse(_HALVES)
    more = [halves] if abs(share - halves.sparsity) < 1e-6 else []
    prediction = predict(
        subject,
        [*subject.structures, *(setting.structure for setting in more)],
        threads=threads,
        measure=measure,
        records=records,
        progress=progress,
    )
    progress("choose structures")
    given = weights or {}
    choices = [
        LayerChoice(
            layer.name,
            layer.ref.shape,
            _compared(
                prediction,
                layer,
                given.get(layer.name),
                [*(Setting(each, share) for each in subject.structures_of(layer)), *more],
            )
            if layer in prediction.layers
            else (),
        )
        for layer in subject.layers
    ]
    settings = {one.name: best.setting for one in choices for best in one.candidates[:1]}
    return StructureChoice(
        subject.context.target.name,
        subject.context.options.precision,
        "predicted" if prediction.cpu is None else "measured",
        prediction.threads if subject.context.backend.device == "cpu" else None,
        prediction.seconds(settings),
        prediction.seconds({}),
        choices,
    )


def _compared(
    prediction: Prediction,
    layer: PlannedLayer,
    weight: np.ndarray | None,
    offered: Sequence[Setting],
) -> list[Candidate]:
    costs = prediction.costs
    faster = [
        setting
        for setting in offered
        if costs.choice(layer.kinds[0], setting).layout.sparse
        and costs.seconds(layer, setting) < costs.seconds(layer, DENSE)
    ]
    if not faster:
        return []
    errors = errors_of(prediction.subject.matrix(layer) if weight is None else weight, faster)
    found = [
        Candidate(
            setting,
            _ratio(costs.seconds(layer, DENSE), costs.seconds(layer, setting)),
            sqrt(max(0.0, 1 - errors[setting])),
        )
        for setting in faster
    ]
    return sorted(found, key=lambda one: one.merit, reverse=True)


def _ratio(dense: float, seconds: float) -> float:
    return dense / seconds if seconds > 0 else inf
