"""Activations of fewer bits on lane tiles: lines of 16 tokens by as many features as fit a word.

A tile of an int8 activation is ``[lines, 16 tokens]`` of 32-bit words, each four consecutive
features of one token; of a bf16 activation, two. A line of 64 bytes is then an operand of a dot
product instruction as it lies, and sixteen lines below each other are the right operand of a
matrix unit whose product is the float32 lane tile itself: nothing is ever repacked.

int8 is symmetric with one scale per token, of which the largest magnitude is 127.5: so PyTorch's
quantisers have it. A feature is stored as unsigned byte, plus 128, which is what x86's instructions
multiply, and as signed one for Arm's; the scales are the tile's last line. Tiles end on a multiple
of sixteen lines, and the words behind the last feature are zeros.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    Tiles,
    argument,
    prim_func,
    ramp,
    scalar,
    splat,
)
from sparse_tvm.schedules.cpu.precision import INT8, ZERO_POINT, Precision
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.cpu.vector_math import ROUNDING
from sparse_tvm.sparsity.quantise import PEAK_STEPS

_BELOW_PEAK = PEAK_STEPS - 1e-4
"""How many steps the largest magnitude is rounded from: fewer than make a byte overflow."""

_TINY = 1e-30
"""Least scale's peak, so that a token of zeros has a scale to divide by."""

_PARTIAL_PEAKS = 4


class Lines:
    """An activation in some precision as flat memory of words, addressed by tile and line.

    Made, it is the next argument of the open PrimFunc; when all are declared, :meth:`bind` it.
    """

    words: Buffer

    def __init__(self, name: str, tiles: Tiles, features: int, precision: Precision) -> None:
        self.per_tile = precision.lines(features)
        self.data_lines = precision.data_lines(features)
        self.features, self.precision = features, precision
        self._count = tiles.count * self.per_tile * LANES
        self._argument = argument(
            name, (tiles.lead, tiles.per_lead, precision.lines(features), LANES), "int32"
        )

    def bind(self) -> None:
        """See the argument as flat memory."""
        self.words = T.decl_buffer((self._count,), "int32", data=self._argument.data)

    def at(self, tile: Expr, line: Expr) -> Expr:
        """Index of the first word of a line."""
        return (tile * self.per_tile + line) * LANES

    def get(self, tile: Expr, line: Expr, first: Expr, lanes: int) -> Expr:
        """Words of ``lanes`` tokens of a line, from token ``first``."""
        return self.words[T.ramp(self.at(tile, line) + first, 1, lanes)]

    def set(self, tile: Expr, line: Expr, first: Expr, words: Expr, lanes: int) -> None:
        """Store words of ``lanes`` tokens of a line, from token ``first``."""
        T.buffer_store(self.words, words, [T.ramp(self.at(tile, line) + first, 1, lanes)])

    def scales(self, tile: Expr, first: Expr, lanes: int) -> Expr:
        """The scales of ``lanes`` tokens of an int8 tile, float32."""
        return T.reinterpret(f"float32x{lanes}", self.get(tile, self.data_lines, first, lanes))


def words_like(value: int, lanes: int, dtype: str = "int32") -> Expr:
    """A vector of one integer constant."""
    return T.broadcast(tirx.const(value, dtype), lanes)


def bf16_pair(low: Expr, high: Expr, lanes: int) -> Expr:
    """Two float32 vectors as one vector of bf16 pairs, rounded to nearest."""
    half, top = words_like(0x8000, lanes, "uint32"), words_like(0xFFFF0000, lanes, "uint32")
    low, high = (T.reinterpret(f"uint32x{lanes}", value) + half for value in (low, high))
    below = T.shift_right(low, words_like(16, lanes, "uint32"))
    return T.reinterpret(f"int32x{lanes}", T.bitwise_or(below, T.bitwise_and(high, top)))


def int8_quad(values: list[Expr], lanes: int, zero_point: int) -> Expr:
    """Up to four float32 vectors as one vector of quads of bytes.

    Values plus the zero point are within 0..255, or -128..127.
    """
    word = None
    for position, value in enumerate(values):
        shifted = value + T.broadcast(T.float32(ROUNDING + zero_point), lanes)
        byte = T.reinterpret(f"int32x{lanes}", shifted)
        if position < 3:
            byte = T.bitwise_and(byte, words_like(255, lanes))
        if position:
            byte = T.shift_left(byte, words_like(8 * position, lanes))
        word = byte if word is None else T.bitwise_or(word, byte)
    return word


def magnitude(value: Expr) -> Expr:
    """The absolute value of float32."""
    return T.call_llvm_pure_intrin(value.ty.dtype, "llvm.fabs", value)


def store_tile(
    lines: Lines,
    tile: Expr,
    first: Expr,
    load: Callable[[Expr], Expr],
    simd: Simd,
    peak: Registers | None = None,
) -> None:
    """Round ``simd.lanes`` tokens of a float32 tile, from token ``first``, into ``lines``.

    ``load(feature)`` is the vector of those tokens. int8 becomes 127 where a token is largest;
    unless ``peak`` says how large that is, all features are read twice.
    """
    lanes, unit, features = simd.lanes, lines.precision.unit, lines.features
    if lines.precision.scaled:
        if peak is None:
            peak = _peak(features, load, simd)
        inverse = _store_scales(lines, tile, first, peak, simd)

    def line_of(values: list[Expr]) -> Expr:
        if lines.precision.scaled:
            steps = [value * inverse.get(0, 0) for value in values]
            return int8_quad(steps, lanes, simd.zero_point)
        low, high = (*values, T.broadcast(T.float32(0), lanes))[:2]
        return bf16_pair(low, high, lanes)

    whole, rest = divmod(features, unit)
    if whole:
        with T.serial(0, whole) as line:
            values = [load(line * unit + u) for u in range(unit)]
            lines.set(tile, line, first, line_of(values), lanes)
    if rest:
        values = [load(whole * unit + u) for u in range(rest)]
        lines.set(tile, whole, first, line_of(values), lanes)
    used = whole + (1 if rest else 0)
    if used < lines.data_lines:
        with T.serial(0, lines.data_lines - used) as line:
            lines.set(tile, used + line, first, words_like(0, lanes), lanes)


def _peak(features: int, load: Callable[[Expr], Expr], simd: Simd) -> Registers:
    """The largest magnitude of each token."""
    count = next(n for n in (_PARTIAL_PEAKS, 2, 1) if features % n == 0)
    peaks = Registers(count, 1, simd)
    peaks.fill(lambda row, vector: splat(T.float32(0), simd))
    with T.serial(0, features // count) as i:
        for row in range(count):
            value = magnitude(load(i * count + row))
            peaks.set(row, 0, tirx.max(peaks.get(row, 0), value))
    for row in range(1, count):
        peaks.set(0, 0, tirx.max(peaks.get(0, 0), peaks.get(row, 0)))
    return peaks


def _store_scales(lines: Lines, tile: Expr, first: Expr, peak: Registers, simd: Simd) -> Registers:
    """Store the scale of each token; return what features are multiplied by."""
    largest = Registers(1, 1, simd)
    largest.set(0, 0, tirx.max(peak.get(0, 0), splat(T.float32(_TINY), simd)))
    scale = largest.get(0, 0) * splat(T.float32(1 / PEAK_STEPS), simd)
    words = T.reinterpret(f"int32x{simd.lanes}", scale)
    lines.set(tile, lines.data_lines, first, words, simd.lanes)
    inverse = Registers(1, 1, simd)
    inverse.set(0, 0, splat(T.float32(_BELOW_PEAK), simd) / largest.get(0, 0))
    return inverse


def store_tiles(lines: Lines, source: Buffer, tiles: Tiles, simd: Simd) -> None:
    """Round all of a float32 activation, flat ``[count, features, LANES]``, on all threads."""
    parts = simd.per_tile
    with T.parallel(0, tiles.count * parts) as job:
        tile, first = scalar(job // parts), scalar(job % parts * simd.lanes)

        def load(feature: Expr) -> Expr:
            return source[tile, feature, ramp(first, simd)]

        store_tile(lines, tile, first, load, simd)


def quantise_by_steps(tiles: Tiles, features: int, simd: Simd) -> tirx.PrimFunc:
    """Build the kernel that rounds an activation to int8 by a scale and a zero point.

    Arguments of the PrimFunc: x float32 ``[lead, tiles, features, LANES]``, scale and zero float32
    ``[1]``, y int32 ``[lead, tiles, INT8.lines(features), LANES]``. A byte is
    ``round(x / scale) + zero``, the zero point from 0 to 255, less 128 where bytes are signed.
    """
    lanes, unit = simd.lanes, INT8.unit
    with prim_func() as result:
        x = argument("x", tiles.shape(features))
        scale, zero = argument("scale", (1,)), argument("zero", (1,))
        y = Lines("y", tiles, features, INT8)
        y.bind()
        source = tiles.flat(x, features)
        with T.parallel(0, tiles.count * simd.per_tile) as job:
            tile, first = scalar(job // simd.per_tile), scalar(job % simd.per_tile * lanes)
            shift = T.broadcast(zero[0], lanes)
            low, high = splat(T.float32(0), simd) - shift, splat(T.float32(255), simd) - shift

            def byte(feature: Expr) -> Expr:
                steps = source[tile, feature, ramp(first, simd)] / T.broadcast(scale[0], lanes)
                steps = tirx.min(tirx.max(steps, low), high) + splat(T.float32(ROUNDING), simd)
                word = T.reinterpret(f"int32x{lanes}", steps)
                middle = T.Cast("int32", zero[0]) - (ZERO_POINT - simd.zero_point)
                word = word + T.broadcast(middle, lanes)
                return T.bitwise_and(word, words_like(255, lanes))

            def line_of(features: list[Expr]) -> Expr:
                word = words_like(0, lanes)
                for position, feature in enumerate(features):
                    shifted = T.shift_left(byte(feature), words_like(8 * position, lanes))
                    word = T.bitwise_or(word, shifted)
                return word

            whole, rest = divmod(features, unit)
            if whole:
                with T.serial(0, whole) as line:
                    words = line_of([line * unit + u for u in range(unit)])
                    y.set(tile, line, first, words, lanes)
            if rest:
                y.set(tile, whole, first, line_of([whole * unit + u for u in range(rest)]), lanes)
            used = whole + (1 if rest else 0)
            if used < y.data_lines:
                with T.serial(0, y.data_lines - used) as line:
                    y.set(tile, used + line, first, words_like(0, lanes), lanes)
            words = T.reinterpret(f"int32x{lanes}", T.broadcast(scale[0], lanes))
            y.set(tile, y.data_lines, first, words, lanes)
    return result["func"]


def quantise(tiles: Tiles, features: int, precision: Precision, simd: Simd) -> tirx.PrimFunc:
    """Build the kernel that rounds an activation.

    Arguments of the PrimFunc: x float32 ``[lead, tiles, features, LANES]``, y int32
    ``[lead, tiles, precision.lines(features), LANES]``.
    """
    with prim_func() as result:
        x = argument("x", tiles.shape(features))
        y = Lines("y", tiles, features, precision)
        y.bind()
        store_tiles(y, tiles.flat(x, features), tiles, simd)
    return result["func"]
