"""What windows compute that look at each channel on its own, and what they read to do so.

Needs no TVM.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparse_tvm.schedules.cpu.planes import Border, Extent, Window
from sparse_tvm.schedules.cpu.simd import LANES, Simd

DIRECT_VECTORS = 8
ROW_BITS = 16
COLUMN_MASK = (1 << ROW_BITS) - 1
_MOST_IN_PLACE = 25
"""Taps of a window, with few registers, that cost less than to shift sums against each other."""

_LOWEST = -3.4028234663852886e38


@dataclass(frozen=True)
class Operation:
    """What a window computes: a sum of weighted pixels, their mean, or the largest."""

    name: str

    @property
    def weighted(self) -> bool:
        """Whether each channel has a weight for each tap."""
        return self.name == "depthwise"

    @property
    def identity(self) -> float:
        """What changes nothing."""
        return _LOWEST if self.name == "max" else 0.0


DEPTHWISE, MAX, MEAN = Operation("depthwise"), Operation("max"), Operation("mean")


def rolls(window: Window, vectors: Extent, operation: Operation, simd: Simd) -> bool:
    """Whether rows are read once, for all columns of the window; else each tap reads its own.

    Where a window's weights do not fit into the registers, each is loaded for each vector then,
    instead of once for several.
    """
    few = simd.few_registers and window.taps <= _MOST_IN_PLACE
    if few and operation.weighted and not window.strided:
        return False
    far = max(abs(step) for step, _ in window.steps(1)) >= 4
    short = isinstance(vectors, int) and vectors <= 2 * DIRECT_VECTORS
    return window.stride[1] <= 2 and not far and (window.strided or not short)


def reads_in_place(window: Window) -> Border:
    """What a window reads around planes that are not by phases."""
    top, left, bottom, right = window.pads
    wide = window.kernel[1] > 1
    beyond = 4 * LANES if window.stride[1] > 1 else LANES if wide else 0
    return Border(
        max(left, right),
        (top, max(left, LANES if wide else 0)),
        (bottom, max(right, beyond)),
        any(window.pads),
    )


def stored_taps(w: np.ndarray, window: Window) -> dict[str, np.ndarray]:
    """The weight ``[channels, taps]`` of a depthwise convolution.

    ``data`` float32 and ``taps`` int32 ``[stored]`` are the taps that are not zero, channel by
    channel, and how many rows and columns they are from the window's first one: rows in the upper
    16 bits. ``indptr`` int32 ``[channels + 1]`` is where each channel's begin.
    """
    channels, taps = np.nonzero(w)
    rows, columns = np.divmod(taps, window.kernel[1])
    places = (rows * window.dilation[0] << ROW_BITS) + columns * window.dilation[1]
    data = w[channels, taps]
    if not len(data):  # kernels want at least one element
        data, places = np.zeros(1), np.zeros(1)
    counts = np.bincount(channels, minlength=len(w))
    return {
        "data": data.astype(np.float32),
        "taps": places.astype(np.int32),
        "indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
    }
