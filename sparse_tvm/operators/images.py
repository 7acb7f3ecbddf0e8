"""Operators on images, signals and videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparse_tvm.operators.base import Operator, Types, WeightedOperator


@dataclass(frozen=True)
class Frames:
    """How a convolution moves over images that follow each other, as those of a video do.

    Attributes
    ----------
    count : int
        Images of one video.
    kernel, stride, dilation : int
        Of the convolution over time.
    """

    count: int = 1
    kernel: int = 1
    stride: int = 1
    dilation: int = 1

    @property
    def out(self) -> int:
        """Images of the output for one video."""
        return (self.count - (self.kernel - 1) * self.dilation - 1) // self.stride + 1


STILL = Frames()
"""Each image alone."""


@dataclass(frozen=True, kw_only=True)
class Convolution(WeightedOperator):
    """``epilogue(x * W)`` of images ``[batch, channels, *size]``.

    W is ``[out_channels, channels / groups, *kernel]``. All tuples have one number for each spatial
    dimension; ``pads`` has all starts, then all ends, and None in ``size`` is an extent that only
    run time knows. What it usually is may be in ``usual``, while a layout is chosen. Over
    ``frames``, the batch is of the images of one video after the other, and W is
    ``[out_channels, channels / groups, frames.kernel, *kernel]``.
    """

    name: ClassVar[str] = "convolution"
    operands: ClassVar[str] = "x, the weight's arrays, epilogue tensors"

    channels: int
    out_channels: int
    size: tuple[int | None, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int = 1
    frames: Frames = STILL
    usual: tuple[int | None, ...] = ()

    def typical(self, otherwise: int) -> tuple[int, ...]:
        """The size, with what it usually is, or another number, where nobody knows it."""
        usual = self.usual or (None,) * len(self.size)
        return tuple(
            known or guess or otherwise for known, guess in zip(self.size, usual, strict=True)
        )

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads one input channel, of one image."""
        return self.groups == self.channels > 1 and self.frames == STILL


@dataclass(frozen=True, kw_only=True)
class PadFrames(Operator):
    """Images ``[videos * count, ...]`` with ``pads`` images of zeros around each video's."""

    name: ClassVar[str] = "pad_frames"
    operands: ClassVar[str] = "x"

    count: int
    pads: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class PixelShuffle(Operator):
    """Channels become pixels: ``[batch, channels * blocks, *size]`` to ``[batch, channels, ...]``.

    The channels of each output channel are its pixels within a block, row by row; ``starts`` and
    ``ends`` pixels are cut off along each axis.
    """

    name: ClassVar[str] = "pixel_shuffle"
    operands: ClassVar[str] = "x"

    blocks: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]


_TO_BYTES, _FROM_BYTES = Types(output="uint8"), Types(input="uint8")
_OF_BYTES = Types(input="uint8", output="uint8")

QUANTISED = Types("uint8", "int8", "int32", "uint8")
"""Types of a convolution from bytes to bytes."""


@dataclass(frozen=True, kw_only=True)
class QuantisedConvolution(Convolution):
    """A convolution of an image of bytes, to bytes or float32.

    Sums of bytes by the weight's steps become, for each output channel,
    ``sums * factor + offset``: scales, zero points and bias in one. Bytes are that within
    ``limits``, the least, the largest, and the one that stands for zero; float32 has an epilogue.
    The weight's values are ``steps`` steps from 0 at most.
    """

    name: ClassVar[str] = "quantised_convolution"
    operands: ClassVar[str] = (
        "x, the weight's arrays, factor, offset, limits (of bytes) or epilogue tensors (of float32)"
    )

    types: Types = QUANTISED
    steps: int = 127

    @property
    def rounds(self) -> bool:
        """Whether its output is of bytes."""
        return self.types.output == "uint8"

    @property
    def extras(self) -> int:
        """How many operands there are behind the weight's arrays."""
        return 3 if self.rounds else 2 + super().extras


@dataclass(frozen=True, kw_only=True)
class QuantiseImage(Operator):
    """The bytes ``round(x / steps[0]) + steps[1]`` of an image."""

    name: ClassVar[str] = "quantise_image"
    operands: ClassVar[str] = "x, steps"

    types: Types = _TO_BYTES


@dataclass(frozen=True, kw_only=True)
class DequantiseImage(Operator):
    """What an image's bytes stand for: ``(x - steps[1]) * steps[0]``.

    ``positive`` tells that nothing of it is below zero.
    """

    name: ClassVar[str] = "dequantise_image"
    operands: ClassVar[str] = "x, steps"

    positive: bool = False

    types: Types = _FROM_BYTES


@dataclass(frozen=True, kw_only=True)
class AddImages(Operator):
    """The sum of two images of bytes, as bytes: ``a * steps[0] + b * steps[1] + steps[2]``.

    It is rounded within ``steps[3]`` and ``steps[4]``; ``steps[5]`` stands for zero.
    """

    name: ClassVar[str] = "add_images"
    operands: ClassVar[str] = "a, b, steps"

    types: Types = _OF_BYTES
