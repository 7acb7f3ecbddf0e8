"""The targets a model can be compiled for: one registry entry each.

``native`` stands for the best entry for this machine's CPU: the one that names its model, or else
the most capable one that it has the features for.
"""

from __future__ import annotations

from sparse_tvm.cpu import architecture, cpu_part, host_features
from sparse_tvm.errors import TargetError
from sparse_tvm.targets.arm import ARM_TARGETS
from sparse_tvm.targets.target import Caches, Costs, Target
from sparse_tvm.targets.x86 import X86_TARGETS

__all__ = ["ALIASES", "NATIVE", "TARGETS", "Caches", "Costs", "Target", "get_target", "runs_here"]

NATIVE = "native"

TARGETS = {target.name: target for target in (*X86_TARGETS, *ARM_TARGETS)}
"""Every target by name, the most capable of an architecture first."""

ALIASES = {alias: target for target in TARGETS.values() for alias in target.aliases}
"""Targets by the names of CPUs, boards and cloud machines."""


def get_target(name: str = NATIVE) -> Target:
    """Return the target called ``name``, or known by it.

    Raises
    ------
    TargetError
        When there is no such target, or ``native`` finds none that fits this machine.
    """
    if name == NATIVE:
        return _native()
    found = TARGETS.get(name) or ALIASES.get(name)
    if found is None:
        raise TargetError(
            f"unknown target {name!r}",
            hint=f"{NATIVE}, {', '.join(TARGETS)}; `sparse-tvm targets` lists more names",
        )
    return found


def runs_here(target: Target) -> bool:
    """Whether this machine's CPU has what the target's code needs."""
    return target.architecture == architecture() and host_features().issuperset(target.features)


def _native() -> Target:
    fitting = [target for target in TARGETS.values() if runs_here(target)]
    if not fitting:
        raise TargetError(
            f"no target fits this machine's CPU ({architecture()})",
            hint="`sparse-tvm targets` lists what each one needs",
        )
    part = cpu_part()
    return next((target for target in fitting if part in target.parts), fitting[0])
