"""The layout of an image for taps that are far apart: pixels that see the same taps, together.

Where the taps of a window are ``d`` rows apart, rows ``[0, H % d)``, ``[H % d, d)``,
``[d, d + H % d)`` and so on each see the same taps and, of each of them, all of such a part of
the image again, two parts further on for each ``d``; and so do columns. The blocks where parts of
rows and columns meet lie one after the other, each from the start of a cache line, row by row
without gaps. A tap then moves whole blocks onto blocks, or sees nothing but padding and is left
out: there is no padding at all.

Needs no TVM.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from sparse_tvm.schedules.cpu.planes import Planes, Window, rounded
from sparse_tvm.schedules.cpu.simd import LANES

Parts = tuple[int, int]
"""Number of a part of the rows, and of one of the columns."""


@dataclass(frozen=True)
class Block:
    """Pixels of an image, which lie from element ``first`` of a plane on."""

    rows: range
    columns: range
    first: int

    @property
    def pixels(self) -> int:
        """How many there are."""
        return len(self.rows) * len(self.columns)


@dataclass(frozen=True)
class Blocks:
    """Where the pixels of a channel are, for a window that `suits`."""

    height: int
    width: int
    window: Window

    @staticmethod
    def suits(size: tuple[int, int], window: Window) -> bool:
        """Whether a window moves whole blocks onto blocks, to an output of the same ``size``."""
        whole = all(pad % window.dilation[i % 2] == 0 for i, pad in enumerate(window.pads))
        return whole and not window.strided and window.out_size(size) == size

    @cached_property
    def blocks(self) -> dict[Parts, Block]:
        """All that have pixels, in order."""
        found, first = {}, 0
        for i, rows in enumerate(_parts(self.height, self.window.dilation[0])):
            for j, columns in enumerate(_parts(self.width, self.window.dilation[1])):
                block = Block(rows, columns, first)
                if block.pixels:
                    found[i, j] = block
                    first += rounded(block.pixels)
        return found

    @property
    def planes(self) -> Planes:
        """The same memory as planes of a single row."""
        return Planes(1, sum(rounded(block.pixels) for block in self.blocks.values()))

    def seen(self, parts: Parts) -> list[tuple[int, Block]]:
        """The taps that see pixels from a block, and which."""
        found = []
        for tap, steps in enumerate(self.window.distances()):
            down, right = (
                2 * step // apart for step, apart in zip(steps, self.window.dilation, strict=True)
            )
            block = self.blocks.get((parts[0] + down, parts[1] + right))
            if block is not None:
                found.append((tap, block))
        return found

    @property
    def largest(self) -> int:
        """Pixels of the largest block."""
        return max(block.pixels for block in self.blocks.values())

    @property
    def share(self) -> float:
        """Products of lines with taps, of those that all taps of an image without gaps have."""
        products = sum(
            rounded(block.pixels) // LANES * len(self.seen(parts))
            for parts, block in self.blocks.items()
        )
        return float(products / (rounded(self.height * self.width) // LANES * self.window.taps))


def _parts(extent: int, apart: int) -> list[range]:
    """Rows or columns that see the same taps; empty ones keep the rest in step."""
    rest = extent % apart
    starts = [start for whole in range(0, extent + 1, apart) for start in (whole, whole + rest)]
    return [range(a, b) for a, b in pairwise(starts)]


def tap_major(w: np.ndarray, taps: int) -> np.ndarray:
    """A weight ``[out_channels, channels * taps]`` with the columns of each tap together."""
    rows = len(w)
    return w.reshape(rows, -1, taps).transpose(0, 2, 1).reshape(rows, -1)
