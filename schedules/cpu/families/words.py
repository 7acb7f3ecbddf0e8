"""int8 images in planes of words: quantised convolutions, and what is done to each pixel."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel, Wish, Work
from sparse_tvm.operators import STILL, Convolution, Layout, QuantisedConvolution
from sparse_tvm.schedules.cpu import word_weights
from sparse_tvm.schedules.cpu.conv_cost import plane_vectors
from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.convolution import ImageFamily, size_title
from sparse_tvm.schedules.cpu.families.extents import known_or_symbols, symbols_of
from sparse_tvm.schedules.cpu.families.low_precision import UNSTRUCTURED, fits_wish
from sparse_tvm.schedules.cpu.families.rows import MovesOnly
from sparse_tvm.schedules.cpu.image_operators import WordConvolution, WordRows, window_of
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.precision import ZERO_POINT
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.cpu.word_planes import (
    BYTES,
    depthwise_words,
    padded_to,
    weight_words,
    word_planes,
)
from sparse_tvm.sparsity.quantise import LARGEST, quantise_rows
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import Target

if TYPE_CHECKING:
    from tvm import tirx

    from sparse_tvm.schedules.cpu.dot_matmul import MultiplyAdd
    from sparse_tvm.schedules.cpu.images import Images
    from sparse_tvm.schedules.cpu.word_output import Output, PackBytes

    DeclareOutput = Callable[[], Output]

_TYPICAL_SIZE = 28
_MOST_VECTORS = 6
_MOST_ROWS = 8
_RESULT_CYCLES = 2.5
"""For a vector of sums, to scale, bound and pack."""

_BLOCK_CYCLES = 1.5
"""To find a stored block's word."""


class WordConvolutionFamily(ImageFamily):
    """What the families of quantised convolutions share: what they read and write."""

    operator: ClassVar[type[Convolution]] = QuantisedConvolution
    rate: ClassVar[float]
    """Of the kernel's unit (see :class:`~sparse_tvm.families.Work`)."""

    @abstractmethod
    def lacks(self, target: Target) -> str | None:
        """What the target's CPUs miss; None if nothing."""

    @abstractmethod
    def simd(self, target: Target) -> Simd:
        """The vectors of the kernels."""

    @abstractmethod
    def pack_bytes(self, target: Target) -> PackBytes:
        """How four vectors become bytes."""

    @abstractmethod
    def layouts(self, op: Convolution, target: Target) -> Sequence[Layout]:
        """Dense, and sparse, layouts."""

    @abstractmethod
    def kernel(
        self,
        op: Convolution,
        images: Images,
        layout: Layout,
        declare_output: DeclareOutput,
        target: Target,
    ) -> tuple[str, tirx.PrimFunc]:
        """The kernel, and what its instruction and form are called."""

    def refuses(self, op: Convolution, target: Target) -> str | None:
        if not isinstance(op, QuantisedConvolution):
            return f"{self.name} computes quantised convolutions only"
        if len(op.size) != 2:
            return f"{self.name} has no kernel for {len(op.size)} spatial dimensions"
        if op.frames != STILL:
            return f"{self.name} has no kernel for videos"
        if op.groups > 1 and (not op.depthwise or op.out_channels != op.channels):
            return f"{self.name} has no kernel for {op.groups} groups of {op.channels} channels"
        return self.lacks(target)

    def remark(self, op: Convolution) -> str | None:
        return "depthwise: there is no sum to shorten" if op.depthwise else None

    def candidates(
        self, op: Convolution, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        found = self.layouts(op, target)
        if wish is None:
            return found
        if wish.format == "bsr":
            return [one for one in found if one.format == "bsr" and fits_wish(one.block, wish)]
        return [layout for layout in found if layout.format == wish.format]

    def ordered(self, op: Convolution, layout: Layout, target: Target) -> Layout:
        """A dense layout whose rows are read once, for all pixels, where they outlast the image."""
        simd = self.simd(target)
        pixels = plane_vectors(op, simd) * simd.lanes
        image_bytes = pixels * BYTES * word_planes(op.channels) * len(window_of(op).phases)
        outlasts = image_bytes < min(op.matrix[0] * op.matrix[1], target.caches.l2 // 2)
        return layout.having(rows_outermost=1) if outlasts else layout

    def share(self, op: Convolution, tokens: int) -> float:
        """So many pixels of the output's."""
        size = (op.size[0] or _TYPICAL_SIZE, op.size[1] or _TYPICAL_SIZE)
        height, width = window_of(op).out_size(size)
        return tokens / max(1, int(height) * int(width))

    def work(
        self,
        op: Convolution,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        return replace(super().work(op, operands, output, nonzeros), rate=self.rate)

    def build(
        self, op: Convolution, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.images import Images
        from sparse_tvm.schedules.cpu.lane_tiles import symbol
        from sparse_tvm.schedules.cpu.word_output import FloatOutput, WordOutput

        assert isinstance(op, WordConvolution)
        simd, layout = self.simd(target), op.stored
        window, (size, sizes) = window_of(op), symbols_of(op.size)
        out = window.out_size(size)
        batch = symbol("batch") if operands[0].shape[0] is None else operands[0].shape[0]
        source = Planes(*window.phase_size(size), op.source)
        aim = Planes(*out, op.target)
        planes, out_planes = word_planes(op.channels), word_planes(op.out_channels)

        def declare_output() -> Output:
            if op.rounds:
                return WordOutput(batch, out_planes, aim, simd, self.pack_bytes(target))
            residuals = [Planes(*out, border) for border in op.residuals]
            return FloatOutput(batch, op.out_channels, aim, op.epilogue, residuals, simd)

        images = Images(batch, planes, out_planes * BYTES, source, aim, window, sizes)
        form, function = self.kernel(op, images, layout, declare_output, target)
        to = [] if op.rounds else ["to_float32"]
        titles = ["int8_conv2d", form, size_title(op), *op.step_titles, *to]
        return Kernel("_".join(titles), function)


class DotConvolutionFamily(WordConvolutionFamily):
    """Kernels of :mod:`sparse_tvm.schedules.cpu.word_conv`."""

    name: ClassVar[str] = "word_convolution"
    rate: ClassVar[float] = float(BYTES)
    dots: ClassVar[tuple[Dot, ...]]
    """Of a kind of CPU, the fastest first."""

    @abstractmethod
    def multiply_add(self, dot: Dot) -> MultiplyAdd:
        """The instruction itself."""

    def refuses(self, op: Convolution, target: Target) -> str | None:
        dot = self._able(target)
        if dot and isinstance(op, QuantisedConvolution) and op.steps > dot.largest_weight:
            return f"{target.name} multiplies no weights {op.steps} steps from 0"
        return super().refuses(op, target)

    def _able(self, target: Target) -> Dot | None:
        """The target's instruction, if it multiplies weights of almost all bytes exactly."""
        able = (d for d in self.dots if target.has(*d.features) and d.largest_weight >= LARGEST)
        return next(able, None)

    def dot(self, target: Target) -> Dot:
        """The target's instruction."""
        dot = self._able(target)
        assert dot is not None, f"{self.name} was to refuse {target.name}"
        return dot

    def lacks(self, target: Target) -> str | None:
        return None if self._able(target) else f"{target.name} has no dot products of bytes"

    def simd(self, target: Target) -> Simd:
        dot = self.dot(target)
        return Simd(dot.lanes, dot.registers)

    def layouts(self, op: Convolution, target: Target) -> Sequence[Layout]:
        simd = self.simd(target)
        wide = simd.registers > 16 and op.out_channels > BYTES and not op.depthwise
        heights = (BYTES, _MOST_ROWS) if wide else (BYTES,)
        forms = [("dense", rows, rows) for rows in heights]
        if not op.depthwise:
            forms += [(UNSTRUCTURED, 1, BYTES), *(("bsr", rows, rows) for rows in heights)]
        found = []
        for format, rows, together in forms:
            limit = min(simd.accumulators // together, _MOST_VECTORS, plane_vectors(op, simd))
            layout = Layout(self.name, format, (rows, BYTES)).having(vectors=max(1, limit))
            found.append(self.ordered(op, layout, target) if format == "dense" else layout)
        return found

    def cost(
        self,
        op: Convolution,
        layout: Layout,
        weight: WeightStatistics,
        tokens: int,
        target: Target,
    ) -> float:
        dot, costs, simd = self.dot(target), target.costs, self.simd(target)
        vectors = plane_vectors(op, simd)
        groups = -(-vectors // layout.get("vectors", 1))
        group = vectors / groups
        taps, rows = window_of(op).taps, layout.block[0]
        words = taps if op.depthwise else word_planes(op.channels) * taps
        block_rows = -(-op.out_channels // max(rows, BYTES))
        per_dot = dot.cycles * simd.lanes / LANES
        if layout.sparse:
            # A block holds four channels of one tap, which lie ``taps`` columns apart.
            blocks = weight.stored_blocks((rows, BYTES))
            block = max(rows * per_dot, costs.load) * group + _BLOCK_CYCLES + costs.index
        else:
            blocks = block_rows * words
            block = max(rows * per_dot, costs.load) * group
        finish = block_rows * max(rows, BYTES) * (group * _RESULT_CYCLES + 1)
        weight_bytes = blocks * 4 * rows
        again = layout.get("rows_outermost", 0) == 0 and weight_bytes > target.caches.l2 // 2
        streamed = (groups if again else 1) * weight_bytes / costs.streamed
        cycles = groups * (blocks * block + finish) + streamed
        return target.seconds(cycles) * self.share(op, tokens)

    def pack(
        self, op: Convolution, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        values, _ = quantise_rows(w)
        dot, taps = self.dot(target), window_of(op).taps
        return arrays_of(values, layout, taps, depthwise=op.depthwise, signed=dot.signed)

    def kernel(
        self,
        op: Convolution,
        images: Images,
        layout: Layout,
        declare_output: DeclareOutput,
        target: Target,
    ) -> tuple[str, tirx.PrimFunc]:
        from sparse_tvm.schedules.cpu.word_conv import DEPTHWISE, word_conv

        dot = self.dot(target)
        form = replace(layout, format=DEPTHWISE) if op.depthwise else layout
        unit = self.multiply_add(dot), dot.signed
        function = word_conv(images, form, declare_output, self.simd(target), *unit)
        rows = f"_{layout.block[0]}x{BYTES}" if layout.format == "bsr" else ""
        return f"{dot.name.replace('-', '_')}_{form.format}{rows}", function


def arrays_of(
    w: np.ndarray, layout: Layout, taps: int, *, depthwise: bool, signed: bool
) -> dict[str, np.ndarray]:
    """The arguments of :func:`~sparse_tvm.schedules.cpu.word_conv.word_conv` for a weight.

    It is int8, ``[out_channels, channels * taps]``, or ``[channels, taps]`` of a depthwise one.
    """
    arrays = {"data": depthwise_words(w)} if depthwise else _blocks(weight_words(w, taps), layout)
    if signed:
        sums = w.sum(axis=1, dtype=np.int32) * np.int32(ZERO_POINT)
        arrays["shift"] = padded_to(sums, BYTES)
    return arrays


def _blocks(words: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    rows = layout.block[0]
    if not layout.sparse:
        return word_weights.dense_rows(words, rows)
    if layout.format == UNSTRUCTURED:
        return word_weights.single_words(words, BYTES)
    arrays = word_weights.sparse_rows(words, rows)
    data, indices = arrays["data"], arrays["indices"]
    return {**arrays, "data": data[:, None], "indices": indices[:, 0]}


class WordRowsFamily(MovesOnly[WordRows]):
    """Kernels of :mod:`sparse_tvm.schedules.cpu.word_rows`."""

    name: ClassVar[str] = "word_rows"
    operator: ClassVar[type[WordRows]] = WordRows

    @abstractmethod
    def pack_bytes(self, target: Target) -> PackBytes:
        """How four vectors become bytes."""

    def refuses(self, op: WordRows, target: Target) -> str | None:
        return None

    def build(
        self, op: WordRows, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.word_rows import add_images, dequantise_image, quantise_image

        size, sizes = symbols_of(op.size)
        batch: Any
        batch, *_ = known_or_symbols(operands[0], ("batch", "planes", "size"))
        sources = [Planes(*size, border) for border in op.sources]
        aim, simd, channels = Planes(*size, op.target), Simd.of(target), op.channels
        common = aim, sizes, simd
        if op.function == "dequantise":
            function = dequantise_image(batch, channels, sources[0], *common)
        elif op.function == "quantise":
            pack = self.pack_bytes(target)
            function = quantise_image(batch, channels, sources[0], *common, pack)
        else:
            pair = (sources[0], sources[1])
            function = add_images(batch, channels, pair, *common, self.pack_bytes(target))
        return Kernel(f"{op.function}_image", function)
