"""Where a compiled model spends its time, per kernel and in groups, beside what bounds it.

The roofline of a call is the longest of three times for the work that its kernel family accounts
for: its FMAs at the peak (float32's, times what fewer bits allow); the loads of activations that a
sparse layer cannot share between rows, from the first cache; and all its operands, each read or
written once, at the second cache's bandwidth.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparse_tvm.backends import get_backend
from sparse_tvm.families import Extents, KernelFamily, Work, bytes_of
from sparse_tvm.machine_limits import MachineLimits
from sparse_tvm.operators import Operator, from_json
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
        self._known: dict[str, tuple[KernelFamily[Any], Operator]] = {}

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
            work = self._work(call, layer)
            self.flops[key] += work.flops
            if self.limits is not None and not builtin:
                self.bounds[key] += self.limits.seconds(work)

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

    def _work(self, call: Call, layer: str | None) -> Work:
        """What the call had to do, as the family of its kernel says."""
        tensors = [Extents(*pair) for pair in zip(call.shapes, call.dtypes, strict=True)]
        found = self._kernel(call.function)
        if found is None:
            return Work(bytes=bytes_of(tensors))
        *operands, output = tensors
        family, op = found
        nonzeros = int(self.layers[layer]["nnz"]) if layer in self.layers else None
        return family.work(op, operands, output, nonzeros)

    def _kernel(self, function: str) -> tuple[KernelFamily[Any], Operator] | None:
        """Family and operator of a kernel of ours."""
        kernel = self.kernels.get(function, {})
        if "operator" not in kernel:
            return None
        if function not in self._known:
            family = get_backend(self.manifest["backend"]).family(kernel["family"])
            self._known[function] = family, from_json(kernel["kind"], kernel["operator"])
        return self._known[function]
