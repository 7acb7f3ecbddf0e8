"""Types that weights are stored in, for kernels that compute in float32."""

from __future__ import annotations

from dataclasses import replace

from sparse_tvm.operators import FLOAT32, Layout, WeightedOperator
from sparse_tvm.targets import Target


def refuses_types(name: str, op: WeightedOperator, target: Target) -> str | None:
    """Why a family that widens what it loads does not compute in an operator's types."""
    stored = op.types.weight
    if replace(op.types, weight="float32") != FLOAT32:
        return f"{name} computes float32 only"
    if stored not in ("float32", "float16", "bfloat16"):
        return f"{name} has no weights of {stored}"
    if stored == "float16" and not _widens(target):
        return f"float16 weights want F16C, which {target.name} has not"
    return None


def storing(layout: Layout, op: WeightedOperator) -> Layout:
    """The layout with values of the type that the operator wants."""
    stored = op.types.weight
    return layout if stored == "float32" else layout.having(**{stored: 1})


def _widens(target: Target) -> bool:
    """Whether a CPU makes float32 of a vector of float16 with one instruction."""
    return target.architecture == "aarch64" or target.has("f16c")
