"""3x3 convolutions in float32 by Winograd's filtering of columns: the weight dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel, Wish, Work, bytes_of
from sparse_tvm.operators import STILL, Convolution, Layout
from sparse_tvm.schedules.cpu.conv_cost import out_size
from sparse_tvm.schedules.cpu.families.convolution import (
    ImageFamily,
    images_of,
    pixels_of,
    size_title,
)
from sparse_tvm.schedules.cpu.image_operators import ImageConvolution, window_of
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.winograd import OUTPUTS, TAPS, Bands, transforms
from sparse_tvm.schedules.cpu.winograd_cost import blocking, outputs_of, winograd_seconds
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import Target

_LEAST_CHANNELS = 16
"""Fewer make transforms cost more than products."""


@dataclass(frozen=True)
class WinogradFamily(ImageFamily):
    """Kernels of :mod:`sparse_tvm.schedules.cpu.winograd_planes`."""

    name: ClassVar[str] = "winograd_convolution"
    operator: ClassVar[type[Convolution]] = Convolution
    depthwise: ClassVar[bool] = False

    def refuses(self, op: Convolution, target: Target) -> str | None:
        refusal = super().refuses(op, target)
        if refusal is not None:
            return refusal
        window = window_of(op)
        if window.kernel != (TAPS, TAPS) or window.strided or window.dilation != (1, 1):
            return f"{self.name} computes 3x3 kernels that move by one pixel only"
        if op.groups > 1 or op.frames != STILL:
            return f"{self.name} computes neither groups nor videos"
        if min(op.channels, op.out_channels) < _LEAST_CHANNELS:
            return f"{self.name} is for {_LEAST_CHANNELS} channels and more"
        return None

    def candidates(
        self, op: Convolution, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        if wish is not None and wish.format != "dense":
            return []
        rows, parameters = blocking(op, target, outputs_of(op))
        return [Layout(self.name, "dense", (rows, 1)).having(**parameters)]

    def variants(
        self, op: Convolution, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        known = self.candidates(op, weight, target, wish)
        if not known:
            return []
        others = [blocking(op, target, outputs) for outputs in OUTPUTS]
        found = [Layout(self.name, "dense", (rows, 1)).having(**rest) for rows, rest in others]
        return [layout for layout in found if layout not in known]

    def cost(
        self,
        op: Convolution,
        layout: Layout,
        weight: WeightStatistics,
        tokens: int,
        target: Target,
    ) -> float:
        return winograd_seconds(op, layout, tokens, target, weight.copies)

    def pack(
        self, op: Convolution, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        return {"data": packed(w, layout)}

    def work(
        self,
        op: Convolution,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        height, width = out_size(op)
        bands = Bands(height, width, op.stored.get("outputs", 2), 1)
        rows = bands.count * bands.points
        if None in op.size:
            width, rows = pixels_of(op, output), bands.points / bands.outputs
        products = rows * width * op.matrix[0] * op.channels * TAPS
        return Work(2.0 * products * (output.shape[0] or 0), bytes_of([*operands, output]))

    def build(
        self, op: Convolution, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.winograd_planes import winograd_planes

        assert isinstance(op, ImageConvolution)
        images, residuals = images_of(op, operands[0])
        function = winograd_planes(images, op.stored, op.epilogue, residuals, Simd.of(target))
        return Kernel("_".join(["winograd", size_title(op), *op.step_titles]), function)


def packed(w: np.ndarray, layout: Layout) -> np.ndarray:
    """The weight ``[N, C * 9]`` at each point: ``[blocks of rows, m + 2, C, 3, rows]``."""
    rows, found = layout.block[0], transforms(layout.get("outputs", 2)).weight
    columns = w.reshape(len(w), -1, TAPS, TAPS)
    points = np.einsum("pr,ncrk->npck", found, columns.astype(np.float64)).astype(np.float32)
    padded = np.zeros((-(-len(w) // rows) * rows, *points.shape[1:]), np.float32)
    padded[: len(w)] = points
    blocks = padded.reshape(-1, rows, *points.shape[1:])
    return np.ascontiguousarray(np.moveaxis(blocks, 1, -1))
