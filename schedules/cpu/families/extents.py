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


def symbols_of(size: tuple[int | None, ...]) -> tuple[tuple[Any, Any], list[Any]]:
    """Rows and columns of an image for a kernel, and the symbols among them."""
    from sparse_tvm.schedules.cpu.lane_tiles import symbol

    rows, columns = (
        symbol(name) if extent is None else extent
        for extent, name in zip(size, ("height", "width"), strict=True)
    )
    extents = (rows, columns)
    return extents, [e for e, known in zip(extents, size, strict=True) if known is None]
