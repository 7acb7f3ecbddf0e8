"""How a matrix product is shared out among Hopper's warpgroups, and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cuda.warpgroup_weights import SIDE
from sparse_tvm.targets.cuda import Gpu

_MOST_STAGES = 8
_BLOCK_SHARED_BYTES = 227 * 1024
"""What one thread block can have; the device keeps a kibibyte of each."""


@dataclass(frozen=True)
class WarpgroupTile:
    """What one or two warpgroups compute at a time.

    Attributes
    ----------
    rows, tokens : int
        Outputs, 64 or 128, and tokens.
    groups : int
        Warpgroups that multiply.
    alternating : bool
        Whether each has tiles of its own; else they share one.
    stages : int
        Steps of the weight's columns that are in shared memory at a time.
    """

    rows: int
    tokens: int
    groups: int
    alternating: bool
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block: those that multiply, and those that copy."""
        return 128 * (self.groups + 1)

    def weight_bytes(self, structured: bool) -> int:
        """A tile of the weight."""
        return SIDE * SIDE * 2 // (2 if structured else 1)

    @property
    def places_bytes(self) -> int:
        """What tells the places of a 2:4 tile."""
        return SIDE * SIDE // 8

    @property
    def weight_at(self) -> int:
        """First byte of the weight in a stage, behind the activations."""
        return self.tokens * SIDE * 2

    @property
    def places_at(self) -> int:
        """First byte of the places in a stage, behind a 2:4 weight."""
        return self.weight_at + self.rows // SIDE * self.weight_bytes(True)

    @property
    def parts(self) -> int:
        """Products of 64 rows that one warpgroup sums up."""
        return self.rows // SIDE // (1 if self.alternating else self.groups)

    @property
    def sums(self) -> int:
        """Sums of one thread."""
        return self.parts * self.tokens // 2

    def step_bytes(self, structured: bool) -> int:
        """What one step copies."""
        weight = self.weight_bytes(structured) + (self.places_bytes if structured else 0)
        return self.weight_at + self.rows // SIDE * weight

    def stage_bytes(self, structured: bool) -> int:
        """Shared memory of a stage: swizzling wants multiples of 1024."""
        return ceil(self.step_bytes(structured) / 1024) * 1024

    def staging_at(self, structured: bool) -> int:
        """First byte of where sums wait for their stores, behind the stages."""
        return self.stages * self.stage_bytes(structured)

    def barriers_at(self, structured: bool) -> int:
        """First byte of the barriers, behind what is staged."""
        return self.staging_at(structured) + self.groups * self.parts * self.tokens * 128

    def turns_at(self, structured: bool) -> int:
        """First byte of the barriers of warpgroups that alternate."""
        return self.barriers_at(structured) + self.stages * 16

    def shared_bytes(self, structured: bool) -> int:
        """Shared memory of a block."""
        return self.turns_at(structured) + (8 * self.groups if self.alternating else 0)


def tile_of(
    rows: int, tokens: int, groups: int, alternating: bool, structured: bool
) -> WarpgroupTile:
    """A tile with as many stages as there is room for: a multiprocessor has one thread block."""
    one = WarpgroupTile(rows, tokens, groups, alternating, 1)
    rest = one.shared_bytes(structured) - one.stage_bytes(structured)
    room = _BLOCK_SHARED_BYTES - rest
    stages = min(_MOST_STAGES, room // (one.stage_bytes(structured) + 16))
    return WarpgroupTile(rows, tokens, groups, alternating, stages)


_TYPICAL_TOKENS = 1024
"""Tokens that a kernel is made for which sees any number of them."""

_LAUNCH = 0.3e-6
_STORE = 0.73e-6, 13.8e-9
"""Seconds until a tile is stored: of any, and for each token of one product's columns."""

_TENSOR_SHARE = 0.945
"""Share of a warpgroup's peak that a loop reaches, at the clock that power allows."""

_STEP_SECONDS = 0.145e-6
_COPY_RATE = 93e9
"""Least time of a step, and bytes a second that one multiprocessor copies while all do."""

_PLACES_SECONDS = 3.84e-6
"""What 2:4 loses to its places in a step, over the columns of a warpgroup's products: few hide
less of it."""


def tile_for(
    matrix: tuple[int, int], layout: Layout, tokens: int | None, gpu: Gpu
) -> WarpgroupTile:
    """The fastest tile for so many tokens at a time, or for a usual number where None."""
    blocks = None if layout.format != "bsr" else matrix[0] * matrix[1] // SIDE**2 // 10
    count = tokens or _TYPICAL_TOKENS
    return min(tiles(layout), key=lambda tile: _seconds(matrix, layout, blocks, count, gpu, tile))


def warpgroup_seconds(
    matrix: tuple[int, int], layout: Layout, blocks: int | None, tokens: int, gpu: Gpu
) -> float:
    """Predicted seconds of a layer; ``blocks`` are those that BSR stores."""
    return min(_seconds(matrix, layout, blocks, tokens, gpu, tile) for tile in tiles(layout))


def _seconds(
    matrix: tuple[int, int],
    layout: Layout,
    blocks: int | None,
    tokens: int,
    gpu: Gpu,
    tile: WarpgroupTile,
) -> float:
    """Seconds with a tile, as fitted to an H200's."""
    n, k = matrix
    structured = layout.format == "2:4"
    row_tiles = ceil(n / tile.rows)
    turns = ceil(row_tiles * ceil(tokens / tile.tokens) / gpu.processors)
    steps = ceil(k / SIDE) if blocks is None else blocks / row_tiles
    products = tile.rows * tile.tokens * SIDE / (2 if structured else 1)
    multiply = products / (gpu.warpgroup * gpu.ghz * 1e9 * _TENSOR_SHARE)
    copy = tile.step_bytes(structured) / _COPY_RATE
    copy += _PLACES_SECONDS / (tile.tokens * tile.parts) if structured else 0
    store = _STORE[0] + _STORE[1] * tile.tokens
    busy = steps * max(multiply, copy, _STEP_SECONDS)
    each = max(busy, (busy + store) / 2) if tile.alternating else busy + store
    last = store * tile.parts if tile.alternating else 0  # one warpgroup stores it alone
    return _LAUNCH + turns * each + last


def tiles(layout: Layout) -> list[WarpgroupTile]:
    """The tiles that a layout's kernels may have."""
    structured = layout.format == "2:4"
    if layout.format == "bsr":
        sizes = [(64, n, 2, True) for n in (64, 128, 192)]
    else:
        sizes = [(64, 64, 1, False), (64, 128, 1, False)]
        sizes += [(128, n, 2, False) for n in (64, 128, 192, 256)]
        sizes.append((128, 128, 2, True))
    return [tile_of(*size, structured) for size in sizes]
