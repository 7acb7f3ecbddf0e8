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

_LAUNCH, _LOOK_UP = 1.4e-6, 0.6e-6
"""Seconds until a kernel works, and until it knows where a row's blocks are."""

_STORE, _STORE_TOKEN, _ACTIVATE_TOKEN = 0.31e-6, 3.1e-9, 7.5e-9
"""Seconds until a tile is on its way to memory: of any, for each token, and more for each where an
activation takes powers and quotients."""

_TENSOR_SHARE = 0.895
"""Share of a warpgroup's peak that a loop reaches, at the clock that power allows."""

_STEP_SECONDS = 0.15e-6
_COPY_RATE, _BLOCK_RATE = 141e9, 70e9
"""Least time of a step, and bytes a second that one multiprocessor copies while all do: a tile of a
weight in blocks has its own columns of the activations, which no neighbour reads at that time."""

_STRUCTURED_RATE, _STRUCTURED_WEIGHT, _STRUCTURED_WIDE = 158e9, 3.0, 1.3
"""The same of 2:4, a byte of whose weight and places takes as long as three; and what its products
of 256 columns lose."""

_MEMORY_SHARE = 0.88
_BLEND = 3
"""Share of the memory's rate that activations and outputs come to, and how what multiprocessors and
memory take, which overlap, makes a whole: by a norm of this order."""


def tile_for(
    matrix: tuple[int, int], layout: Layout, tokens: int | None, gpu: Gpu, activated: bool = False
) -> WarpgroupTile:
    """The fastest tile for so many tokens at a time, or for a usual number where None.

    ``activated`` tells that the epilogue takes powers, as GELU's does.
    """
    blocks = None if layout.format != "bsr" else matrix[0] * matrix[1] // SIDE**2 // 10
    count = tokens or _TYPICAL_TOKENS
    found = tiles(layout)
    return min(found, key=lambda t: _seconds(matrix, layout, blocks, count, gpu, t, activated))


def warpgroup_seconds(
    matrix: tuple[int, int],
    layout: Layout,
    blocks: int | None,
    tokens: int,
    gpu: Gpu,
    activated: bool = False,
) -> float:
    """Predicted seconds of a layer; ``blocks`` are those that BSR stores."""
    found = tiles(layout)
    return min(_seconds(matrix, layout, blocks, tokens, gpu, t, activated) for t in found)


def _seconds(
    matrix: tuple[int, int],
    layout: Layout,
    blocks: int | None,
    tokens: int,
    gpu: Gpu,
    tile: WarpgroupTile,
    activated: bool,
) -> float:
    """Seconds with a tile, as fitted to an H200's: the tile that it prefers is 1 % off the best."""
    n, k = matrix
    structured = layout.format == "2:4"
    row_tiles = ceil(n / tile.rows)
    turns = ceil(row_tiles * ceil(tokens / tile.tokens) / gpu.processors)
    steps = ceil(k / SIDE) if blocks is None else blocks / row_tiles
    products = tile.rows * tile.tokens * SIDE / (2 if structured else 1)
    multiply = products / (gpu.warpgroup * gpu.ghz * 1e9 * _TENSOR_SHARE)
    busy = steps * max(multiply, _copy_seconds(tile, layout), _STEP_SECONDS)
    if structured and tile.tokens > 192:
        busy *= _STRUCTURED_WIDE
    each_token = _STORE_TOKEN + (_ACTIVATE_TOKEN if activated else 0)
    store = _STORE + each_token * tile.tokens
    each = max(busy, (busy + store) / 2) if tile.alternating else busy + store
    last = store if tile.alternating else 0  # one warpgroup stores it alone
    memory = tokens * (n + k) * 2 / (gpu.memory * _MEMORY_SHARE)
    begin = _LAUNCH + (0 if blocks is None else _LOOK_UP)
    return begin + float(((turns * each + last) ** _BLEND + memory**_BLEND) ** (1 / _BLEND))


def _copy_seconds(tile: WarpgroupTile, layout: Layout) -> float:
    """Seconds that copying one step takes."""
    structured = layout.format == "2:4"
    weight = tile.step_bytes(structured) - tile.weight_at
    if structured:
        return (tile.weight_at + _STRUCTURED_WEIGHT * weight) / _STRUCTURED_RATE
    rate = _COPY_RATE if layout.format == "dense" else _BLOCK_RATE
    return (tile.weight_at + weight) / rate


def tiles(layout: Layout) -> list[WarpgroupTile]:
    """The tiles that a layout's kernels may have."""
    structured = layout.format == "2:4"
    if layout.format == "bsr":
        sizes = [(64, n, 2, True) for n in (256, 192, 128, 64)]
    else:
        sizes = [(64, n, 1, False) for n in (64, 128)]
        sizes += [(128, n, 2, False) for n in (128, 192, 256)]
    return [tile_of(*size, structured) for size in sizes]
