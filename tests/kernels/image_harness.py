"""What the tests of kernels for images share: extents, planes with poisoned borders, windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from sparse_tvm.operators import Activation, Bias, Clamp, Residual, Step
from sparse_tvm.schedules.cpu.lane_tiles import symbol
from sparse_tvm.schedules.cpu.planes import Planes, Window

POISON = np.float32(-1e30)
"""Finite, as whatever lies between rows; it would ruin any sum that it got into."""

extents = st.one_of(st.sampled_from([1, 7, 14, 16, 17, 28, 33]), st.integers(1, 40))
images = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "channels": st.integers(1, 5),
        "height": extents,
        "width": extents,
        "gap": st.integers(0, 3),
        "symbolic": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
kernels = st.tuples(st.integers(1, 5), st.integers(1, 5))
pads = st.tuples(*[st.integers(0, 4)] * 4)
windows = st.builds(Window, kernel=kernels, stride=pairs, dilation=pairs, pads=pads)
apart = st.builds(
    Window,
    kernel=kernels,
    dilation=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    pads=st.tuples(*[st.integers(0, 9)] * 4),
    apart=st.just(True),
)
"""Windows whose columns of taps read planes of their own."""


class Extent:
    """Batch, height and width of an image, as numbers and as a kernel gets them."""

    def __init__(self, image: dict[str, Any]) -> None:
        self.numbers = (image["height"], image["width"])
        self._batch, self._rng = image["batch"], np.random.default_rng(image["seed"])
        self.symbols, self.batch, self.names = self.numbers, self._batch, []
        if image["symbolic"]:
            self.names = [symbol("height"), symbol("width")]
            self.symbols, self.batch = tuple(self.names), symbol("batch")

    @property
    def sizes(self) -> list[int]:
        """The arguments for the symbols."""
        return list(self.numbers) if self.names else []

    def random(self, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """An image ``[batch, channels, height, width]``."""
        shape = (self._batch, channels, *(size or self.numbers))
        return self._rng.standard_normal(shape).astype("float32")


def to_planes(x: np.ndarray, planes: Planes, border: float | None = None) -> np.ndarray:
    """``[batch, channels, height, width]`` in planes."""
    batch, channels, height, width = x.shape
    fill = (0 if planes.border.padded else POISON) if border is None else border
    out = np.full((batch, channels, planes.size), fill, "float32")
    for row in range(height):
        start = planes.first + row * planes.pitch
        out[:, :, start : start + width] = x[:, :, row]
    return out


def from_planes(stored: np.ndarray, planes: Planes) -> np.ndarray:
    """``[batch, channels, height, width]`` out of planes."""
    starts = [planes.first + row * planes.pitch for row in range(planes.height)]
    return np.stack([stored[:, :, at : at + planes.width] for at in starts], axis=2)


def phases_of(x: np.ndarray, window: Window) -> np.ndarray:
    """``[batch, channels * phases, ...]``: what a window reads of each phase, zero-padded."""
    batch, channels, *size = x.shape
    height, width = window.phase_size(size)
    out = np.zeros((batch, channels, len(window.phases), height, width), "float32")
    for number, (row, column) in enumerate(window.phases):
        if window.apart:
            moved = np.pad(x, ((0, 0), (0, 0), (0, 0), (max(0, -column), max(0, column) + width)))
            out[:, :, number] = moved[:, :, :, max(0, column) :][:, :, :, :width]
            continue
        part = x[:, :, row :: window.stride[0], column :: window.stride[1]][:, :, :height, :width]
        out[:, :, number, : part.shape[2], : part.shape[3]] = part
    return out.reshape(batch, channels * len(window.phases), height, width)


def convolved(x: np.ndarray, w: np.ndarray, window: Window) -> np.ndarray:
    """Convolution with the weight ``[out, channels * taps]``, in float64."""
    patches = np.stack(list(taps_of(x, window)), axis=2).astype("float64")
    return np.einsum("bckyx,ock->boyx", patches, w.reshape(len(w), x.shape[1], window.taps))


def taps_of(x: np.ndarray, window: Window, fill: float = 0.0) -> Iterator[np.ndarray]:
    """What each tap of a window reads: one image per tap, of the output's size."""
    top, left, bottom, right = window.pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    height, width = window.out_size(x.shape[2:])
    for row in range(window.kernel[0]):
        for column in range(window.kernel[1]):
            down, right = row * window.dilation[0], column * window.dilation[1]
            part = padded[:, :, down :: window.stride[0], right :: window.stride[1]]
            yield part[:, :, :height, :width]


STEPS = [
    *(Bias(), Residual(), Clamp(0.0, 6.0)),
    *map(Activation, ("relu", "silu", "hard_swish")),
]
epilogues = st.lists(st.sampled_from(STEPS), max_size=3)
_FUNCTIONS = {
    "relu": lambda v: np.maximum(v, 0),
    "silu": lambda v: v / (1 + np.exp(-v)),
    "hard_swish": lambda v: v * np.clip(v / 6 + 0.5, 0, 1),
}


def apply_epilogue(
    y: np.ndarray, epilogue: Sequence[Step], rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The steps applied to ``y``, and the random operands that they took."""
    extras = []
    for step in epilogue:
        if isinstance(step, Bias):
            extras.append(rng.standard_normal(y.shape[1]).astype("float32"))
            y = y + extras[-1][None, :, None, None]
        elif isinstance(step, Residual):
            extras.append(rng.standard_normal(y.shape).astype("float32"))
            y = y + extras[-1]
        elif isinstance(step, Clamp):
            y = np.clip(y, step.low, step.high)
        else:
            y = _FUNCTIONS[step.function](y)
    return y, extras


def mask(planes: Planes) -> np.ndarray:
    """The mask of an image's planes."""
    pixels = np.zeros(planes.room, "int32")
    for row in range(planes.height):
        pixels[row * planes.pitch :][: planes.width] = -1
    return pixels
