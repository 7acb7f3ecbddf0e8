"""Convolutions in float32 of small images in planes, output channels in lanes: the weight dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel, Wish
from sparse_tvm.operators import STILL, Convolution, Layout
from sparse_tvm.schedules.cpu.block_arrays import split_arrays
from sparse_tvm.schedules.cpu.families.convolution import ImageFamily, images_of, size_title
from sparse_tvm.schedules.cpu.image_operators import (
    CHANNEL_LANES,
    NARROW,
    ImageConvolution,
    blocks_of,
    window_of,
)
from sparse_tvm.schedules.cpu.pixel_runs import MOST_PIXELS, run_seconds, runs_of
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import Target


@dataclass(frozen=True)
class ChannelLanesFamily(ImageFamily):
    """Kernels of :mod:`sparse_tvm.schedules.cpu.conv_lanes`."""

    name: ClassVar[str] = CHANNEL_LANES
    operator: ClassVar[type[Convolution]] = Convolution
    depthwise: ClassVar[bool] = False

    def refuses(self, op: Convolution, target: Target) -> str | None:
        refusal = super().refuses(op, target)
        if refusal is not None:
            return refusal
        simd = Simd.of(target)
        if simd.lanes != LANES or simd.few_registers:
            return f"{self.name} is for vectors of {LANES} lanes"
        if op.frames != STILL or blocks_of(op) is not None:
            return f"{self.name} computes neither videos nor blocks"
        if op.groups > 1 and op.out_channels // op.groups % LANES:
            return f"{self.name} computes groups of {LANES} channels only, or of several times that"
        height, width = op.size
        if height is None or width is None:
            return f"{self.name} computes images of known size only"
        if width < NARROW * window_of(op).pixel_reads.gap:
            return f"{self.name} reads images in place, for whose others this padding is wide"
        return None

    def candidates(
        self, op: Convolution, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        if wish is not None and wish.format != "dense":
            return []
        return [
            Layout(self.name, "dense", (LANES * vectors, 1))
            for vectors in MOST_PIXELS
            if runs_of(op, vectors).suits and _fits_groups(op, vectors)
        ]

    def cost(
        self,
        op: Convolution,
        layout: Layout,
        weight: WeightStatistics,
        tokens: int,
        target: Target,
    ) -> float:
        return run_seconds(op, layout, tokens, target, weight.copies)

    def pack(
        self, op: Convolution, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        return split_arrays(w, layout)

    def build(
        self, op: Convolution, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.conv_lanes import conv_lanes

        assert isinstance(op, ImageConvolution)
        images, residuals = images_of(op, operands[0])
        function = conv_lanes(
            images, op.stored, op.epilogue, residuals, Simd.of(target), groups=op.groups
        )
        form = f"conv2d_lanes_{op.stored.block[0]}x1"
        return Kernel("_".join([form, size_title(op), *op.step_titles]), function)


def _fits_groups(op: Convolution, vectors: int) -> bool:
    """Whether no block of so many vectors of rows is of two groups."""
    return op.groups == 1 or op.out_channels // op.groups % (vectors * LANES) == 0
