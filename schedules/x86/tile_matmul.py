"""Y = epilogue(W X) on a matrix unit, for W dense, in blocks, or unstructured: int8 and bf16.

A block row is ``height`` tiles of 16 outputs. It meets the tokens of up to eight tiles, one or two
at a time, whose sums stay in tile registers. Forms of W:

``dense``   every tile.
``skip``    the blocks of ``height`` tiles that hold a non-zero.
``gather``  blocks of ``16 * height`` outputs by one line: the lines of X that a block row needs
            are copied together, sixteen make a tile, one chunk ahead of its product.
``expand``  unstructured: a bit mask and packed non-zeros, expanded to the tiles of a block row
            while the one before is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.block_arrays import index_dtype
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    argument,
    local,
    prefetch,
    prim_func,
    scalar,
    scratch,
    symbol,
)
from sparse_tvm.schedules.cpu.low_matmul import (
    LowMatmul,
    Rows,
    SparseWeight,
    for_job_ranges,
    row_range,
)
from sparse_tvm.schedules.cpu.precision import LINES
from sparse_tvm.schedules.cpu.simd import LANES, Simd
from sparse_tvm.schedules.x86.instructions import TILE_WORDS, TileUnit, bits_set
from sparse_tvm.schedules.x86.units import TILE_ROWS

FORMS = ("dense", "skip", "gather", "expand")
MAX_GROUP = 8
"""Tiles of tokens that share a pass over W."""

_WIDTH = 2
"""Tiles of tokens whose sums are in registers together."""

_K_TILES = 12
"""Tiles of K per pass over the tokens, so that a block row's weights stay in the first cache."""

_CHUNKS = 4
"""Gathered chunks in flight."""


@dataclass(frozen=True)
class TileLayout:
    """How a kernel finds W: its form, and the tiles of outputs in a block row."""

    form: str
    height: int = 2


def tile_matmul(
    problem: LowMatmul, layout: TileLayout, simd: Simd, unit: TileUnit
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc, in order: x; the weight, as ``schedules.x86.tile_weights`` packs its
    form; then those of :class:`Rows`.
    """
    with prim_func() as result:
        outputs = Rows(problem, simd, MAX_GROUP, paired=True)
        kernel = _KERNELS[layout.form](outputs, layout, unit)
        outputs.declare()
        kernel.bind()

        def jobs_kernel(group: Expr, job: Expr, last_job: Expr) -> None:
            start, stop = row_range(kernel.weight, kernel.block_rows, job, last_job)
            count = problem.tiles.count
            first_tile = scalar(group * MAX_GROUP)
            size = scalar(tirx.min(MAX_GROUP, count - first_tile))
            with outputs.output.jobs(first_tile, size, job, last_job):
                kernel.compute(start, stop, first_tile, size)

        groups = (problem.tiles.count + (MAX_GROUP - 1)) // MAX_GROUP
        for_job_ranges(groups, jobs_kernel, (unit.configure, unit.release))
        outputs.output.close()
    return result["func"]


class _TileKernel:
    """What the forms share: registers, sums, and the loop over tokens."""

    weight: SparseWeight | None = None

    def __init__(self, outputs: Rows, layout: TileLayout, unit: TileUnit) -> None:
        problem = outputs.problem
        self.outputs, self.problem, self.unit, self.height = outputs, problem, unit, layout.height
        self.x, self.precision = outputs.x, problem.precision
        self.block_rows = -(-problem.n_out // (TILE_ROWS * layout.height))
        self.k_tiles = problem.precision.data_lines(problem.k_in) // LINES

    def bind(self) -> None:
        """See the weight's arguments as flat memory, when all arguments are declared."""
        raise NotImplementedError

    def compute(self, start: Expr, stop: Expr, first_tile: Expr, size: Expr) -> None:
        """Compute a range of stored block rows for ``size`` tiles of tokens."""
        raise NotImplementedError

    # Registers: the sums, then the weights' tiles, then the tokens'.

    def _sum(self, row: int, column: int) -> int:
        return row * _WIDTH + column

    def _a(self, row: int) -> int:
        spare = 8 - self.height * _WIDTH
        return self.height * _WIDTH + (row if spare > self.height else 0)

    def _b(self, column: int) -> int:
        spare = 8 - self.height * _WIDTH
        used = self.height if spare > self.height else 1
        return self.height * _WIDTH + used + column % max(1, spare - used)

    def zero(self, width: int) -> None:
        """Clear the sums."""
        for row in range(self.height):
            for column in range(width):
                self.unit.zero(self._sum(row, column))

    def multiply(
        self,
        width: int,
        a: Callable[[int], tuple[Buffer, Expr]],
        b: Callable[[int], tuple[Buffer, Expr]],
    ) -> None:
        """Add the products of a tile of weights per row and a tile of tokens per column."""
        shared = self._a(0) == self._a(1) and self.height > 1
        for column in range(width):
            self.unit.load(self._b(column), *b(column))
            for row in range(self.height):
                if column == 0 or shared:
                    self.unit.load(self._a(row), *a(row))
                self.unit.multiply_add(
                    self.precision, self._sum(row, column), self._a(row), self._b(column)
                )

    def move_sums(self, store: bool, sums: Buffer, place: Expr, width: int) -> None:
        """Store the sums to memory, at ``place`` tiles into a group, or load them from there."""
        move = self.unit.store if store else self.unit.load
        for row in range(self.height):
            for column in range(width):
                move(self._sum(row, column), sums, self._spot(row, place + column))

    def _spot(self, row: Expr, place: Expr) -> Expr:
        return (row * MAX_GROUP + place) * TILE_WORDS

    def sums_memory(self) -> Buffer:
        """Memory for the sums of a block row and a group of tiles."""
        return scratch(self.height * MAX_GROUP * TILE_WORDS, "int32")

    def finish(
        self, sums: Buffer, block_row: Expr, first_tile: Expr, place: Expr, width: int
    ) -> None:
        """Scale, epilogue and store of the tiles of sums that lie in memory."""
        # Loops, whose ends LLVM cannot foresee: unrolled, an epilogue exceeds the cache of code.
        with T.serial(0, self.height) as row, T.serial(0, width) as column:
            first_row = scalar((block_row * self.height + row) * TILE_ROWS)
            live = scalar(tirx.max(tirx.min(TILE_ROWS, self.problem.n_out - first_row), 0))
            at = scalar(self._spot(row, place + column))
            self._finish_tile(sums, at, first_row, live, first_tile, place + column)

    def _finish_tile(
        self, sums: Buffer, at: Expr, first_row: Expr, live: Expr, first_tile: Expr, place: Expr
    ) -> None:
        """The first ``live`` rows of one tile of sums."""
        lanes, output = self.outputs.simd.lanes, self.outputs.output
        tile = first_tile + place

        def load(row: Expr, first: int) -> Expr:
            value = sums[T.ramp(at + row * LANES + first, 1, lanes)]
            return value if self.precision.scaled else T.reinterpret(f"float32x{lanes}", value)

        for first in range(0, LANES, lanes):
            if not output.in_pairs:
                with output.peak(place, first) as peak, T.serial(0, live) as r:
                    self.outputs.finish(load(r, first), first_row + r, tile, first, peak)
                continue
            with T.serial(0, live // 2) as pair:
                low, high = load(pair * 2, first), load(pair * 2 + 1, first)
                self.outputs.finish_pair(low, high, first_row + pair * 2, tile, first)
            if self.problem.n_out % 2:
                with T.If(live % 2 == 1), T.Then():
                    row = first_row + live - 1
                    self.outputs.finish_pair(load(live - 1, first), None, row, tile, first)

    def tokens(self, tile: Expr, line: Expr) -> tuple[Buffer, Expr]:
        """Where sixteen lines of a tile of tokens lie."""
        return self.x.words, self.x.at(tile, line)


def _for_widths(size: Expr, body: Callable[[Expr, int], None]) -> None:
    """Call ``body(place, width)`` for the tiles of a group, as many at once as go."""
    with T.serial(0, size // _WIDTH) as pair:
        body(pair * _WIDTH, _WIDTH)
    with T.If(size % _WIDTH == 1), T.Then():
        body(size - 1, 1)


class _WholeRows(_TileKernel):
    """Forms whose block rows are all tiles of K: in parts of K, each over all the tokens."""

    def passes(
        self,
        sums: Buffer,
        block_row: Expr,
        first_tile: Expr,
        size: Expr,
        a: Callable[[Expr, int], tuple[Buffer, Expr]],
        beside: Callable[[Expr, Expr, Expr], None],
    ) -> None:
        """Compute one block row; ``a(tile of K, row)`` is a tile of W.

        ``beside(k, place, width)`` is emitted with the product of tile ``k`` of K for the tokens
        at ``place``, for what memory can do at the same time.
        """
        parts = -(-self.k_tiles // _K_TILES)
        with T.serial(0, parts) as part:
            first_k = scalar(part * _K_TILES)
            count = scalar(tirx.min(_K_TILES, self.k_tiles - first_k))

            def some_tokens(place: Expr, width: int) -> None:
                place = scalar(place)
                if parts == 1:
                    self.zero(width)
                else:
                    with T.If(part == 0):
                        with T.Then():
                            self.zero(width)
                        with T.Else():
                            self.move_sums(False, sums, place, width)
                with T.serial(0, count) as step:
                    k = scalar(first_k + step)

                    def b(column: int) -> tuple[Buffer, Expr]:
                        return self.tokens(first_tile + place + column, k * LINES)

                    self.multiply(width, lambda row: a(k, row), b)
                    beside(k, place, T.int32(width))
                self.move_sums(True, sums, place, width)
                with T.If(part == parts - 1), T.Then():
                    self.finish(sums, block_row, first_tile, place, width)

            _for_widths(size, some_tokens)


class _Dense(_WholeRows):
    def __init__(self, outputs: Rows, layout: TileLayout, unit: TileUnit) -> None:
        super().__init__(outputs, layout, unit)
        shape = (self.block_rows, self.k_tiles, self.height, TILE_ROWS, LINES)
        self._argument = argument("data", shape, "int32")

    def bind(self) -> None:
        words = self.block_rows * self.k_tiles * self.height * TILE_WORDS
        self._data = T.decl_buffer((words,), "int32", data=self._argument.data)

    def compute(self, start: Expr, stop: Expr, first_tile: Expr, size: Expr) -> None:
        sums = self.sums_memory()
        lines = self.height * TILE_ROWS

        def tile_at(block_row: Expr, k: Expr, row: int) -> Expr:
            return ((block_row * self.k_tiles + k) * self.height + row) * TILE_WORDS

        with T.serial(0, stop - start) as i:
            block_row = scalar(start + i)

            def beside(k: Expr, place: Expr, width: Expr) -> None:
                """Ask for the next block row's tile of K, a share of it with every few tokens."""
                first = scalar(place * lines // size)
                more = scalar((place + width) * lines // size - first)
                with T.serial(0, more) as line:
                    at = tile_at(block_row + 1, k, 0) + (first + line) * LINES
                    prefetch(self._data, (at,))

            def a(k: Expr, row: int) -> tuple[Buffer, Expr]:
                return self._data, tile_at(block_row, k, row)

            self.passes(sums, block_row, first_tile, size, a, beside)


class _Expand(_WholeRows):
    def __init__(self, outputs: Rows, layout: TileLayout, unit: TileUnit) -> None:
        super().__init__(outputs, layout, unit)
        self._packed = argument("packed", (symbol("bytes"),), "int8")
        shape = (self.block_rows, self.k_tiles, self.height, TILE_ROWS)
        self._mask_dtype = "int64" if self.precision.unit == 4 else "int32"
        self._argument = argument("masks", shape, self._mask_dtype)
        self._offsets = argument("offsets", (self.block_rows + 1,), "int32")

    def bind(self) -> None:
        count = self.block_rows * self.k_tiles * self.height * TILE_ROWS
        self._masks = T.decl_buffer((count,), self._mask_dtype, data=self._argument.data)

    def compute(self, start: Expr, stop: Expr, first_tile: Expr, size: Expr) -> None:
        sums = self.sums_memory()
        rows = self.k_tiles * self.height * TILE_ROWS  # lines of a block row, in storage's order
        dense = T.alloc_buffer((2 * rows * LINES,), "int32")
        cursor, done = local(1, "int32"), local(1, "int32")

        def expand(block_row: Expr, buffer: Expr, count: Expr) -> None:
            """Expand the next ``count`` lines of a block row."""
            first = scalar(done[0])
            with T.serial(0, count) as i:
                line = first + i
                mask = scalar(self._masks[block_row * rows + line], self._mask_dtype)
                at = (buffer * rows + line) * LINES
                self.unit.expand(self.precision, self._packed, cursor[0], mask, dense, at)
                used = bits_set(mask) * (4 // self.precision.unit)
                T.buffer_store(cursor, cursor[0] + used, [0])
            T.buffer_store(done, first + count, [0])

        def begin(block_row: Expr) -> None:
            T.buffer_store(cursor, self._offsets[block_row], [0])
            T.buffer_store(done, T.int32(0), [0])

        with T.If(start < stop), T.Then():
            begin(start)
            with T.serial(0, rows // TILE_ROWS):
                prefetch(self._packed, (cursor[0] + 4096,))
                expand(start, T.int32(0), T.int32(TILE_ROWS))
        with T.serial(0, stop - start) as i:
            block_row, parity = scalar(start + i), scalar(i % 2)
            following = scalar(tirx.min(block_row + 1, self.block_rows - 1))
            begin(following)

            def beside(k: Expr, place: Expr, width: Expr) -> None:
                """Expand a share of the next block row's lines with every product."""
                prefetch(self._packed, (cursor[0] + 2048,))
                share = scalar((width * self.height * TILE_ROWS + size - 1) // size)
                expand(following, 1 - parity, scalar(tirx.min(share, rows - done[0])))

            def a(k: Expr, row: int) -> tuple[Buffer, Expr]:
                return dense, (parity * rows + (k * self.height + row) * TILE_ROWS) * LINES

            self.passes(sums, block_row, first_tile, size, a, beside)


class _Blocks(_TileKernel):
    """Forms that store blocks: ``per_block`` indices each."""

    per_block = 1

    def __init__(self, outputs: Rows, layout: TileLayout, unit: TileUnit) -> None:
        super().__init__(outputs, layout, unit)
        blocks = symbol("blocks")
        shape = (blocks, self.height, TILE_ROWS, LINES)
        self._argument = argument("data", shape, "int32")
        self._words = blocks * (self.height * TILE_WORDS)
        lines = -(-self.problem.k_in // self.precision.unit)
        self.weight: SparseWeight = SparseWeight.arguments(
            blocks, self.per_block, self.block_rows, index_dtype(lines)
        )

    def bind(self) -> None:
        self._data = T.decl_buffer((self._words,), "int32", data=self._argument.data)

    def tile_of(self, block: Expr, row: int) -> tuple[Buffer, Expr]:
        """Where a block's tile lies."""
        return self._data, (block * self.height + row) * TILE_WORDS

    def compute(self, start: Expr, stop: Expr, first_tile: Expr, size: Expr) -> None:
        sums = self.sums_memory()
        weight = self.weight
        with T.serial(0, stop - start) as i:
            segment = scalar(start + i)
            block_row = scalar(weight.rows[segment])
            first = scalar(weight.indptr[segment])
            count = scalar(weight.indptr[segment + 1] - first)
            with T.serial(0, count * (self.height * TILE_ROWS)) as line:
                at = (first + count) * (self.height * TILE_WORDS) + line * LINES
                prefetch(self._data, (at,))

            def some_tokens(place: Expr, width: int) -> None:
                place = scalar(place)
                self.zero(width)
                self.add_blocks(first, count, first_tile + place, width)
                self.move_sums(True, sums, place, width)
                self.finish(sums, block_row, first_tile, place, width)

            _for_widths(size, some_tokens)

    def add_blocks(self, first: Expr, count: Expr, tile: Expr, width: int) -> None:
        """Add the products of a block row's blocks for some tiles of tokens."""
        raise NotImplementedError


class _Skip(_Blocks):
    def add_blocks(self, first: Expr, count: Expr, tile: Expr, width: int) -> None:
        with T.serial(0, count) as p:
            block = scalar(first + p)
            line = scalar(self.weight.indices[block, 0])
            self.multiply(
                width,
                lambda row: self.tile_of(block, row),
                lambda column: self.tokens(tile + column, line),
            )


class _Gather(_Blocks):
    per_block = LINES

    def add_blocks(self, first: Expr, count: Expr, tile: Expr, width: int) -> None:
        lines = scratch(_CHUNKS * width * TILE_WORDS, "int32")

        def chunk_at(p: Expr, column: int) -> Expr:
            return (p % _CHUNKS * width + column) * TILE_WORDS

        def gather(p: Expr) -> None:
            for j in range(LINES):
                line = scalar(self.weight.indices[first + p, j])
                for column in range(width):
                    words = self.x.get(tile + column, line, 0, LANES)
                    spot = chunk_at(p, column) + j * LINES
                    T.buffer_store(lines, words, [T.ramp(spot, 1, LANES)])

        with T.If(count > 0), T.Then():
            gather(T.int32(0))
        with T.serial(0, count) as p:
            block = scalar(first + p)
            # One chunk ahead: gathering all first is 1.7 times slower as soon as a block row's
            # lines exceed the reorder buffer.
            with T.If(p + 1 < count), T.Then():
                gather(p + 1)
            self.multiply(
                width,
                lambda row: self.tile_of(block, row),
                lambda column: (lines, chunk_at(p, column)),
            )


_KERNELS: dict[str, type[_TileKernel]] = {
    "dense": _Dense,
    "skip": _Skip,
    "gather": _Gather,
    "expand": _Expand,
}
