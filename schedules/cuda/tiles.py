"""How a matrix product is shared out among thread blocks and warps."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cuda.fragments import ROWS, STEP

_SIZES = ((128, 128), (64, 128), (64, 64), (32, 64), (16, 64))
_FEW_TOKENS_SIZES = ((64, 16), (32, 16), (16, 16))
"""Outputs and tokens of a thread block, the most economical first."""

_TYPICAL_TOKENS = 128
_FEW_TOKENS = 16
_PROCESSORS = 108
"""Thread blocks that keep a usual device busy: economical ones are no use on a few processors."""


@dataclass(frozen=True)
class Tile:
    """What one thread block computes, and its warps.

    Attributes
    ----------
    rows, tokens : int
        Outputs, and tokens, of a block.
    row_warps, token_warps : int
        Warps along them.
    stages : int
        Steps of the weight's columns that are in shared memory at a time.
    """

    rows: int
    tokens: int
    row_warps: int
    token_warps: int
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.row_warps * self.token_warps

    @property
    def fragments(self) -> int:
        """Fragments of the weight that a warp multiplies at a time, of 16 rows each."""
        return self.rows // self.row_warps // ROWS

    @property
    def columns(self) -> int:
        """Groups of eight tokens of a warp."""
        return self.tokens // self.token_warps // 8

    def stage_bytes(self, structured: bool) -> int:
        """Shared memory of one stage: activations, and the weight with what tells its places."""
        weight = self.rows * STEP * 2
        return self.tokens * STEP * 2 + (weight // 2 + self.rows * 4 if structured else weight)

    @property
    def sum_stride(self) -> int:
        """Floats from token to token where sums wait for the epilogue, clear of bank conflicts."""
        return self.rows + 4

    def shared_bytes(self, structured: bool) -> int:
        """Shared memory of a block: stages, then sums in their place."""
        sums = self.tokens * self.sum_stride * 4
        return max(self.stages * self.stage_bytes(structured), sums)


def tile_for(layout: Layout, outputs: int, tokens: int | None) -> Tile:
    """The tile of a layer that sees so many tokens at a time, or a usual number where None."""
    count = tokens or _TYPICAL_TOKENS
    few = tokens is not None and tokens <= _FEW_TOKENS
    sizes: tuple[tuple[int, int], ...] = _FEW_TOKENS_SIZES if few else _SIZES
    if layout.format == "bsr":
        rows = layout.block[0]
        sizes = tuple((rows, size) for size in ((_FEW_TOKENS,) if few else (128, 64)))
    sizes = tuple(size for size in sizes if size[0] < 2 * outputs) or sizes[-1:]
    rows, width = next(
        (s for s in sizes if ceil(outputs / s[0]) * ceil(count / s[1]) >= _PROCESSORS), sizes[-1]
    )
    if few:
        return Tile(rows, width, max(1, rows // 32), 1, 4)
    # Warps as large as registers let them be: fewer spill where the assembler aims at more blocks.
    token_warps = 2 if rows == width == 64 else 4
    row_warps = 2 if rows == 128 or rows == width == 64 else 1
    return Tile(rows, width, row_warps, token_warps, 4 if rows <= 64 else 3)
