"""What each setting of each layer costs: predicted, and corrected by what was measured in trials.

A prediction is that of the layout which the compiler would choose. What trials measured of a kind
of layer, over what was predicted, is a factor for each structure; between the sparsities that were
tried its logarithm is a straight line over the logarithm of the density. Sparser than what was
tried, a layer is taken to be no faster: what bounds it by then, nobody knows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log
from statistics import median

import numpy as np

from sparse_tvm.operators import Layout
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.layout_choice import Choice, choose
from sparse_tvm.planning.settings import DENSE, Setting
from sparse_tvm.planning.subject import Kind, PlannedLayer
from sparse_tvm.planning.trials import Trial
from sparse_tvm.sparsity.statistics import AssumedWeight

_VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_PLACE_BYTES = 1 / 4
"""Two bits tell which of four neighbours a value is."""

_INDEX_BYTES, _WIDE_INDEX_BYTES = 2, 4
_NARROW = 1 << 16
"""Inputs that two bytes can tell apart."""

_ROW_BYTES = 8
"""Of a row of blocks: where it begins, and which it is."""


@dataclass
class Costs:
    """Seconds and bytes of layers under any setting.

    Attributes
    ----------
    context : Context
        For which target, and the records there are.
    threads : int
        Predictions, which are of one core, are divided by it where nothing was measured.
    """

    context: Context
    threads: int = 1
    _choices: dict[tuple[Kind, Setting], Choice] = field(default_factory=dict)
    _dense: dict[Kind, float] = field(default_factory=dict)
    _factors: dict[tuple[Kind, str], list[tuple[float, float]]] = field(default_factory=dict)
    _typical: dict[str, float] = field(default_factory=dict)

    def choice(self, kind: Kind, setting: Setting) -> Choice:
        """How the compiler would store such a layer, with its prediction."""
        key = kind, setting
        if key not in self._choices:
            weight = setting.assumed(kind.op.matrix)
            options, backend, target = (
                self.context.options,
                self.context.backend,
                self.context.target,
            )
            self._choices[key] = choose(
                kind.op, weight, options, backend, target, (kind.tokens,), self.context.evidence
            )
        return self._choices[key]

    def seconds(self, layer: PlannedLayer, setting: Setting) -> float:
        """Seconds of a layer in a run."""
        return sum(self._seconds(kind, setting) for kind in layer.kinds)

    def _seconds(self, kind: Kind, setting: Setting) -> float:
        setting = self._within_tried(kind, setting)
        choice = self.choice(kind, setting)
        if not choice.layout.sparse:
            return self._dense.get(kind, self._on_all_cores(choice))
        return self._on_all_cores(choice) * self._factor(kind, setting)

    def _within_tried(self, kind: Kind, setting: Setting) -> Setting:
        """The setting, no sparser than the furthest that was tried of such layers, if any was."""
        curve = self._factors.get((kind, setting.structure))
        furthest = round(1 - exp(curve[0][0]), 6) if curve else 1.0
        return setting if setting.sparsity <= furthest else Setting(setting.structure, furthest)

    def _on_all_cores(self, choice: Choice) -> float:
        return choice.seconds / (self.threads if choice.basis == "predicted" else 1)

    def nbytes(self, layer: PlannedLayer, setting: Setting) -> float:
        """Bytes of the stored weight."""
        kind = layer.kinds[0]
        layout = self.choice(kind, setting).layout
        return _stored_bytes(layout, setting.assumed(kind.op.matrix), kind.op.types.weight)

    def correct(self, layers: Sequence[PlannedLayer], trials: Sequence[Trial]) -> None:
        """Take over what trials measured."""
        dense: defaultdict[Kind, list[float]] = defaultdict(list)
        factors: defaultdict[tuple[Kind, str], list[tuple[float, float]]] = defaultdict(list)
        for trial in trials:
            for layer in layers:
                if len(set(layer.kinds)) != 1:
                    continue  # of several kinds at once nobody knows each one's time
                (kind, *_), setting = layer.kinds, trial.settings[layer.name]
                seconds = trial.layers[layer.name] / len(layer.kinds)
                choice = self.choice(kind, setting)
                sparse = trial.formats[layer.name] != "dense"
                if not sparse and setting == DENSE:
                    dense[kind].append(seconds)
                elif sparse and choice.layout.sparse:
                    place = log(1 - setting.sparsity), log(seconds / self._on_all_cores(choice))
                    factors[kind, setting.structure].append(place)
        self._dense = {kind: median(found) for kind, found in dense.items()}
        self._factors = {key: _curve(found) for key, found in factors.items()}
        by_structure: defaultdict[str, list[float]] = defaultdict(list)
        for (_, structure), curve in self._factors.items():
            by_structure[structure] += [factor for _, factor in curve]
        self._typical = {structure: median(found) for structure, found in by_structure.items()}

    def _factor(self, kind: Kind, setting: Setting) -> float:
        """Measured over predicted."""
        curve = self._factors.get((kind, setting.structure))
        if curve is None:
            return exp(self._typical.get(setting.structure, 0.0))
        densities, factors = zip(*curve, strict=True)
        return exp(float(np.interp(log(1 - setting.sparsity), densities, factors)))


def _curve(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """One point for each density, in order."""
    columns: defaultdict[float, list[float]] = defaultdict(list)
    for density, factor in points:
        columns[density].append(factor)
    return sorted((density, median(found)) for density, found in columns.items())


def _stored_bytes(layout: Layout, weight: AssumedWeight, dtype: str) -> float:
    (n, k), (rows, columns) = weight.shape, layout.block
    value = _VALUE_BYTES[dtype]
    if not layout.sparse:
        return float(value * -(-n // rows) * rows * k)
    if layout.format == "2:4":
        return n * k / 2 * (value + _PLACE_BYTES)
    index = _INDEX_BYTES if k <= _NARROW else _WIDE_INDEX_BYTES
    lanes = layout.get("sell", 0)
    sliced = weight.window_steps(lanes) * (lanes * (value + 1) + index) if lanes else 0
    if layout.format == "sell":
        return float(sliced)
    parts = layout.get("parts", 1)
    blocks = weight.stored_blocks(layout.block)
    blocked = blocks * (value * rows * columns + index) + _ROW_BYTES * parts * -(-n // rows)
    return float(blocked + sliced)
