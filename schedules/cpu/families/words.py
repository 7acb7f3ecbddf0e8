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
from sparse_tvm.schedules.cpu.block_arrays import block_diagonal, index_dtype
from sparse_tvm.schedules.cpu.conv_cost import plane_vectors
from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.families.convolution import ImageFamily, size_title
from sparse_tvm.schedules.cpu.families.extents import known_or_symbols, symbols_of
from sparse_tvm.schedules.cpu.families.low_precision import UNSTRUCTURED, fits_wish
from sparse_tvm.schedules.cpu.families.rows import MovesOnly
from sparse_tvm.schedules.cpu.image_operators import WordConvolution, WordRows, window_of
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.cpu.word_planes import (
    BYTES,
    depthwise_words,
    exact_parts,
    halves_of,
    weight_words,
    word_planes,
)
from sparse_tvm.sparsity.quantise import LARGEST, quantise_rows
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import Target

if TYPE_CHECKING:
    from tvm import tirx

    from sparse_tvm.schedules.cpu.images import Images
    from sparse_tvm.schedules.cpu.word_conv import MultiplyAdd
    from sparse_tvm.schedules.cpu.word_output import Output, PackBytes

    DeclareOutput = Callable[[], Output]

_TYPICAL_SIZE = 28
_MOST_VECTORS = 6
_MOST_ROWS = 8
_RESULT_CYCLES = 2.5
"""For a vector of sums, to scale, bound and pack."""

_BLOCK_CYCLES = 1.5
"""To find a stored block's word."""

_LOOP_CYCLES = 12.0
"""For the end of a loop over stored blocks, whose number differs from row to row."""


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
        rows, columns = op.typical(_TYPICAL_SIZE)
        height, width = window_of(op).out_size((rows, columns))
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
    """Of a kind of CPU for dense weights, the fastest first."""
    sparse_dots: ClassVar[tuple[Dot, ...]]
    """The same for sparse ones, with as many lanes."""

    @abstractmethod
    def multiply_add(self, dot: Dot) -> MultiplyAdd:
        """The instruction itself."""

    def dot(self, target: Target, *, sparse: bool = False) -> Dot:
        """The target's instruction."""
        dots = self.sparse_dots if sparse else self.dots
        return next(dot for dot in dots if target.has(*dot.features))

    def lacks(self, target: Target) -> str | None:
        able = any(target.has(*dot.features) for dot in self.dots)
        return None if able else f"{target.name} has no dot products of bytes"

    def simd(self, target: Target) -> Simd:
        dot = self.dot(target)
        return Simd(dot.lanes, dot.registers)

    def layouts(self, op: Convolution, target: Target) -> Sequence[Layout]:
        simd = self.simd(target)
        wide = simd.registers > 16 and op.out_channels > BYTES and not op.depthwise
        heights = (BYTES, _MOST_ROWS) if wide else (BYTES,)
        forms = [("dense", rows, rows) for rows in heights]
        forms.append((UNSTRUCTURED, 1, BYTES))
        if not op.depthwise:
            forms += [("bsr", rows, rows) for rows in heights]
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
        dot, costs = self.dot(target, sparse=layout.sparse), target.costs
        simd = self.simd(target)
        vectors = plane_vectors(op, simd)
        groups = -(-vectors // layout.get("vectors", 1))
        group = vectors / groups
        taps, rows = window_of(op).taps, layout.block[0]
        words = taps if op.depthwise else word_planes(op.channels) * taps
        block_rows = -(-op.out_channels // max(rows, BYTES))
        per_dot = dot.cycles_on(target) * simd.lanes / LANES
        if op.depthwise and dot.halves:
            per_dot /= 2  # of one byte there is one half
        if layout.sparse:
            # A block holds four channels of one tap, which lie ``taps`` columns apart.
            blocks = weight.nonzeros if op.depthwise else weight.stored_blocks((rows, BYTES))
            block = max(rows * per_dot, costs.load) * group + _BLOCK_CYCLES + costs.index
            loops = -(-op.out_channels // rows)
        else:
            blocks = block_rows * words
            block, loops = max(rows * per_dot, costs.load) * group, 0
        finish = block_rows * max(rows, BYTES) * (group * _RESULT_CYCLES + 1)
        weight_bytes = blocks * 4 * rows * (2 if dot.halves else 1)
        again = layout.get("rows_outermost", 0) == 0 and weight_bytes > target.caches.l2 // 2
        streamed = (groups if again else 1) * weight_bytes / costs.streamed
        cycles = groups * (blocks * block + loops * _LOOP_CYCLES + finish) + streamed
        return target.seconds(cycles) * self.share(op, tokens)

    def pack(
        self, op: Convolution, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        values, _ = quantise_rows(w)
        dot, taps = self.dot(target, sparse=layout.sparse), window_of(op).taps
        return arrays_of(values, layout, taps, dot, depthwise=op.depthwise)

    def kernel(
        self,
        op: Convolution,
        images: Images,
        layout: Layout,
        declare_output: DeclareOutput,
        target: Target,
    ) -> tuple[str, tirx.PrimFunc]:
        from sparse_tvm.schedules.cpu.word_conv import DEPTHWISE, word_conv

        dot, simd = self.dot(target, sparse=layout.sparse), self.simd(target)
        whole = op.depthwise and not layout.sparse
        form = replace(layout, format=DEPTHWISE) if whole else layout
        multiply_add = self.multiply_add(dot)
        function = word_conv(images, form, declare_output, simd, multiply_add, halves=dot.halves)
        rows = f"_{layout.block[0]}x{BYTES}" if layout.format == "bsr" else ""
        return f"{dot.name.replace('-', '_')}_{form.format}{rows}", function


def arrays_of(
    w: np.ndarray, layout: Layout, taps: int, dot: Dot, *, depthwise: bool
) -> dict[str, np.ndarray]:
    """The arguments of :func:`~sparse_tvm.schedules.cpu.word_conv.word_conv` for a weight.

    It is int8, ``[out_channels, channels * taps]``, or ``[channels, taps]`` of a depthwise one.
    """
    if not layout.sparse:
        if depthwise:
            return {"data": depthwise_words(w, halves=dot.halves)}
        data = word_weights.dense_rows(weight_words(w, taps), layout.block[0])["data"]
        if dot.halves:
            data = halves_of(data).reshape(*data.shape[:2], -1)
        return {"data": data}
    words = weight_words(block_diagonal(w, len(w)) if depthwise else w, taps)
    columns = words.shape[1]
    if dot.largest_weight < LARGEST:
        words = np.hstack(exact_parts(words))
    if layout.format == UNSTRUCTURED:
        arrays = word_weights.single_words(words, BYTES)
    else:
        arrays = word_weights.sparse_rows(words, layout.block[0])
        data, indices = arrays["data"], arrays["indices"]
        arrays |= {"data": data[:, None], "indices": indices[:, 0]}
    indices = arrays["indices"] % columns
    return {**arrays, "indices": indices.astype(index_dtype(columns))}


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
