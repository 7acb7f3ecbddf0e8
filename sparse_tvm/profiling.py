"""Where a compiled model spends its time, per kernel and in groups, beside what bounds it.

The roofline of a call is the longest of three times: its FMAs at the machine's peak; the loads of
activations that a sparse layer cannot share between rows, from the first cache; and all its
operands, each read or written once as four bytes an element, at the second cache's bandwidth.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparse_tvm.machine import MachineLimits
from sparse_tvm.runtime import Call, Model

RUNS = 10

SPARSE, DENSE, ATTENTION, REST = "sparse layers", "dense layers", "attention", "the rest"
GROUPS = (SPARSE, DENSE, ATTENTION, REST)


@dataclass(frozen=True)
class KernelTime:
    """Mean time per run of one function of the program, for one layer where that is known.

    `flops` counts two for every multiplication of a value with a weight that is not zero, or in
    attention; it is 0 for kernels whose work is not of that kind. Tokens that only fill up the
    last tile count, since they are computed. `bound` is the roofline, in seconds: None where the
    machine's limits are not known.
    """

    function: str
    kind: str
    layer: str | None
    group: str
    calls: int
    seconds: float
    share: float
    flops: float
    bound: float | None


@dataclass(frozen=True)
class GroupTime:
    """Mean time per run of a group of kernels; FLOPs and bound as in :class:`KernelTime`."""

    group: str
    seconds: float
    share: float
    flops: float
    bound: float | None


@dataclass(frozen=True)
class Profile:
    """Kernels, the slowest first, and the groups they fall into."""

    kernels: list[KernelTime]
    groups: list[GroupTime]


def profile_model(
    model: Model,
    inputs: Mapping[str, np.ndarray],
    runs: int = RUNS,
    limits: MachineLimits | None = None,
) -> Profile:
    """Time every kernel of a model.

    A kernel that serves several layers has one entry for each, as the manifest names them. The
    virtual machine's own functions, named ``vm.builtin``, hardly take time; observing a call
    does, and what that takes, measured by the shortest call of a run, is taken off every call.
    """
    totals = _Totals(model.manifest, limits)
    model.trace(inputs)  # the first run of a new machine allocates
    for trace in model.trace(inputs, runs):
        totals.add(trace)
    return totals.profile(runs)


@dataclass
class _Totals:
    """Sums over all runs, by function and layer."""

    manifest: Mapping[str, Any]
    limits: MachineLimits | None
    seconds: defaultdict[tuple[str, str | None], float] = field(
        default_factory=lambda: defaultdict(float)
    )
    flops: defaultdict[tuple[str, str | None], float] = field(
        default_factory=lambda: defaultdict(float)
    )
    bounds: defaultdict[tuple[str, str | None], float] = field(
        default_factory=lambda: defaultdict(float)
    )
    calls: Counter[tuple[str, str | None]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.kernels = self.manifest.get("kernels", {})
        self.layers = {layer["name"]: layer for layer in self.manifest.get("layers", [])}

    def add(self, trace: Sequence[Call]) -> None:
        """Add one run."""
        observing = min((call.seconds for call in trace), default=0.0)
        seen: Counter[str] = Counter()
        for call in trace:
            served = self.kernels.get(call.function, {}).get("layers", [])
            layer = served[seen[call.function]] if seen[call.function] < len(served) else None
            seen[call.function] += 1
            builtin = call.function.startswith("vm.builtin.")
            key = ("vm.builtin" if builtin else call.function), layer
            self.seconds[key] += call.seconds - observing
            self.calls[key] += 1
            flops = self._flops(call, layer)
            self.flops[key] += flops
            if self.limits is not None and not builtin:
                self.bounds[key] += self._bound(self.limits, call, layer, flops)

    def profile(self, runs: int) -> Profile:
        """Return means per run."""
        total = sum(self.seconds.values())
        kernels = [
            KernelTime(
                function=function,
                kind=self._kind(function),
                layer=layer,
                group=self._group(function, layer),
                calls=self.calls[function, layer] // runs,
                seconds=seconds / runs,
                share=seconds / total,
                flops=self.flops[function, layer] / runs,
                bound=None if self.limits is None else self.bounds[function, layer] / runs,
            )
            for (function, layer), seconds in self.seconds.items()
        ]
        kernels.sort(key=lambda kernel: kernel.seconds, reverse=True)
        members = {group: [k for k in kernels if k.group == group] for group in GROUPS}
        groups = [
            GroupTime(
                group,
                sum(kernel.seconds for kernel in found),
                sum(kernel.share for kernel in found),
                sum(kernel.flops for kernel in found),
                None if self.limits is None else sum(kernel.bound or 0.0 for kernel in found),
            )
            for group, found in members.items()
            if found
        ]
        return Profile(kernels, groups)

    def _kind(self, function: str) -> str:
        return str(self.kernels.get(function, {}).get("kind", ""))

    def _group(self, function: str, layer: str | None) -> str:
        if layer in self.layers:
            return DENSE if self.layers[layer]["format"] == "dense" else SPARSE
        return ATTENTION if self._kind(function) == ATTENTION else REST

    def _flops(self, call: Call, layer: str | None) -> float:
        if layer in self.layers:
            outputs, nnz = int(self.layers[layer]["shape"][0]), int(self.layers[layer]["nnz"])
            return 2.0 * nnz * math.prod(call.shapes[-1]) / outputs
        if self._kind(call.function) == ATTENTION:
            queries, keys, *_, output = call.shapes
            _, tiles, _, lanes = keys
            return 2.0 * (math.prod(queries) + math.prod(output)) * tiles * lanes
        return 0.0

    def _bound(self, limits: MachineLimits, call: Call, layer: str | None, flops: float) -> float:
        operands = 4.0 * sum(map(math.prod, call.shapes))
        loads = 0.0
        if layer in self.layers and self.layers[layer]["format"] != "dense":
            rows, _ = self.layers[layer]["block"] or (1, 1)
            loads = 2.0 * flops / rows  # four bytes for two FLOPs on each row of a block
        return max(flops / limits.flops, loads / limits.near, operands / limits.far)
