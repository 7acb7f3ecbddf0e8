"""Images in planes but for convolutions: conversions, masks, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sparse_tvm.families import Extents, Kernel
from sparse_tvm.operators import PadFrames, PixelShuffle
from sparse_tvm.schedules.cpu.blocks import Blocks
from sparse_tvm.schedules.cpu.families.extents import known_or_symbols, symbols_of
from sparse_tvm.schedules.cpu.families.rows import MovesOnly
from sparse_tvm.schedules.cpu.image_operators import (
    ImageBlocks,
    ImageMask,
    ImagePack,
    ImagePooling,
    ImageReduction,
    ImageShuffle,
    ImageToTiles,
    TilesToImage,
)
from sparse_tvm.schedules.cpu.planes import Border, Image, Planes, Rows
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.windows import MAX, MEAN
from sparse_tvm.targets import Target

_OPERATIONS = {"max": MAX, "mean": MEAN}
_AXES = ("batch", "channels", "size")


@dataclass(frozen=True)
class ImagePackFamily(MovesOnly[ImagePack]):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.image_pack`."""

    name: ClassVar[str] = "image_pack"
    operator: ClassVar[type[ImagePack]] = ImagePack

    def refuses(self, op: ImagePack, target: Target) -> str | None:
        return None if op.types.input == op.types.output else f"{self.name} converts no elements"

    def build(
        self, op: ImagePack, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.image_pack import image_pack

        size, sizes = symbols_of(op.size)
        batch, channels, _ = known_or_symbols(operands[0], _AXES)
        source, wanted = (
            _image(extent, border)
            for extent, border in (
                (size, op.source),
                (op.window.phase_size(size), op.target),
            )
        )
        words = op.types.input == "int32"
        simd = Simd.of(target)
        function = image_pack(batch, channels, source, wanted, op.window, sizes, simd, words)
        title = "unpack_image" if op.target is None else "pack_image"
        title += "_words" if words else ""
        return Kernel(title, function)


def _image(size: tuple[Any, Any], border: Border | None) -> Image:
    return Rows(*size) if border is None else Planes(*size, border)


@dataclass(frozen=True)
class ImageBlocksFamily(MovesOnly[ImageBlocks]):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.image_blocks`."""

    name: ClassVar[str] = "image_blocks"
    operator: ClassVar[type[ImageBlocks]] = ImageBlocks

    def build(
        self, op: ImageBlocks, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.image_blocks import image_blocks

        batch, channels, _ = known_or_symbols(operands[0], _AXES)
        image, blocks = _image(op.size, op.image), Blocks(*op.size, op.window)
        function = image_blocks(batch, channels, image, blocks, Simd.of(target), back=op.back)
        return Kernel("blocks_to_image" if op.back else "image_to_blocks", function)


@dataclass(frozen=True)
class ImageToTilesFamily(MovesOnly[ImageToTiles]):
    """The kernel of that name in :mod:`sparse_tvm.schedules.cpu.image_tiles`."""

    name: ClassVar[str] = "image_to_tiles"
    operator: ClassVar[type[ImageToTiles]] = ImageToTiles

    def build(
        self, op: ImageToTiles, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.image_tiles import image_to_tiles

        size, sizes = symbols_of(op.size)
        batch, channels, _ = known_or_symbols(operands[0], _AXES)
        planes, simd = Planes(*size, op.source), Simd.of(target)
        return Kernel(self.name, image_to_tiles(batch, channels, planes, sizes, simd))


@dataclass(frozen=True)
class TilesToImageFamily(MovesOnly[TilesToImage]):
    """The kernel of that name in :mod:`sparse_tvm.schedules.cpu.image_tiles`."""

    name: ClassVar[str] = "tiles_to_image"
    operator: ClassVar[type[TilesToImage]] = TilesToImage

    def build(
        self, op: TilesToImage, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.image_tiles import tiles_to_image

        size, sizes = symbols_of(op.size)
        batch, channels, _ = known_or_symbols(output, _AXES)
        planes, simd = Planes(*size, op.target), Simd.of(target)
        return Kernel(self.name, tiles_to_image(batch, channels, planes, sizes, simd))


@dataclass(frozen=True)
class PadFramesFamily(MovesOnly[PadFrames]):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.frames`, of images in any layout."""

    name: ClassVar[str] = "pad_frames"
    operator: ClassVar[type[PadFrames]] = PadFrames

    def build(
        self, op: PadFrames, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.frames import pad_frames

        (x,) = operands
        names = ("batch", "channels", "height", "width")[: len(x.shape)]
        images, channels, *size = known_or_symbols(x, names)
        function = pad_frames(images, op.count, op.pads, channels, size, Simd.of(target))
        return Kernel(self.name, function)


@dataclass(frozen=True)
class ImageMaskFamily(MovesOnly[ImageMask]):
    """The kernel of that name in :mod:`sparse_tvm.schedules.cpu.plane_code`."""

    name: ClassVar[str] = "image_mask"
    operator: ClassVar[type[ImageMask]] = ImageMask

    def refuses(self, op: ImageMask, target: Target) -> str | None:
        return None  # nothing but extents goes into it

    def build(
        self, op: ImageMask, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.plane_code import image_mask

        size, sizes = symbols_of(op.size)
        return Kernel(self.name, image_mask(Planes(*size, op.border), sizes))


@dataclass(frozen=True)
class ImagePoolingFamily(MovesOnly[ImagePooling]):
    """Kernels of :mod:`sparse_tvm.schedules.cpu.window_planes`."""

    name: ClassVar[str] = "image_pooling"
    operator: ClassVar[type[ImagePooling]] = ImagePooling

    def build(
        self, op: ImagePooling, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.images import Images
        from sparse_tvm.schedules.cpu.window_planes import window_planes

        size, sizes = symbols_of(op.size)
        batch, channels, _ = known_or_symbols(operands[0], _AXES)
        source = Planes(*size, op.source)
        wanted = Planes(*op.window.out_size(size), op.target)
        images = Images(batch, channels, channels, source, wanted, op.window, sizes)
        function = window_planes(images, _OPERATIONS[op.function], (), [], Simd.of(target))
        return Kernel(f"{op.function}_pool", function)


@dataclass(frozen=True)
class ImageReductionFamily(MovesOnly[ImageReduction]):
    """Kernels of :mod:`sparse_tvm.schedules.cpu.image_reduction`."""

    name: ClassVar[str] = "image_reduction"
    operator: ClassVar[type[ImageReduction]] = ImageReduction

    def build(
        self, op: ImageReduction, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.image_reduction import image_reduction

        size, sizes = symbols_of(op.size)
        batch, channels, _ = known_or_symbols(operands[0], _AXES)
        source, operation = Planes(*size, op.source), _OPERATIONS[op.function]
        function = image_reduction(batch, channels, source, operation, sizes, Simd.of(target))
        return Kernel(f"global_{op.function}", function)


@dataclass(frozen=True)
class PixelShuffleFamily(MovesOnly[PixelShuffle]):
    """What becomes an `ImageShuffle` when images get their layout."""

    name: ClassVar[str] = "pixel_shuffle"
    operator: ClassVar[type[PixelShuffle]] = PixelShuffle

    def build(
        self, op: PixelShuffle, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        raise ValueError(f"{self.name} is of images that are not in planes")


@dataclass(frozen=True)
class ImageShuffleFamily(MovesOnly[ImageShuffle]):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.pixel_shuffle`."""

    name: ClassVar[str] = "image_shuffle"
    operator: ClassVar[type[ImageShuffle]] = ImageShuffle

    def build(
        self, op: ImageShuffle, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.pixel_shuffle import pixel_shuffle

        size, sizes = symbols_of(op.size)
        batch, channels, _ = known_or_symbols(operands[0], _AXES)
        height, width = (size[i] * op.blocks[i] - op.starts[i] - op.ends[i] for i in (0, 1))
        source, wanted = Planes(*size, op.source), Planes(height, width, op.target)
        function = pixel_shuffle(
            batch, channels, source, wanted, op.blocks, op.starts, sizes, Simd.of(target)
        )
        return Kernel("pixel_shuffle_" + "x".join(map(str, op.blocks)), function)
