"""Convolutions in float32 on images in planes: the weight dense, CSR or BSR, and depthwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel, WeightedFamily, Wish, Work, bytes_of
from sparse_tvm.operators import FLOAT32, STILL, Convolution, Layout
from sparse_tvm.schedules.cpu.block_arrays import block_diagonal, split_arrays
from sparse_tvm.schedules.cpu.blocks import tap_major
from sparse_tvm.schedules.cpu.conv_cost import (
    blocking,
    conv_seconds,
    dense_rows,
    depthwise_seconds,
    grouped_rows,
)
from sparse_tvm.schedules.cpu.families.extents import symbols_of
from sparse_tvm.schedules.cpu.families.matmul import STRUCTURES, wished_blocks
from sparse_tvm.schedules.cpu.image_operators import (
    ImageConvolution,
    blocks_of,
    reads_pixels,
    window_of,
)
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.windows import DEPTHWISE, stored_taps
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import Target


class ImageFamily(WeightedFamily[Convolution]):
    """Convolutions of images in planes: what a pass hands them is an `ImageConvolution`."""

    depthwise: ClassVar[bool]

    def refuses(self, op: Convolution, target: Target) -> str | None:
        if op.depthwise != self.depthwise:
            kind = "depthwise convolutions only" if self.depthwise else "no depthwise convolution"
            return f"{self.name} computes {kind}"
        if op.types != FLOAT32:
            return f"{self.name} computes float32 only"
        if len(op.size) != 2:
            return f"{self.name} has no kernel for {len(op.size)} spatial dimensions"
        if self.depthwise and op.frames != STILL:
            return f"{self.name} has no kernel for videos"
        return None

    def structures(self, op: Convolution, target: Target) -> Sequence[str]:
        return () if self.depthwise else STRUCTURES

    def work(
        self,
        op: Convolution,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        n, k = op.matrix
        count = float(n * k if nonzeros is None else nonzeros)
        blocks = blocks_of(op)
        if blocks is not None:
            count *= blocks.share
        flops = 2.0 * count * pixels_of(op, output) * (output.shape[0] or 0)
        near = 2.0 * flops / op.stored.block[0] if op.stored.sparse else 0.0
        return Work(flops, bytes_of([*operands, output]), near)


def pixels_of(op: Convolution, output: Extents) -> int:
    """Pixels of an image that a call makes; if it may have any size, all there is room for."""
    height, width = op.size[-2:]
    if height is not None and width is not None:
        return math.prod(map(int, window_of(op).out_size((height, width))))
    return math.prod(size or 0 for size in output.shape[1:]) // op.matrix[0]


@dataclass(frozen=True)
class ConvolutionFamily(ImageFamily):
    """Kernels of :mod:`sparse_tvm.schedules.cpu.conv_planes`.

    A grouped convolution is one over all input channels, of whose weight the blocks of the groups
    are stored: its dense form too.
    """

    name: ClassVar[str] = "convolution"
    operator: ClassVar[type[Convolution]] = Convolution
    depthwise: ClassVar[bool] = False

    def candidates(
        self, op: Convolution, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        forms = []
        if wish is None or wish.format == "dense":
            rows = grouped_rows(op, target) if op.groups > 1 else dense_rows(op, target)
            forms.append(("dense", rows))
        # Neighbouring inputs of a convolution are not neighbours in the image: no block is wide.
        forms += [(format, rows) for format, (rows, _) in wished_blocks(weight, wish)]
        return [
            Layout(self.name, format, (rows, 1)).having(
                **blocking(op, "bsr" if op.groups > 1 else format, rows, target)
            )
            for format, rows in dict.fromkeys(forms)
        ]

    def variants(
        self, op: Convolution, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        known = self.candidates(op, weight, target, wish)
        found = []
        for layout in known:
            vectors, parts = layout.get("vectors", 1), layout.get("parts", 1)
            found += [
                layout.having(vectors=fewer) for fewer in {vectors // 2, vectors - 1} - {0, -1}
            ]
            if not layout.sparse and op.groups == 1:
                found.append(layout.having(rows_outermost=1 - layout.get("rows_outermost", 0)))
                if parts > 1:
                    found += [layout.having(parts=other) for other in (1, parts // 2)]
            in_place = op.kernel != (1, 1) and not layout.sparse
            if not in_place and op.frames == STILL:
                found.append(layout.having(packed=1 - layout.get("packed", 0)))
            if not layout.sparse and op.groups == 1:
                continue
            others = {max(1, parts // 2), parts + 1, 2 * parts}
            found += [layout.having(parts=other) for other in others if other <= op.channels]
            found.append(layout.having(prefetch=1 - layout.get("prefetch", 0)))
            if Simd.of(target).weights_together(layout) > 1:
                found.append(layout.having(filled=1 - layout.get("filled", 0)))
        if blocks_of(op) is not None:
            found = [one for one in found if _suits_blocks(one, op)]
        return [layout for layout in dict.fromkeys(found) if layout not in known]

    def cost(
        self,
        op: Convolution,
        layout: Layout,
        weight: WeightStatistics,
        tokens: int,
        target: Target,
    ) -> float:
        if layout.sparse:
            stored = weight.stored_blocks(layout.block)
        else:
            stored = -(-weight.shape[0] // layout.block[0]) * weight.shape[1]
        return conv_seconds(op, layout, stored, tokens, target, weight.copies)

    def pack(
        self, op: Convolution, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        blocks = blocks_of(op)
        w = block_diagonal(w, op.groups) if blocks is None else tap_major(w, blocks.window.taps)
        together = Simd.of(target).weights_together(layout) if layout.get("filled", 0) else 1
        return split_arrays(w, _kernel_layout(op, layout), together)

    def build(
        self, op: Convolution, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.block_conv import block_conv
        from sparse_tvm.schedules.cpu.conv_planes import conv_planes

        assert isinstance(op, ImageConvolution)
        layout, stored, simd = _kernel_layout(op, op.stored), op.stored, Simd.of(target)
        form = stored.format + (f"_{layout.block[0]}x1" if stored.format != "csr" else "")
        images, residuals = images_of(op, operands[0])
        blocks = blocks_of(op)
        if blocks is None:
            function = conv_planes(images, layout, op.epilogue, residuals, simd)
        else:
            channels = (op.channels, op.out_channels)
            function = block_conv(images.batch, *channels, blocks, layout, op.epilogue, simd)
        return Kernel("_".join(["conv2d", form, size_title(op), *op.step_titles]), function)


@dataclass(frozen=True)
class DepthwiseFamily(ImageFamily):
    """Kernels of :mod:`sparse_tvm.schedules.cpu.window_planes`.

    And of :mod:`~sparse_tvm.schedules.cpu.sparse_windows`, where few taps are not zero.
    """

    name: ClassVar[str] = "depthwise_convolution"
    operator: ClassVar[type[Convolution]] = Convolution
    depthwise: ClassVar[bool] = True

    def candidates(
        self, op: Convolution, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        formats = ("dense", "csr")
        return [Layout(self.name, f) for f in formats if wish is None or wish.format == f]

    def cost(
        self,
        op: Convolution,
        layout: Layout,
        weight: WeightStatistics,
        tokens: int,
        target: Target,
    ) -> float:
        taps = weight.nonzeros if layout.sparse else weight.shape[0] * weight.shape[1]
        return depthwise_seconds(op, taps, tokens, target, sparse=layout.sparse)

    def pack(
        self, op: Convolution, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        if layout.sparse:
            return stored_taps(w, window_of(op))
        return {"data": np.ascontiguousarray(w)}

    def build(
        self, op: Convolution, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.sparse_windows import sparse_window_planes
        from sparse_tvm.schedules.cpu.window_planes import window_planes

        assert isinstance(op, ImageConvolution)
        images, residuals = images_of(op, operands[0])
        simd, title = Simd.of(target), ["depthwise_conv2d", size_title(op), *op.step_titles]
        if op.stored.sparse:
            function = sparse_window_planes(images, op.epilogue, residuals, simd)
            title.insert(1, op.stored.format)
        else:
            function = window_planes(images, DEPTHWISE, op.epilogue, residuals, simd)
        return Kernel("_".join(title), function)


def images_of(op: ImageConvolution, x: Extents) -> tuple[Any, list[Planes]]:
    """What the kernel reads and writes, and the planes of its residuals."""
    from sparse_tvm.schedules.cpu.images import Images
    from sparse_tvm.schedules.cpu.lane_tiles import symbol

    window, (size, sizes) = window_of(op), symbols_of(op.size)
    out = window.out_size(size)
    inputs = symbol("batch") if x.shape[0] is None else x.shape[0]
    batch = inputs // op.frames.count * op.frames.out if op.frames != STILL else inputs
    in_place = op.depthwise or reads_pixels(op)
    source = Planes(*(size if in_place else window.phase_size(size)), op.source)
    target = Planes(*out, op.target)
    images = Images(
        batch, op.channels, op.out_channels, source, target, window, sizes, inputs, op.frames
    )
    return images, [Planes(*out, border) for border in op.residuals]


def _suits_blocks(layout: Layout, op: Convolution) -> bool:
    """Whether a layout is one for images in blocks: each part of the weight is of one tap."""
    return layout.get("parts", 1) % window_of(op).taps == 0 and not layout.get("rows_outermost", 0)


def _kernel_layout(op: Convolution, layout: Layout) -> Layout:
    """The layout over all input channels: groups are blocks of it."""
    if op.groups == 1 or layout.sparse:
        return layout
    return Layout(layout.family, "bsr", layout.block, layout.parameters)


def size_title(op: Convolution) -> str:
    """Extents of a convolution, for names of kernels."""
    over_time = (op.frames.kernel,) if op.frames != STILL else ()
    kernel = "x".join(map(str, (*over_time, *op.kernel)))
    size = "x".join("any" if extent is None else str(extent) for extent in op.size)
    return f"{op.out_channels}x{op.channels}x{kernel}_on_{size}"
