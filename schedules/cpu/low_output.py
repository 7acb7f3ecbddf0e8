"""Outputs of layers in low precision: how rows of float32 results are stored as what they are.

float32 is stored as it is. bf16 is stored in pairs of rows where the kernel computes two rows
together. Everything else waits as rows of bf16 until all features of its tokens are there: an int8
scale depends on them all. That adds a hundredth to the noise of int8, and halves what goes through
the caches. The largest magnitudes are taken on the way, so that the waiting rows are read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.block_arrays import JOBS_PER_GROUP
from sparse_tvm.schedules.cpu.lane_tiles import (
    Expr,
    Registers,
    Tiles,
    argument,
    prefetch,
    scalar,
    scratch,
)
from sparse_tvm.schedules.cpu.low_precision import (
    Lines,
    bf16_pair,
    magnitude,
    store_tile,
    words_like,
)
from sparse_tvm.schedules.cpu.precision import Precision
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.cpu.vector_math import lanes_of


class Output:
    """Y ``[features, tokens]`` in some precision; None is float32.

    Made inside of an open PrimFunc, of which it declares the next argument. ``paired`` tells that
    the kernel hands over pairs of rows. ``group`` is how many tiles of tokens a job has at most.
    """

    def __init__(
        self,
        tiles: Tiles,
        features: int,
        precision: Precision | None,
        simd: Simd,
        group: int,
        paired: bool,
    ) -> None:
        self._tiles, self._features, self.precision, self._simd = tiles, features, precision, simd
        self._group = group
        self.in_pairs = paired and precision is not None and not precision.scaled
        self._waits = precision is not None and not self.in_pairs
        if precision is None:
            self._argument = argument("y", tiles.shape(features))
        else:
            self._lines = Lines("y", tiles, features, precision)

    @property
    def has_peaks(self) -> bool:
        """Whether the largest magnitudes are wanted."""
        return self.precision is not None and self.precision.scaled

    def bind(self) -> None:
        """Take memory, when all arguments are declared."""
        count = self._tiles.count
        if self.precision is None:
            self._y = self._tiles.flat(self._argument, self._features)
        else:
            self._lines.bind()
        if self._waits:
            self._rows = T.alloc_buffer((count, self._features, LANES), "uint16")
        if self.has_peaks:
            self._peaks = T.alloc_buffer((count, JOBS_PER_GROUP, LANES), "float32")

    @contextmanager
    def jobs(self, first_tile: Expr, size: Expr, job: Expr, last_job: Expr) -> Iterator[None]:
        """Around the rows of a range of jobs for a group of tiles."""
        if not self.has_peaks:
            yield
            return
        self._seen = scratch(self._group * LANES)
        with T.serial(0, size) as place:
            nothing = T.broadcast(T.float32(0), LANES)
            T.buffer_store(self._seen, nothing, [T.ramp(place * LANES, 1, LANES)])
        yield
        with T.serial(0, size) as place, T.serial(0, last_job - job) as i:
            peak = self._seen[T.ramp(place * LANES, 1, LANES)]
            at = [first_tile + place, job + i, T.ramp(0, 1, LANES)]
            T.buffer_store(self._peaks, peak, at)

    @contextmanager
    def peak(self, place: Expr, first: Expr, lanes: int) -> Iterator[Registers | None]:
        """The largest magnitudes of some tokens in a register, while rows of theirs are stored."""
        if not self.has_peaks:
            yield None
            return
        at = T.ramp(place * LANES + first, 1, lanes)
        register = Registers(1, 1, replace(self._simd, lanes=lanes))
        register.set(0, 0, self._seen[at])
        yield register
        T.buffer_store(self._seen, register.get(0, 0), [at])

    def ask(self, row: Expr, tile: Expr) -> None:
        """Ask for where a row of a tile is stored, if rows are stored as they come."""
        if self.precision is None:
            prefetch(self._y, (tile, row, 0))
        elif self._waits:
            prefetch(self._rows, (tile, row, 0))

    def store(
        self, value: Expr, row: Expr, tile: Expr, first: Expr, peak: Registers | None
    ) -> None:
        """Store some tokens of one row, from token ``first`` of a tile."""
        lanes = lanes_of(value)
        at = [tile, row, T.ramp(first, 1, lanes)]
        if self.precision is None:
            T.buffer_store(self._y, value, at)
            return
        held = Registers(1, 1, replace(self._simd, lanes=lanes))
        held.set(0, 0, value)
        if peak is not None:
            peak.set(0, 0, tirx.max(peak.get(0, 0), magnitude(held.get(0, 0))))
        bits = T.reinterpret(f"uint32x{lanes}", held.get(0, 0))
        nearest = bits + words_like(0x8000, lanes, "uint32")
        upper = T.shift_right(nearest, words_like(16, lanes, "uint32"))
        T.buffer_store(self._rows, T.Cast(f"uint16x{lanes}", upper), at)

    def store_pair(self, low: Expr, high: Expr, row: Expr, tile: Expr, first: Expr) -> None:
        """Store rows ``row``, which is even, and the one behind it."""
        lanes = self._simd.lanes
        words = bf16_pair(low, high, lanes)
        self._lines.set(tile, row // 2, first, words, lanes)

    def close(self) -> None:
        """Round what waited, on all threads, when all rows are stored."""
        if self.in_pairs:
            self._fill()
        if self._waits:
            self._round()

    def _fill(self) -> None:
        """Clear the lines behind the last pair."""
        used = (self._features + 1) // 2
        rest = self._lines.data_lines - used
        if rest:
            with T.parallel(0, self._tiles.count) as tile, T.serial(0, rest) as i:
                self._lines.set(tile, used + i, 0, words_like(0, LANES), LANES)

    def _round(self) -> None:
        lanes, parts = self._simd.lanes, self._simd.per_tile
        with T.parallel(0, self._tiles.count * parts) as job:
            tile, first = scalar(job // parts), scalar(job % parts * lanes)

            def load(feature: Expr) -> Expr:
                upper = self._rows[tile, feature, T.ramp(first, 1, lanes)]
                words = T.Cast(f"uint32x{lanes}", upper)
                bits = T.shift_left(words, words_like(16, lanes, "uint32"))
                return T.reinterpret(f"float32x{lanes}", bits)

            peak = None
            if self.has_peaks:
                peak = Registers(1, 1, self._simd)
                peak.set(0, 0, self._peaks[tile, 0, T.ramp(first, 1, lanes)])
                with T.serial(1, JOBS_PER_GROUP) as i:
                    other = self._peaks[tile, i, T.ramp(first, 1, lanes)]
                    peak.set(0, 0, tirx.max(peak.get(0, 0), other))
                # As what waited was rounded, which none may exceed.
                bits = T.reinterpret(f"uint32x{lanes}", peak.get(0, 0))
                nearest = bits + words_like(0x8000, lanes, "uint32")
                upper = T.bitwise_and(nearest, words_like(0xFFFF0000, lanes, "uint32"))
                peak.set(0, 0, T.reinterpret(f"float32x{lanes}", upper))
            store_tile(self._lines, tile, first, load, self._simd, peak)
