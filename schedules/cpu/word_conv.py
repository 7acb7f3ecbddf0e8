"""Convolutions of int8 images in planes of words, by dot products of four channels at a time.

The float32 kernel's loops (see :mod:`~sparse_tvm.schedules.cpu.conv_planes`) in words: a word of
the weight, broadcast, multiplies vectors of words, and a word-plane of the output is four rows of
the weight. Forms of the weight:

``dense``      every word.
``bsr``        blocks of four rows, or eight, by one word.
``csr``        every word that holds a non-zero, row by row.
``depthwise``  each word-plane of the output reads one of the input's, a byte of it per row.

A dot product in halves takes a word of the weight as two: what multiplies the even bytes of x, and
the odd ones. Of a depthwise row, there is one alone.

The sums are integers, exact; what turns them into the output is
:mod:`~sparse_tvm.schedules.cpu.word_output`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Layout
from sparse_tvm.schedules.cpu.block_arrays import JOBS_PER_GROUP, index_dtype
from sparse_tvm.schedules.cpu.conv_planes import ConvKernel
from sparse_tvm.schedules.cpu.images import Images
from sparse_tvm.schedules.cpu.lane_tiles import (
    Expr,
    argument,
    local,
    ramp,
    scalar,
    symbol,
)
from sparse_tvm.schedules.cpu.low_precision import words_like
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.word_output import Output
from sparse_tvm.schedules.cpu.word_planes import BYTES

DEPTHWISE = "depthwise"

MultiplyAdd = Callable[..., Expr]
"""A dot product instruction: sums, words of x and words of weights to new sums.

In halves, the weights are two words, ``even`` and ``odd``, either of which may be None.
"""

Words = Sequence[Expr | None]
"""The words of a row that meet a word of x: one, or the two halves."""


def word_conv(
    images: Images,
    layout: Layout,
    declare_output: Callable[[], Output],
    simd: Simd,
    multiply_add: MultiplyAdd,
    *,
    halves: bool = False,
) -> tirx.PrimFunc:
    """Build the kernel.

    ``images`` counts channels in word-planes, and rows of the weight in whole words. ``halves``
    tells that the dot product takes weights in halves; a sparse one does not.

    Arguments of the PrimFunc, in order: x int32 ``[batch, planes * phases, source.size]``; the
    weight ``data`` int32, dense ``[block rows, planes * taps, rows]``, in halves
    ``[..., 2 * rows]``, depthwise ``[planes, taps, 4]``, sparse ``[blocks, 1, rows]`` with
    ``indices``, ``indptr``, ``rows`` and ``partition``; ``sizes``; then those of the output.
    """
    return _WordKernel(images, layout, simd, multiply_add, halves).build(declare_output)


class _Sums:
    """Sums of ``rows`` by ``vectors`` in registers."""

    def __init__(self, rows: int, vectors: int, simd: Simd, multiply_add: MultiplyAdd) -> None:
        self._rows, self._vectors, self._simd = rows, vectors, simd
        self._multiply_add = multiply_add
        self._buffer = local(rows * vectors * simd.lanes, "int32")

    def _at(self, row: int, vector: int) -> Expr:
        return ramp((row * self._vectors + vector) * self._simd.lanes, self._simd)

    def get(self, row: int, vector: int) -> Expr:
        return self._buffer[self._at(row, vector)]

    def clear(self) -> None:
        """Begin."""
        for row in range(self._rows):
            for vector in range(self._vectors):
                zero = words_like(0, self._simd.lanes)
                T.buffer_store(self._buffer, zero, [self._at(row, vector)])

    def multiply_add(
        self,
        weight: Callable[[int], Words],
        x: Callable[[int], Expr],
        rows: range | None = None,
    ) -> None:
        """Add the outer product of ``weight(row)`` and ``x(vector)``, vectors of words."""
        operands = []
        for vector in range(self._vectors):
            held = local(self._simd.lanes, "int32")
            at = [ramp(0, self._simd)]
            T.buffer_store(held, x(vector), at)
            operands.append(held[at[0]])
        for row in rows or range(self._rows):
            words = [
                None if word is None else T.broadcast(word, self._simd.lanes)
                for word in weight(row)
            ]
            for vector, operand in enumerate(operands):
                total = self._multiply_add(self.get(row, vector), operand, *words)
                T.buffer_store(self._buffer, total, [self._at(row, vector)])


class _WordKernel(ConvKernel):
    element = "int32"

    def __init__(
        self,
        images: Images,
        layout: Layout,
        simd: Simd,
        multiply_add: MultiplyAdd,
        halves: bool,
    ) -> None:
        super().__init__(images, layout, simd)
        self._multiply_add, self._halves = multiply_add, halves
        self._by_row, self._depthwise = layout.format == "csr", layout.format == DEPTHWISE

    def _rows_of(self, layout: Layout) -> int:
        return max(BYTES, layout.block[0])

    def _declare_weight(self) -> None:
        rows, block_rows = self._rows, self._block_rows
        if self._layout.format == "dense":
            words = 2 * rows if self._halves else rows
            self._data = argument("data", (block_rows, self._k, words), "int32")
        elif self._depthwise:
            self._data = argument("data", (block_rows, self._taps, rows), "int32")
        else:
            blocks = symbol("blocks")
            per_block, segments = (1, rows) if self._by_row else (rows, 1)
            self._data = argument("data", (blocks, 1, per_block), "int32")
            self._indices = argument("indices", (blocks,), index_dtype(self._k))
            self._indptr = argument("indptr", (block_rows * segments + 1,), "int32")
            self._order = argument("rows", (block_rows,), "int32")
            self._partition = argument("partition", (JOBS_PER_GROUP + 1,), "int32")

    @property
    def _sorted(self) -> bool:
        return self._layout.sparse and not self._depthwise

    def _block(
        self,
        image: Expr,
        part: Expr,
        segment: Expr,
        block_row: Expr,
        live: int,
        first: Expr,
        size: int,
    ) -> None:
        """Compute ``live`` rows of the output for ``size`` vectors of pixels."""
        lanes, images = self._simd.lanes, self._images
        sums = _Sums(live, size, self._simd, self._multiply_add)
        pixel, channel = scalar(first * lanes), scalar(block_row * self._rows)
        planes = images.channels * len(images.window.phases)
        source = scalar(image * planes * self._source.size + self._source.first + pixel)

        sums.clear()
        self._add_products(sums, segment, source, live)
        for row in range(0, live, BYTES):
            for vector in range(size):
                quad = [sums.get(row + i, vector) for i in range(BYTES)]
                self._output.finish(quad, image, channel + row, pixel + vector * lanes)
        self._clear_with_row(image, channel, live, first)

    def _add_products(self, sums: _Sums, segment: Expr, source: Expr, live: int) -> None:
        plane = self._source.size * len(self._images.window.phases)

        def load(offset: Expr) -> Callable[[int], Expr]:
            start = scalar(source + offset)
            return lambda v: self._x[ramp(start + v * self._simd.lanes, self._simd)]

        if self._depthwise:
            for tap in range(self._taps):
                offset = segment * plane
                if self._tap_offsets is not None:
                    offset = offset + self._tap_offsets[tap]
                sums.multiply_add(partial(self._byte_at, segment, tap), load(offset))
        elif self._layout.format == "dense":
            self._accumulate_dense(sums, 0, segment, load, plane)
        elif self._by_row:
            for row in range(live):
                at = segment * self._rows + row
                self._add_blocks(sums, at, load, plane, range(row, row + 1))
        else:
            self._add_blocks(sums, segment, load, plane, range(live))

    def _weight_at(self, block_row: Expr, k: Expr, row: int) -> Words:
        if not self._halves:
            return (self._data[block_row, k, row],)
        return self._data[block_row, k, 2 * row], self._data[block_row, k, 2 * row + 1]

    def _byte_at(self, plane: Expr, tap: int, row: int) -> Words:
        """What of a tap meets byte ``row`` of a word of x."""
        word = self._data[plane, tap, row]
        if not self._halves:
            return (word,)
        return (word, None) if row % 2 == 0 else (None, word)

    def _add_blocks(
        self,
        sums: _Sums,
        segment: Expr,
        load: Callable[[Expr], Callable[[int], Expr]],
        plane: Expr,
        rows: range,
    ) -> None:
        """Stream the stored blocks of one row, or of one block row."""
        first = scalar(self._indptr[segment])
        with T.serial(0, self._indptr[segment + 1] - first) as p:
            at = first + p
            column = scalar(self._indices[at])
            if self._tap_offsets is None:
                offset = column * plane
            else:
                word = scalar(column // self._taps)
                offset = word * plane + self._tap_offsets[column - word * self._taps]
            sums.multiply_add(
                lambda row: (self._data[at, 0, row - rows.start],), load(offset), rows
            )
