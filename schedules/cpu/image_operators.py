"""Operators on images in planes (see :mod:`sparse_tvm.schedules.cpu.planes`).

``size`` is that of the image that an operator reads, rows and columns, None for what only run time
knows; all of them take it as an operand too, for the kernel to get what is not known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from sparse_tvm.operators import (
    STILL,
    Convolution,
    Operator,
    QuantisedConvolution,
    Residual,
    Types,
)
from sparse_tvm.schedules.cpu.blocks import Blocks
from sparse_tvm.schedules.cpu.planes import IN_PLACE, Border, Window

Size = tuple[int | None, int | None]
INT32 = Types(output="int32")

CHANNEL_LANES = "channel_lanes_convolution"
"""The family of convolutions that read single pixels."""

NARROW = 4
"""How many times its padding an image has to be wide for all of its group to bear it."""

TYPICAL_WIDTH = 28
"""Columns of an image of which only run time knows them."""

_BLOCKS_SHARE = 0.65
"""Of a window's products, how many are left at most where images go to blocks and back."""


@dataclass(frozen=True, kw_only=True)
class ImageConvolution(Convolution):
    """A convolution of an image in planes, by phases unless it is depthwise, or in blocks.

    Attributes
    ----------
    source, target : Border
        Of the planes that it reads and writes; blocks have none.
    residuals : tuple[Border, ...]
        Of the epilogue's, in order.
    """

    name: ClassVar[str] = "image_convolution"
    operands: ClassVar[str] = "x, the weight's arrays, size, mask?, epilogue tensors"

    source: Border
    target: Border
    residuals: tuple[Border, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WordConvolution(QuantisedConvolution):
    """A quantised convolution of an image in planes of words, by phases if strided or apart."""

    name: ClassVar[str] = "word_convolution"
    operands: ClassVar[str] = (
        "x, the weight's arrays, size, factor, offset, mask?, limits or epilogue tensors"
    )

    source: Border
    target: Border
    residuals: tuple[Border, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WordRows(Operator):
    """An operator on each pixel, from planes or planes of words to such.

    Attributes
    ----------
    function : str
        ``quantise``, ``dequantise`` or ``add``.
    channels : int
        Of the image.
    sources, target : tuple[Border, ...], Border
        Of the images that it reads and writes.
    """

    name: ClassVar[str] = "word_rows"
    operands: ClassVar[str] = "images, size, steps"

    function: str
    channels: int
    size: Size
    sources: tuple[Border, ...]
    target: Border


@dataclass(frozen=True, kw_only=True)
class ImagePooling(Operator):
    """The largest pixel of each window, or the mean of its pixels (``function`` max or mean)."""

    name: ClassVar[str] = "image_pooling"
    operands: ClassVar[str] = "x, size, mask?"

    function: str
    size: Size
    window: Window
    source: Border
    target: Border


@dataclass(frozen=True, kw_only=True)
class ImageShuffle(Operator):
    """A pixel shuffle from planes to planes, of blocks of rows and columns."""

    name: ClassVar[str] = "image_shuffle"
    operands: ClassVar[str] = "x, size"

    size: Size
    blocks: tuple[int, int]
    starts: tuple[int, int]
    ends: tuple[int, int]
    source: Border
    target: Border


@dataclass(frozen=True, kw_only=True)
class ImageReduction(Operator):
    """The largest pixel of each channel, or the mean of all: ``[batch, channels]``."""

    name: ClassVar[str] = "image_reduction"
    operands: ClassVar[str] = "x, size, mask"

    function: str
    size: Size
    source: Border


@dataclass(frozen=True, kw_only=True)
class ImagePack(Operator):
    """From one layout to another: into planes, of the phases that a window reads, or out of them.

    A border that is None stands for the model's layout. Words are padded by ``fill``, int32
    ``[1]``.
    """

    name: ClassVar[str] = "image_pack"
    operands: ClassVar[str] = "x, size, fill (of words)"

    size: Size
    source: Border | None = None
    target: Border | None = None
    window: Window = IN_PLACE


@dataclass(frozen=True, kw_only=True)
class ImageBlocks(Operator):
    """From planes to the blocks of a window, or ``back``.

    An image that is None stands for the model's layout.
    """

    name: ClassVar[str] = "image_blocks"
    operands: ClassVar[str] = "x"

    size: tuple[int, int]
    window: Window
    image: Border | None
    back: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageToTiles(Operator):
    """From planes to lane tiles, whose tokens are the pixels, row by row."""

    name: ClassVar[str] = "image_to_tiles"
    operands: ClassVar[str] = "x, size"

    size: Size
    source: Border


@dataclass(frozen=True, kw_only=True)
class TilesToImage(Operator):
    """From lane tiles to planes, whose pixels are the tokens, row by row."""

    name: ClassVar[str] = "tiles_to_image"
    operands: ClassVar[str] = "x, size"

    size: Size
    target: Border


@dataclass(frozen=True, kw_only=True)
class ImageMask(Operator):
    """Which elements of planes are pixels: ones in all bits, or none."""

    name: ClassVar[str] = "image_mask"
    operands: ClassVar[str] = "size"

    size: Size
    border: Border
    types: Types = INT32


def window_of(op: Convolution) -> Window:
    """The window of a convolution of images.

    Its columns of taps are apart where the padding between rows would be a good part of them.
    """
    (kernel, stride, dilation), pads = (
        ((int(pair[0]), int(pair[1])) for pair in (op.kernel, op.stride, op.dilation)),
        op.pads,
    )
    window = Window(kernel, stride, dilation, (pads[0], pads[1], pads[2], pads[3]))
    height, width = op.size
    wide = window.reads.gap * NARROW > (width or TYPICAL_WIDTH)
    if op.depthwise or window.strided or dilation[1] == 1 or height == 1 or not wide:
        return window
    return replace(window, apart=True)


def reads_pixels(op: Convolution) -> bool:
    """Whether its kernel reads single pixels, which are in place whatever its window is."""
    return op.stored.family == CHANNEL_LANES


def blocks_of(op: Convolution) -> Blocks | None:
    """The blocks in which a convolution's images lie, where so few of its taps see pixels."""
    height, width = op.size if len(op.size) == 2 else (None, None)
    plain = op.groups == 1 and op.frames == STILL and not isinstance(op, QuantisedConvolution)
    adds = any(isinstance(step, Residual) for step in op.epilogue)
    if not plain or adds or height is None or width is None:
        return None
    window = replace(window_of(op), apart=False)
    suits = window.taps > 1 and Blocks.suits((height, width), window)
    if not suits or window.share_seen((height, width)) > _BLOCKS_SHARE:
        return None
    blocks = Blocks(height, width, window)
    return blocks if blocks.share <= _BLOCKS_SHARE else None
