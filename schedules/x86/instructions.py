"""x86's low-precision instructions, one small function each, and their twins in plain arithmetic.

Kernels are written once, against a dot product or a :class:`TileUnit`; which one they get decides
what they compile to. The plain ones run on any CPU, so that packing and indexing are tested
everywhere, and the native ones against them.

Words are 32 bits: four bytes or two bf16. Vectors of words are int32 for LLVM's sake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.bf16_dot import plain_bf16_dot
from sparse_tvm.schedules.cpu.dot_products import MultiplyAdd
from sparse_tvm.schedules.cpu.lane_tiles import Buffer, Expr, local, scratch
from sparse_tvm.schedules.cpu.low_precision import words_like
from sparse_tvm.schedules.cpu.precision import LINES, Precision
from sparse_tvm.schedules.cpu.vector_math import lanes_of
from sparse_tvm.schedules.x86.units import AMX_FEATURES

TILE_WORDS = 256
"""Words of a full AMX tile: 16 rows of 64 bytes."""

TILES = 8
"""Tile registers."""

Shape = tuple[int, int]
"""Rows of a tile, and words in each."""

FULL: Sequence[Shape] = ((LINES, LINES),) * TILES


# Dot products: acc[lane] += sum over the four bytes of x[lane] * w[lane]


def plain_dot(acc: Expr, x: Expr, w: Expr) -> Expr:
    """The twin of ``vpdpbusd``: unsigned bytes of x by signed bytes of w."""
    lanes = lanes_of(acc)
    for byte in range(4):
        unsigned = T.bitwise_and(
            T.shift_right(x, words_like(8 * byte, lanes)), words_like(255, lanes)
        )
        raised = T.shift_left(w, words_like(24 - 8 * byte, lanes))
        acc = acc + unsigned * T.shift_right(raised, words_like(24, lanes))
    return acc


def vpdpbusd(acc: Expr, x: Expr, w: Expr) -> Expr:
    """``vpdpbusd`` of VNNI, in the width of its operands."""
    lanes = lanes_of(acc)
    x, w = (T.reinterpret(f"int8x{4 * lanes}", value) for value in (x, w))
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return T.call_llvm_pure_intrin(f"int32x{lanes}", name, acc, x, w)


def vpmaddubsw(acc: Expr, x: Expr, w: Expr) -> Expr:
    """``vpmaddubsw`` and ``vpmaddwd``: exact for weights within -64 to 64.

    ``vpmaddubsw`` adds two products in 16 bits, where 2 * 255 * 64 still fits.
    """
    return _madd(acc, *(T.reinterpret(f"int8x{4 * lanes_of(acc)}", value) for value in (x, w)))


def signed_vpmaddubsw(acc: Expr, x: Expr, w: Expr) -> Expr:
    """The same on the value of x without its zero point: exact for weights within -127 to 127.

    What is multiplied is the magnitude of x, and w takes the sign: 2 * 128 * 127 fits.
    """
    lanes = lanes_of(acc)
    bytes_ = f"int8x{4 * lanes}"
    as_signed = words_like(-0x7F7F7F80, lanes)  # 0x80808080: minus 128 in each byte
    x = T.reinterpret(bytes_, T.bitwise_xor(x, as_signed))
    magnitude = T.call_llvm_pure_intrin(bytes_, "llvm.abs", x, tirx.const(False, "bool"))
    sign = "llvm.x86.ssse3.psign.b.128" if lanes == 4 else "llvm.x86.avx2.psign.b"
    w = T.call_llvm_pure_intrin(bytes_, sign, T.reinterpret(bytes_, w), x)
    return _madd(acc, magnitude, w)


def _madd(acc: Expr, x: Expr, w: Expr) -> Expr:
    lanes = lanes_of(acc)
    to_pairs = f"llvm.x86.{'ssse3.pmadd.ub.sw.128' if lanes == 4 else 'avx2.pmadd.ub.sw'}"
    pairs = T.call_llvm_pure_intrin(f"int16x{2 * lanes}", to_pairs, x, w)
    ones = T.broadcast(tirx.const(1, "int16"), 2 * lanes)
    return acc + T.call_llvm_pure_intrin(f"int32x{lanes}", _MADD_WORDS[lanes], pairs, ones)


def plain_halves(acc: Expr, x: Expr, even: Expr | None, odd: Expr | None) -> Expr:
    """The twin of ``vpmaddwd_halves``."""
    return _halves(acc, x, even, odd, _plain_madd_words)


def vpmaddwd_halves(acc: Expr, x: Expr, even: Expr | None, odd: Expr | None) -> Expr:
    """``vpmaddwd`` of the even bytes of x and of the odd ones, in 16 bits each: exact.

    As many multiplications as ``vpmaddubsw`` and ``vpmaddwd``, and no sum in 16 bits. The bytes
    come apart once for all rows of the weight.
    """
    return _halves(acc, x, even, odd, _madd_words)


def _halves(
    acc: Expr, x: Expr, even: Expr | None, odd: Expr | None, products: Callable[[Expr, Expr], Expr]
) -> Expr:
    lanes = lanes_of(acc)
    if even is not None:
        acc = acc + products(T.bitwise_and(x, words_like(0x00FF00FF, lanes)), even)
    if odd is not None:
        pairs = T.reinterpret(f"uint16x{2 * lanes}", x)
        eight = T.broadcast(tirx.const(8, "uint16"), 2 * lanes)
        x = T.reinterpret(f"int32x{lanes}", T.shift_right(pairs, eight))
        acc = acc + products(x, odd)
    return acc


def _madd_words(x: Expr, w: Expr) -> Expr:
    """Sums of two products of 16 bits, both of words."""
    lanes = lanes_of(x)
    x, w = (T.reinterpret(f"int16x{2 * lanes}", value) for value in (x, w))
    return T.call_llvm_pure_intrin(f"int32x{lanes}", _MADD_WORDS[lanes], x, w)


def _plain_madd_words(x: Expr, w: Expr) -> Expr:
    bits = words_like(16, lanes_of(x))
    low = [T.shift_right(T.shift_left(value, bits), bits) for value in (x, w)]
    high = [T.shift_right(value, bits) for value in (x, w)]
    return low[0] * low[1] + high[0] * high[1]


_MADD_WORDS = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd"}

HALVES: dict[str, Callable[..., Expr]] = {
    "avx2-halves": vpmaddwd_halves,
    "sse2-halves": vpmaddwd_halves,
    "plain-halves": plain_halves,
}
"""``(acc, x, even, odd)`` likewise, by the name of a :class:`Dot` that multiplies halves."""

# Dot products of bf16: acc[lane] += sum over the two halves of x[lane] * w[lane], in float32


def vdpbf16ps(acc: Expr, x: Expr, w: Expr) -> Expr:
    """``vdpbf16ps`` of AVX512-BF16, in a function of its ``CODE``."""
    return tirx.call_pure_extern(f"float32x{lanes_of(acc)}", _VDPBF16PS, acc, x, w)


_VDPBF16PS = "sparse_tvm_vdpbf16ps"
CODE = {
    "avx512bf16": f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr <16 x float> @{_VDPBF16PS}(<16 x float> %acc, <16 x i32> %x, <16 x i32> %w)
    alwaysinline nounwind {{
  %a = bitcast <16 x i32> %x to <32 x bfloat>
  %b = bitcast <16 x i32> %w to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %acc, <32 x bfloat> %a, <32 x bfloat> %b)
  ret <16 x float> %sum
}}
"""
}
"""What kernels bring in LLVM's own words, by the name of a :class:`Dot`."""

MULTIPLY_ADD: dict[str, MultiplyAdd] = {
    "avx512bf16": vdpbf16ps,
    "plain-bf16": plain_bf16_dot,
    "avx512vnni": vpdpbusd,
    "avxvnni": vpdpbusd,
    "avx2": vpmaddubsw,
    "avx2-signed": signed_vpmaddubsw,
    "ssse3": vpmaddubsw,
    "ssse3-signed": signed_vpmaddubsw,
    "plain": plain_dot,
}
"""``(acc, x, w)`` to acc plus the products, by the name of a :class:`Dot`."""


# Packing: float32 to the nearest byte


def saturated_bytes(values: Sequence[Expr]) -> Expr:
    """Four float32 vectors as words, each to the nearest byte: ``vpackssdw``, ``vpackuswb``.

    Values are within what int32 holds.
    """
    lanes = lanes_of(values[0])
    to_pairs, to_bytes = _PACKS[lanes]
    whole = [T.call_llvm_pure_intrin(f"int32x{lanes}", "llvm.lrint", value) for value in values]
    pairs = [
        T.call_llvm_pure_intrin(f"int16x{2 * lanes}", to_pairs, *whole[i : i + 2]) for i in (0, 2)
    ]
    packed = T.call_llvm_pure_intrin(f"int8x{4 * lanes}", to_bytes, *pairs)
    # Four bytes of each vector follow each other in every sixteen: a transposition is left.
    order = [16 * (i // 16) + 4 * (i % 4) + i % 16 // 4 for i in range(4 * lanes)]
    words = tirx.Shuffle([packed], [tirx.const(i, "int32") for i in order])
    return T.reinterpret(f"int32x{lanes}", words)


_PACKS = {
    16: ("llvm.x86.avx512.packssdw.512", "llvm.x86.avx512.packuswb.512"),
    8: ("llvm.x86.avx2.packssdw", "llvm.x86.avx2.packuswb"),
    4: ("llvm.x86.sse2.packssdw.128", "llvm.x86.sse2.packuswb.128"),
}


# Expansion: the set bits of a mask say where in a line the next packed elements go


def plain_expand(
    precision: Precision, packed: Buffer, first: Expr, mask: Expr, out: Buffer, at: Expr
) -> None:
    """The twin of ``vpexpandb`` and ``vpexpandw``: one line of 16 words to ``out[at]``."""
    size = 4 // precision.unit
    cursor, word = local(1, "int32"), local(1, "int32")
    T.buffer_store(cursor, first, [0])
    one = tirx.const(1, mask.ty.dtype)
    with T.serial(0, LINES) as i:
        T.buffer_store(word, T.int32(0), [0])
        for u in range(precision.unit):
            bit = T.shift_right(mask, T.Cast(mask.ty.dtype, i * precision.unit + u))
            with T.If(T.bitwise_and(bit, one) == one), T.Then():
                for byte in range(size):
                    value = T.bitwise_and(T.Cast("int32", packed[cursor[0] + byte]), T.int32(255))
                    place = 8 * (u * size + byte)
                    T.buffer_store(
                        word, T.bitwise_or(word[0], T.shift_left(value, T.int32(place))), [0]
                    )
                T.buffer_store(cursor, cursor[0] + size, [0])
        T.buffer_store(out, word[0], [at + i])


def vpexpand(
    precision: Precision, packed: Buffer, first: Expr, mask: Expr, out: Buffer, at: Expr
) -> None:
    """``vpexpandb`` or ``vpexpandw``: one line of 16 words to ``out[at]``.

    Reads 64 bytes from ``packed[first]``, however few are used.
    """
    count = LINES * precision.unit
    bits = 512 // count
    vector = f"int{bits}x{count}"
    expanded = T.call_llvm_pure_intrin(
        vector,
        f"llvm.x86.avx512.mask.expand.v{count}i{bits}",
        T.reinterpret(vector, packed[T.ramp(first, 1, 64)]),
        T.broadcast(tirx.const(0, f"int{bits}"), count),
        T.reinterpret(f"uint1x{count}", mask),
    )
    T.buffer_store(out, T.reinterpret("int32x16", expanded), [T.ramp(at, 1, LINES)])


def bits_set(mask: Expr) -> Expr:
    """Set bits of a mask, as int32."""
    return T.Cast("int32", T.call_llvm_pure_intrin(mask.ty.dtype, "llvm.ctpop", mask))


# Tiles: 16 rows of 64 bytes, c[r, token] += sum over a line's words of a[r, line] * b[line, token]


class TileUnit(Protocol):
    """A matrix unit with eight tile registers of 16 rows by 16 words."""

    def configure(self, shapes: Sequence[Shape] = FULL) -> None:
        """Make the tiles usable on this thread, with rows and words of each."""

    def release(self) -> None:
        """Give the tiles back."""

    def zero(self, tile: int) -> None:
        """Clear a tile."""

    def load(self, tile: int, words: Buffer, at: Expr, pitch: Expr = LINES) -> None:
        """Load a tile from flat memory, from one row to the next ``pitch`` words apart."""

    def store(self, tile: int, words: Buffer, at: Expr) -> None:
        """Store a tile to 256 consecutive words of flat memory."""

    def multiply_add(self, precision: Precision, c: int, a: int, b: int) -> None:
        """Add the product of tiles ``a`` (weights) and ``b`` (activations) to ``c``."""

    def expand(
        self, precision: Precision, packed: Buffer, first: Expr, mask: Expr, out: Buffer, at: Expr
    ) -> None:
        """Expand packed elements to a line of 16 words."""


class Amx:
    """Intel AMX. Linux lets a process use it only after asking (see ``sparse_tvm.cpu``)."""

    features = AMX_FEATURES
    expand = staticmethod(vpexpand)

    def configure(self, shapes: Sequence[Shape] = FULL) -> None:
        """``ldtilecfg`` of palette 1."""
        config = scratch(8, "int64")
        row_bytes = sum(4 * words << 16 * tile for tile, (_, words) in enumerate(shapes))
        rows = sum(count << 8 * tile for tile, (count, _) in enumerate(shapes))
        low, high = row_bytes & 2**64 - 1, row_bytes >> 64
        for i, word in enumerate([1, 0, low, high, 0, 0, rows, 0]):
            T.buffer_store(config, T.int64(word), [i])
        self._emit("ldtilecfg", tirx.address_of(config[0]))

    def release(self) -> None:
        """``tilerelease``: a thread with live tiles is slow to switch."""
        self._emit("tilerelease")

    def zero(self, tile: int) -> None:
        """``tilezero``."""
        self._emit("tilezero", self._number(tile))

    def load(self, tile: int, words: Buffer, at: Expr, pitch: Expr = LINES) -> None:
        """``tileloadd``."""
        address = tirx.address_of(words[at])
        stride = T.int64(4 * pitch) if isinstance(pitch, int) else T.Cast("int64", pitch * 4)
        self._emit("tileloadd64", self._number(tile), address, stride)

    def store(self, tile: int, words: Buffer, at: Expr) -> None:
        """``tilestored``."""
        address = tirx.address_of(words[at])
        self._emit("tilestored64", self._number(tile), address, T.int64(4 * LINES))

    def multiply_add(self, precision: Precision, c: int, a: int, b: int) -> None:
        """``tdpbsud`` or ``tdpbf16ps``."""
        name = "tdpbsud" if precision.scaled else "tdpbf16ps"
        self._emit(name, *map(self._number, (c, a, b)))

    @staticmethod
    def _number(tile: int) -> Any:
        return tirx.const(tile, "int8")

    @staticmethod
    def _emit(name: str, *operands: Any) -> None:
        T.evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *operands))


class PlainTiles:
    """The twin of AMX: tiles in memory, products in loops."""

    expand = staticmethod(plain_expand)

    def __init__(self) -> None:
        self._tiles: Buffer = None
        self._shapes: Sequence[Shape] = FULL

    def configure(self, shapes: Sequence[Shape] = FULL) -> None:
        """Take memory for the tiles."""
        self._tiles, self._shapes = scratch(TILES * TILE_WORDS, "int32"), shapes

    def release(self) -> None:
        """Nothing to do."""

    def zero(self, tile: int) -> None:
        """Clear a tile."""
        with T.serial(0, LINES) as row:
            T.buffer_store(self._tiles, words_like(0, LINES), [self._row(tile, row)])

    def load(self, tile: int, words: Buffer, at: Expr, pitch: Expr = LINES) -> None:
        """Copy a tile in."""
        rows, count = self._shapes[tile]
        with T.serial(0, rows) as row, T.serial(0, count) as word:
            there = tile * TILE_WORDS + row * LINES + word
            T.buffer_store(self._tiles, words[at + row * pitch + word], [there])

    def store(self, tile: int, words: Buffer, at: Expr) -> None:
        """Copy a tile out."""
        with T.serial(0, LINES) as row:
            line = self._tiles[self._row(tile, row)]
            T.buffer_store(words, line, [T.ramp(at + row * LINES, 1, LINES)])

    def multiply_add(self, precision: Precision, c: int, a: int, b: int) -> None:
        """Row by row of ``c``, line by line of ``b``."""

        def multiply(acc: Expr, x: Expr, w: Expr) -> Expr:
            if precision.name == "int8":
                return plain_dot(acc, x, w)
            total = plain_bf16_dot(T.reinterpret(f"float32x{LINES}", acc), x, w)
            return T.reinterpret(f"int32x{LINES}", total)

        with T.serial(0, LINES) as row, T.serial(0, self._shapes[b][0]) as line:
            at = self._row(c, row)
            weight = T.broadcast(self._tiles[a * TILE_WORDS + row * LINES + line], LINES)
            x = self._tiles[self._row(b, line)]
            T.buffer_store(self._tiles, multiply(self._tiles[at], x, weight), [at])

    @staticmethod
    def _row(tile: int, row: Expr) -> Expr:
        return T.ramp(tile * TILE_WORDS + row * LINES, 1, LINES)
