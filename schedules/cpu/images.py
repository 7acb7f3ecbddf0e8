"""The images that a convolution's kernel reads and writes, and where its taps are in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparse_tvm.operators import STILL, Frames
from sparse_tvm.schedules.cpu.lane_tiles import Expr
from sparse_tvm.schedules.cpu.planes import Planes, Window


@dataclass(frozen=True)
class Images:
    """What a kernel reads and writes.

    ``source`` are the planes that the window reads, by phases if it is strided. ``inputs`` is the
    number of images, where a convolution over time has another one than ``batch``, its output's.
    """

    batch: Expr
    channels: int
    out_channels: int
    source: Planes
    target: Planes
    window: Window
    sizes: Sequence[Any] = ()
    inputs: Expr = None
    frames: Frames = STILL

    @property
    def sources(self) -> Expr:
        """Images that are read: as many as are written, but for videos."""
        return self.batch if self.inputs is None else self.inputs

    def first_source(self, image: Expr) -> Expr:
        """The first image that one of the output is computed from."""
        if self.frames == STILL:
            return image
        video, frame = image // self.frames.out, image % self.frames.out
        return video * self.frames.count + frame * self.frames.stride

    def frame(self, source: Any) -> Expr:
        """How far it is from a tap to the same one of the next image that it reads."""
        planes = self.channels * len(self.window.phases)
        return self.frames.dilation * planes * source.size

    def offsets(self, source: Any) -> list[Expr]:
        """Where each tap finds its operand, from a pixel of the first image of those it reads."""
        return [
            time * self.frame(source) + offset
            for time in range(self.frames.kernel)
            for offset in self.window.offsets(source)
        ]
