"""An image's pixels in runs whose sums registers hold beside each other, and what they cost.

Needs no TVM.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from sparse_tvm.operators import Convolution, Layout
from sparse_tvm.schedules.cpu.conv_cost import out_size, row_gap
from sparse_tvm.schedules.cpu.cost import arrival_cycles
from sparse_tvm.schedules.cpu.image_operators import window_of
from sparse_tvm.schedules.cpu.planes import rounded
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.sparsity.statistics import TYPICAL_COPIES
from sparse_tvm.targets import Target

MOST_PIXELS = {1: 14, 2: 14, 3: 9}
"""Pixels of a run by the vectors of output channels that meet them: 31 registers of 32 at most."""

_LOOP = 1.04
_TRANSPOSED = 80.0
"""Cycles to transpose the sums of a vector of channels, and to store them."""

_PAGE_BYTES = 4096
"""Of memory: planes as large are on pages of their own."""


@dataclass(frozen=True)
class PixelRuns:
    """How an image whose rows are ``pitch`` elements apart is cut into runs.

    A run has whole rows, ``together``, if more than one of them fit into ``most`` pixels and a
    vector of the plane; else it is one of the ``pieces`` of a row, of which the last may repeat
    pixels of the one before it.
    """

    height: int
    width: int
    pitch: int
    most: int

    @property
    def together(self) -> int:
        """Rows of a run."""
        fitting = min(self.most // self.width, (LANES - self.width) // self.pitch + 1)
        return max(1, min(fitting, self.height))

    @property
    def pieces(self) -> int:
        """Runs of a row."""
        return -(-self.width // self.most)

    @property
    def length(self) -> int:
        """Pixels of a row that a run has."""
        return -(-self.width // self.pieces)

    @property
    def count(self) -> int:
        """Runs of an image."""
        return -(-self.height // self.together) * self.pieces

    @property
    def rest(self) -> int:
        """Rows of the last run, if they are fewer."""
        return self.height % self.together

    def first(self, run: int) -> tuple[int, int]:
        """Row and column of a run's first pixel; of the end, those behind the last one."""
        row, piece = divmod(run, self.pieces)
        return row * self.together, min(piece * self.length, self.width - self.length)

    def start(self, run: int) -> int:
        """How far that is from the plane's first pixel."""
        row, column = self.first(run)
        return row * self.pitch + column

    def pixels(self, rows: int) -> list[tuple[int, int]]:
        """How many rows and columns each pixel of a run with so many rows is from its first one."""
        return [(row, i) for row in range(rows) for i in range(self.length)]

    @property
    def suits(self) -> bool:
        """Whether a vector from a run's start on stays in the room of a plane."""
        return bool(self.width - self.length + LANES <= rounded(self.width))


def runs_of(op: Convolution, vectors: int) -> PixelRuns:
    """The runs of a convolution's output, as far as is known before all its images are."""
    height, width = out_size(op)
    return PixelRuns(height, width, width + row_gap(op), MOST_PIXELS[vectors])


def run_seconds(
    op: Convolution, layout: Layout, pixels: int, target: Target, copies: float = TYPICAL_COPIES
) -> float:
    """Seconds for so many pixels of the output on one core."""
    costs, rows = target.costs, layout.block[0]
    vectors, k = rows // Simd.of(target).lanes, op.matrix[1]
    blocks, runs = -(-op.out_channels // rows), runs_of(op, vectors)

    def run(lines: int) -> float:
        count = lines * runs.length
        scalars = -(-count // costs.scalars_per_load) * costs.load * costs.narrow
        step = max(count * vectors * costs.fma, vectors * costs.load + scalars) * _LOOP
        return k * step + vectors * _TRANSPOSED + costs.row

    whole = runs.count - (runs.rest > 0)
    compute = blocks * (whole * run(runs.together) + (run(runs.rest) if runs.rest else 0.0))
    streamed = arrival_cycles(blocks * k * 4 * rows, 1, copies, target)
    cycles = compute + streamed + (blocks - 1) * _image_cycles(op, target)
    return target.seconds(cycles) * pixels / (runs.height * runs.width)


def _image_cycles(op: Convolution, target: Target) -> float:
    """Cycles that a block of rows waits for the image, which no block before it has left near.

    That is one that the second cache does not hold, of which a run reads a line or two on a page
    for each channel: no stream that the CPU would foresee. Windows use what they read more often.
    """
    plane_bytes = 4.0 * prod(extent or 1 for extent in op.size)
    nbytes = plane_bytes * op.channels
    near = nbytes <= target.caches.l2 or plane_bytes <= _PAGE_BYTES
    return 0.0 if near or window_of(op).taps > 1 else nbytes / target.costs.last
