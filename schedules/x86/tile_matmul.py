"""Y = epilogue(W X) on a matrix unit, for W dense, in blocks, or unstructured: int8 and bf16.

A block row is ``height`` tiles of 16 outputs. It meets the tokens of up to eight tiles, one or two
at a time, whose sums stay in tile registers. Forms of W:

``dense``   every tile.
``skip``    the blocks of ``height`` tiles that hold a non-zero.
``gather``  blocks of ``16 * height`` outputs by one line: the lines of X that a block row needs
            are copied together, sixteen make a tile, one chunk ahead of its product.
``expand``  unstructured: a bit mask and packed non-zeros, expanded to tiles a little ahead of
            their products with the first tokens.
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
from sparse_tvm.schedules.x86.tile_results import TileResults
from sparse_tvm.schedules.x86.units import TILE_ROWS

FORMS = ("dense", "skip", "gather", "expand")
MAX_GROUP = 8
"""Tiles of tokens that share a pass over W."""

_WIDTH = 2
"""Tiles of tokens whose sums are in registers together."""

_K_TILES = 8
"""Tiles of K per pass over the tokens, at most: a block row's weights take a third of the first
cache, and the tokens, which pass through, evict none of them."""

_AHEAD, _PREFETCHED = 2, 1024
"""Tiles of K that are expanded ahead of their product, whose loads would wait for the stores; and
bytes that packed elements are asked for ahead of their expansion."""

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

    def sum_register(self, row: int, column: int) -> int:
        """The register of a tile's sums."""
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
                self.unit.zero(self.sum_register(row, column))

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
                    self.precision, self.sum_register(row, column), self._a(row), self._b(column)
                )

    def move_sums(self, store: bool, sums: Buffer, place: Expr, width: int) -> None:
        """Store the sums to memory, at ``place`` tiles into a group, or load them from there."""
        move = self.unit.store if store else self.unit.load
        for row in range(self.height):
            for column in range(width):
                spot = (row * MAX_GROUP + place + column) * TILE_WORDS
                move(self.sum_register(row, column), sums, spot)

    def sums_memory(self) -> Buffer:
        """Memory for the sums of a block row and a group of tiles."""
        return scratch(self.height * MAX_GROUP * TILE_WORDS, "int32")

    def results(self) -> TileResults:
        """Memory for what waits for its epilogue."""
        return TileResults(self.outputs, self.unit, self.height, _WIDTH, self.sum_register)

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

    def __init__(self, outputs: Rows, layout: TileLayout, unit: TileUnit) -> None:
        super().__init__(outputs, layout, unit)
        parts = -(-self.k_tiles // _K_TILES)
        self.part = -(-self.k_tiles // parts)

    def passes(
        self,
        sums: Buffer,
        results: TileResults,
        block_row: Expr,
        first_tile: Expr,
        size: Expr,
        a: Callable[[Expr, Expr, int], tuple[Buffer, Expr]],
        beside: Callable[[Expr, Expr, Expr], None],
        begin: Callable[[Expr, Expr], None] = lambda first_k, count: None,
    ) -> None:
        """Compute one block row; ``a(first, step, row)`` is W's tile ``first + step`` of K.

        ``beside(k, place, width)`` is emitted with the product of tile ``k`` of K for the tokens
        at ``place``, for what memory can do at the same time; ``begin(first, count)`` before those
        of a part of K.
        """
        parts = -(-self.k_tiles // self.part)
        with T.serial(0, parts) as part:
            first_k = scalar(part * self.part)
            count = scalar(tirx.min(self.part, self.k_tiles - first_k))
            share = results.share(count)
            begin(first_k, count)

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

                    self.multiply(width, lambda row: a(first_k, step, row), b)
                    beside(k, place, T.int32(width))
                    results.finish(share)
                if parts == 1:
                    results.hold(block_row, first_tile, place, width)
                    return
                with T.If(part == parts - 1):
                    with T.Then():
                        results.hold(block_row, first_tile, place, width)
                    with T.Else():
                        self.move_sums(True, sums, place, width)

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
        sums, results = self.sums_memory(), self.results()
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

            def a(first: Expr, step: Expr, row: int) -> tuple[Buffer, Expr]:
                return self._data, tile_at(block_row, first + step, row)

            self.passes(sums, results, block_row, first_tile, size, a, beside)
        results.flush()


class _Expand(_WholeRows):
    """Expands a part of a block row for the first tokens, and multiplies the others by it."""

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
        sums, results = self.sums_memory(), self.results()
        lines = self.height * TILE_ROWS  # of a tile of K
        dense = T.alloc_buffer((self.part * lines * LINES,), "int32")
        cursor, line, end = local(1, "int64"), local(1, "int32"), local(1, "int32")
        into = local(1, "int32")

        def expand(count: Expr) -> None:
            """Expand the next ``count`` lines, in the order of storage."""
            first, place = scalar(line[0]), scalar(into[0])
            with T.serial(0, count) as i:
                mask = scalar(self._masks[first + i], self._mask_dtype)
                at = place + i * LINES
                self.unit.expand(self.precision, self._packed, cursor[0], mask, dense, at)
                used = bits_set(mask) * (4 // self.precision.unit)
                T.buffer_store(cursor, cursor[0] + T.Cast("int64", used), [0])
            T.buffer_store(line, first + count, [0])
            T.buffer_store(into, place + count * LINES, [0])

        with T.If(start < stop), T.Then():
            T.buffer_store(cursor, T.Cast("int64", self._offsets[start]), [0])
            T.buffer_store(line, start * (self.k_tiles * lines), [0])
        with T.serial(0, stop - start) as i:
            block_row = scalar(start + i)

            def begin(first_k: Expr, count: Expr) -> None:
                """Expand the first tiles of a part of K."""
                T.buffer_store(into, T.int32(0), [0])
                T.buffer_store(end, line[0] + count * lines, [0])
                expand(scalar(tirx.min(_AHEAD, count) * lines))

            def beside(k: Expr, place: Expr, width: Expr) -> None:
                """Expand the next tile with each product of the first tokens."""
                with T.If(tirx.And(place == 0, line[0] < end[0])), T.Then():
                    for cache_line in range(4):
                        prefetch(self._packed, (cursor[0] + _PREFETCHED + 64 * cache_line,))
                    expand(T.int32(lines))

            def a(first: Expr, step: Expr, row: int) -> tuple[Buffer, Expr]:
                return dense, (step * self.height + row) * TILE_ROWS * LINES

            self.passes(sums, results, block_row, first_tile, size, a, beside, begin)
        results.flush()


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
        results, weight = self.results(), self.weight
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
                results.hold(block_row, first_tile, place, width)

            _for_widths(size, some_tokens)
        results.flush()

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
