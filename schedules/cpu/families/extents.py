"""Extents of operands, as the CPU's kernels and the accounts of their work want them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sparse_tvm.families import Extents


def tiles_for(operand: Extents) -> Any:
    """The tiles of a lane-tiled activation: numbers, or fresh symbols."""
    from sparse_tvm.schedules.cpu.lane_tiles import Tiles

    lead, per_lead, _, _ = known_or_symbols(operand, ("lead", "tiles", "features", "lanes"))
    return Tiles(lead, per_lead)


def known_or_symbols(operand: Extents, names: Iterable[str]) -> list[Any]:
    """Extents for a kernel: numbers, or a fresh symbol for each that run time decides."""
    from sparse_tvm.schedules.cpu.lane_tiles import symbol

    return [
        symbol(name) if dim is None else dim for dim, name in zip(operand.shape, names, strict=True)
    ]
