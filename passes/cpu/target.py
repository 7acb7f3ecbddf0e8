"""The target of a context, as the CPU backend's own."""

from __future__ import annotations

from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.targets import Target


def cpu_target(context: Context) -> Target:
    """Return the target: in this backend's passes it is a CPU."""
    assert isinstance(context.target, Target)
    return context.target
