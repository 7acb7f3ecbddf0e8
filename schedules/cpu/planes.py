"""The layout of images: each channel a plane, pixels in SIMD lanes, rows end to end.

A channel's rows follow each other ``pitch`` elements apart. The columns between two rows are the
padding of both, and in front of the first row and behind the last one there is as much as the
readers of the image need, so that any tap of a convolution finds its operand at a fixed distance
from the pixel: convolutions run along the plane as dense layers run along tokens, without copies
and without borders. Planes are an odd number of cache lines, since the same pixel of all channels
would fall into a few sets of the cache otherwise.

For a convolution that moves in strides, its input is stored by phases: of every ``stride`` rows and
columns, those with the same remainder share a plane, and of them as many as the convolution reads.
To it, the image then is one without strides. Where taps are so far apart that the padding between
rows would be a good part of them, each column of taps is a phase, the image moved by its distance.

Needs no TVM. Extents are numbers or symbols of TVM's, which calculate alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sparse_tvm.schedules.cpu.simd import LANES

Extent = Any
"""A number, or a symbolic expression."""


def rounded(elements: Extent) -> Extent:
    """So many elements in whole cache lines."""
    return (elements + (LANES - 1)) // LANES * LANES


@dataclass(frozen=True)
class Border:
    """What lies around the rows of an image in planes.

    Attributes
    ----------
    gap : int
        Columns between two rows.
    front, tail : tuple[int, int]
        Whole rows, and elements besides, that readers may touch before the first pixel and behind
        the last.
    padded : bool
        Whether all of that is zero; it is some finite number if not.
    """

    gap: int = 0
    front: tuple[int, int] = (0, 0)
    tail: tuple[int, int] = (0, 0)
    padded: bool = False

    def merged(self, other: Border) -> Border:
        """What serves the readers of both."""

        def larger(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
            return max(a[0], b[0]), max(a[1], b[1])

        return Border(
            max(self.gap, other.gap),
            larger(self.front, other.front),
            larger(self.tail, other.tail),
            self.padded or other.padded,
        )

    def with_gap(self, gap: int) -> Border:
        """The same with more columns between rows."""
        return replace(self, gap=gap)


@dataclass(frozen=True)
class Planes:
    """Where the pixels of a channel are."""

    height: Extent
    width: Extent
    border: Border = Border()

    @property
    def pitch(self) -> Extent:
        """Elements from one row to the next."""
        return self.width + self.border.gap

    @property
    def first(self) -> Extent:
        """Where the first pixel is: at the start of a cache line."""
        rows, elements = self.border.front
        return rounded(rows * self.pitch + elements) if rows else rounded(elements)

    @property
    def pixels(self) -> Extent:
        """Elements from the first pixel to the last."""
        return (self.height - 1) * self.pitch + self.width

    @property
    def room(self) -> Extent:
        """Elements that kernels may write from the first pixel on, row by row in whole vectors."""
        return rounded((self.height - 1) * self.pitch + rounded(self.pitch))

    @property
    def size(self) -> Extent:
        """Elements of a plane."""
        rows, elements = self.border.tail
        tail = rows * self.pitch + elements if rows else elements
        lines = rounded(self.first + self.room + tail) // LANES
        return (lines // 2 * 2 + 1) * LANES


@dataclass(frozen=True)
class Rows:
    """An image as the model has it: rows end to end, nothing between them."""

    height: Extent
    width: Extent

    first = 0

    @property
    def pitch(self) -> Extent:
        """Elements from one row to the next."""
        return self.width

    @property
    def size(self) -> Extent:
        """Elements of a channel."""
        return self.height * self.width


Image = Planes | Rows


@dataclass(frozen=True)
class Window:
    """The taps of a kernel that moves over an image; pairs are vertical, horizontal.

    ``pads`` are top, left, bottom, right. If taps are ``apart``, each column of them reads a phase
    of its own; it then has no strides.
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    apart: bool = False

    @property
    def by_phases(self) -> bool:
        """Whether it reads an image by phases."""
        return self.strided or self.apart

    @property
    def taps(self) -> int:
        """Number of taps."""
        return self.kernel[0] * self.kernel[1]

    @property
    def strided(self) -> bool:
        """Whether it moves more than a pixel at a time."""
        return self.stride != (1, 1)

    def steps(self, axis: int) -> list[tuple[int, int]]:
        """For each tap along an axis how many strides away it is, and in which phase."""
        if axis == 1 and self.apart:
            return [(0, step) for step in self._distances(axis)]
        return [divmod(step, self.stride[axis]) for step in self._distances(axis)]

    def _distances(self, axis: int) -> list[int]:
        """How far each tap along an axis is from the first pixel of a window without pads."""
        return [tap * self.dilation[axis] - self.pads[axis] for tap in range(self.kernel[axis])]

    def distances(self) -> list[tuple[int, int]]:
        """Rows and columns from a window's first pixel to each tap, for one that reads in place."""
        return [(row, column) for row in self._distances(0) for column in self._distances(1)]

    def out_size(self, size: tuple[Extent, Extent]) -> tuple[Extent, Extent]:
        """Rows and columns of the output for an image of ``size``."""
        height, width = (
            (size[i] + self.pads[i] + self.pads[i + 2] - self._reach(i) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        return height, width

    def share_seen(self, size: tuple[int, int]) -> float:
        """How many of all pixels' taps see a pixel, if the output is as large as the image."""
        rows, columns = (
            sum(max(0, size[axis] - abs(step)) for step in self._distances(axis)) for axis in (0, 1)
        )
        return rows * columns / (size[0] * size[1] * self.taps)

    def _reach(self, axis: int) -> int:
        return (self.kernel[axis] - 1) * self.dilation[axis]

    @property
    def wider(self) -> int:
        """Columns that the planes it reads have more than its output."""
        if self.by_phases:
            return self._beyond(1)
        return self._reach(1) - self.pads[1] - self.pads[3]

    @property
    def phases(self) -> list[tuple[int, int]]:
        """Which phases the taps touch."""
        rows, columns = (sorted({phase for _, phase in self.steps(axis)}) for axis in (0, 1))
        return [(row, column) for row in rows for column in columns]

    def phase_size(self, size: tuple[Extent, Extent]) -> tuple[Extent, Extent]:
        """Rows and columns of the planes that it reads of an image of ``size``."""
        if self.apart:
            return size[0], self.out_size(size)[1]
        if not self.strided:
            return size
        height, width = self.out_size(size)
        return height + self._beyond(0), width + self._beyond(1)

    def _beyond(self, axis: int) -> int:
        """Strides from the last output to the furthest tap."""
        return max(0, *(step for step, _ in self.steps(axis)))

    @property
    def reads(self) -> Border:
        """What it reads around the planes, by phases if strided."""
        above, left = (max(0, -min(step for step, _ in self.steps(axis))) for axis in (0, 1))
        below, right = (0, 0) if self.strided else self.pads[2:]
        right = 0 if self.apart else right
        padded = any((above, left, below, right))
        return Border(max(left, right), (above, left), (below, right), padded)

    @property
    def pixel_reads(self) -> Border:
        """What single taps read around planes that are not by phases."""
        top, left, bottom, right = self.pads
        return Border(max(left, right), (top, left), (bottom, right), any(self.pads))

    def offsets(self, source: Any) -> list[Extent]:
        """Where each tap finds its operand, from a pixel in the plane of the first phase."""
        number = {phase: i for i, phase in enumerate(self.phases)}
        return [
            number[row_phase, column_phase] * source.size + row * source.pitch + column
            for row, row_phase in self.steps(0)
            for column, column_phase in self.steps(1)
        ]


IN_PLACE = Window()
"""A window of one pixel: images as they are."""
