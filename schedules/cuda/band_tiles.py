"""How layers in blocks of 32x32 are shared out among warpgroups, and how long they take."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from sparse_tvm.schedules.cuda.band_weights import BLOCK_BYTES, SIDE
from sparse_tvm.targets.cuda import Gpu

TOKENS = 64
"""Rows of a product."""

_MOST_STAGES = 16
_BLOCK_SHARED_BYTES = 227 * 1024
"""What one thread block can have; the device keeps a kibibyte of each."""


@dataclass(frozen=True)
class BandTile:
    """What a thread block computes.

    Attributes
    ----------
    groups : int
        Warpgroups, with 64 tokens each.
    height : int
        Block rows of a band.
    stages : int
        Steps that are in shared memory at a time.
    resident : int
        Thread blocks of a multiprocessor.
    """

    groups: int
    height: int
    stages: int
    resident: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a thread block."""
        return self.groups * TOKENS

    @property
    def threads(self) -> int:
        """Threads of a block: those that multiply, and the warp that copies."""
        return 128 * self.groups + 32

    @property
    def columns_bytes(self) -> int:
        """The activations of a step."""
        return self.tokens * SIDE * 2

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage: activations, then blocks."""
        return self.columns_bytes + self.height * BLOCK_BYTES

    @property
    def barriers_at(self) -> int:
        """First byte of the barriers, behind the stages."""
        return self.stages * self.stage_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.barriers_at + self.stages * 16


def tile_of(groups: int, height: int, resident: int = 1) -> BandTile:
    """A tile with as many stages as there is room for."""
    one = BandTile(groups, height, 1, resident)
    room = (_BLOCK_SHARED_BYTES + 1024) // resident - 1024
    stages = min(_MOST_STAGES, room // (one.stage_bytes + 16))
    return BandTile(groups, height, stages, resident)


HEIGHT = 3
"""Block rows of the bands that weights are packed in: sums of more would leave room for fewer
warpgroups."""

TILES = (tile_of(4, HEIGHT), tile_of(2, HEIGHT, resident=2))

_TYPICAL_TOKENS = 1024
"""Tokens that a kernel is made for which sees any number of them."""

_LAUNCH = 2.2e-6
_STEP = 0.05e-6, 1.05e-9
"""Seconds of a step: of any, and for each token."""

_STORE = 4e-6
"""Seconds until the sums of a tile are stored and the next is begun; others multiply meanwhile."""


def tile_for(matrix: tuple[int, int], tokens: int | None, gpu: Gpu) -> BandTile:
    """The faster tile for so many tokens at a time, or for a usual number where None."""
    blocks, count = matrix[0] * matrix[1] // SIDE**2 // 10, tokens or _TYPICAL_TOKENS
    return min(TILES, key=lambda tile: _seconds(matrix, blocks, count, gpu, tile))


def band_seconds(matrix: tuple[int, int], blocks: int, tokens: int, gpu: Gpu) -> float:
    """Predicted seconds of a layer that stores so many blocks."""
    return min(_seconds(matrix, blocks, tokens, gpu, tile) for tile in TILES)


def _seconds(matrix: tuple[int, int], blocks: int, tokens: int, gpu: Gpu, tile: BandTile) -> float:
    """Seconds with a tile, as fitted to an H200's."""
    rows, columns = (ceil(extent / SIDE) for extent in matrix)
    bands = ceil(rows / tile.height)
    steps = columns * (1 - (1 - min(1.0, blocks / (rows * columns))) ** tile.height)
    turns = bands * ceil(tokens / tile.tokens) / (gpu.processors * tile.resident)
    step = tile.resident * (_STEP[0] + _STEP[1] * tile.tokens)
    return _LAUNCH + max(1.0, turns) * (steps * step + _STORE / tile.resident)
