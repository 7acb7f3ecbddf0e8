"""Quantised convolutions by x86's dot products, and on its matrix unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sparse_tvm.operators import Convolution, Layout
from sparse_tvm.schedules.cpu.conv_cost import plane_vectors
from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.words import (
    DotConvolutionFamily,
    WordConvolutionFamily,
    WordRowsFamily,
)
from sparse_tvm.schedules.cpu.image_operators import window_of
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.word_planes import BYTES, weight_words, word_planes
from sparse_tvm.schedules.x86 import tile_weights
from sparse_tvm.schedules.x86.units import (
    AMX_FEATURES,
    AMX_RATE,
    IMAGE_DOTS,
    SPARSE_IMAGE_DOTS,
    TILE_ROWS,
)
from sparse_tvm.sparsity.quantise import quantise_rows
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import Target

if TYPE_CHECKING:
    from tvm import tirx

    from sparse_tvm.schedules.cpu.families.words import DeclareOutput
    from sparse_tvm.schedules.cpu.images import Images
    from sparse_tvm.schedules.cpu.word_conv import MultiplyAdd
    from sparse_tvm.schedules.cpu.word_output import PackBytes


class _Packs:
    """Bytes by the saturating instructions that every x86 CPU has."""

    def pack_bytes(self, target: Target) -> PackBytes:
        from sparse_tvm.schedules.x86.instructions import saturated_bytes

        return saturated_bytes


@dataclass(frozen=True)
class X86WordRowsFamily(_Packs, WordRowsFamily):
    """The kernels on x86."""


@dataclass(frozen=True)
class X86DotConvolutionFamily(_Packs, DotConvolutionFamily):
    """SSSE3, AVX2 and VNNI."""

    dots: ClassVar[tuple[Dot, ...]] = IMAGE_DOTS
    sparse_dots: ClassVar[tuple[Dot, ...]] = SPARSE_IMAGE_DOTS

    def multiply_add(self, dot: Dot) -> MultiplyAdd:
        from sparse_tvm.schedules.x86.instructions import HALVES, MULTIPLY_ADD

        return (HALVES if dot.halves else MULTIPLY_ADD)[dot.name]


@dataclass(frozen=True)
class TileConvolutionFamily(_Packs, WordConvolutionFamily):
    """Kernels of :mod:`sparse_tvm.schedules.x86.tile_conv`."""

    name: ClassVar[str] = "tile_convolution"
    rate: ClassVar[float] = AMX_RATE * BYTES

    # Cycles: of a product of two tiles with its loads, and of a vector of results.
    _STEP, _RESULT = 20.0, 3.5
    _VECTORS = 2

    def lacks(self, target: Target) -> str | None:
        return None if target.has(*AMX_FEATURES) else f"{target.name} has no matrix unit (AMX)"

    def refuses(self, op: Convolution, target: Target) -> str | None:
        if op.depthwise:
            return f"{self.name} computes no depthwise convolution"
        return super().refuses(op, target)

    def simd(self, target: Target) -> Simd:
        return Simd.of(target)

    def layouts(self, op: Convolution, target: Target) -> Sequence[Layout]:
        heights = (1, 2) if op.out_channels > TILE_ROWS else (1,)
        return [self._dense(op, height * TILE_ROWS, target) for height in heights]

    def _dense(self, op: Convolution, rows: int, target: Target) -> Layout:
        layout = Layout(self.name, "dense", (rows, BYTES)).having(vectors=self._VECTORS)
        return self.ordered(op, layout, target)

    def cost(
        self,
        op: Convolution,
        layout: Layout,
        weight: WeightStatistics,
        tokens: int,
        target: Target,
    ) -> float:
        chunks, _ = tile_weights.chunks_of(word_planes(op.channels))
        vectors, rows = plane_vectors(op, self.simd(target)), layout.block[0]
        tiles = -(-op.out_channels // TILE_ROWS)
        steps = window_of(op).taps * chunks * tiles
        single = 1.3 if rows == TILE_ROWS else 1.0  # pixels are loaded for one tile only
        cycles = vectors * (steps * self._STEP * single + tiles * TILE_ROWS * self._RESULT)
        streamed = steps * TILE_ROWS * 64 / target.costs.streamed
        return target.seconds(cycles + streamed) * self.share(op, tokens)

    def pack(
        self, op: Convolution, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        values, _ = quantise_rows(w)
        taps = window_of(op).taps
        height = layout.block[0] // TILE_ROWS
        return tile_weights.image_tiles(weight_words(values, taps), taps, height)

    def kernel(
        self,
        op: Convolution,
        images: Images,
        layout: Layout,
        declare_output: DeclareOutput,
        target: Target,
    ) -> tuple[str, tirx.PrimFunc]:
        from sparse_tvm.schedules.x86.instructions import Amx
        from sparse_tvm.schedules.x86.tile_conv import tile_conv

        function = tile_conv(images, layout, declare_output, self.simd(target), Amx())
        return f"amx_{layout.block[0]}", function
