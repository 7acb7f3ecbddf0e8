"""Products of two activations, in batches, each operand in any order of its axes.

Columns of the result are SIMD lanes. A job packs a panel of the right operand, then multiplies
block after block of the left one's rows by it; for few rows the panel is read where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.cost import dense_rows
from sparse_tvm.schedules.cpu.families.product import FEW_ROWS
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    argument,
    prim_func,
    ramp,
    scalar,
    span,
    zero,
)
from sparse_tvm.schedules.cpu.simd import Simd, group_limit

_BLOCKS_PER_JOB = 16
_ANY = 1 << 10


@dataclass(frozen=True)
class Operand:
    """An operand ``[..., rows, columns]``, stored with its axes permuted.

    Attributes
    ----------
    shape : Sequence[int or expression]
        As it is stored.
    axes : Sequence[int]
        Which stored axis each logical one is.
    """

    shape: Sequence[Expr]
    axes: Sequence[int]

    @property
    def contiguous(self) -> bool:
        """Whether the elements of a logical row are neighbours."""
        return self.axes[-1] == len(self.axes) - 1

    def extent(self, axis: int) -> Expr:
        """Extent of a logical axis."""
        return self.shape[self.axes[axis]]

    def at(self, batch: Sequence[Expr], row: Expr, column: Expr) -> list[Expr]:
        """Stored indices of an element; extents of one broadcast over the batch."""
        rank = len(self.axes)
        lead = list(batch)[len(batch) - (rank - 2) :]
        logical = [
            0 if isinstance(self.extent(i), int) and self.extent(i) == 1 else lead[i]
            for i in range(rank - 2)
        ]
        stored: list[Expr] = [0] * rank
        for axis, index in zip(self.axes, [*logical, row, column], strict=True):
            stored[axis] = index
        return stored


def batch_matmul(a: Operand, b: Operand, out: Sequence[Expr], simd: Simd) -> tirx.PrimFunc:
    """Build the kernel a, b -> y of shape ``out``: ``[..., M, K] x [..., K, N]``."""
    m, k, n = out[-2], a.extent(-1), out[-1]
    few = isinstance(m, int) and m <= FEW_ROWS
    rows = m if few else dense_rows(_ANY, simd)
    height = rows * _BLOCKS_PER_JOB
    width = group_limit(rows, simd) * simd.per_tile * simd.lanes
    strips, panels = (m + (height - 1)) // height, (n + (width - 1)) // width

    with prim_func() as result:
        left, right = argument("a", a.shape), argument("b", b.shape)
        y = argument("y", out)

        def product(batch: list[Expr], row: Expr, count: Expr, column: Expr, live: Expr) -> None:
            """``count`` rows from ``row`` on, and the ``live`` columns from ``column`` on."""
            vectors = -(-live // simd.lanes) if isinstance(live, int) else width // simd.lanes
            in_place = few and b.contiguous and isinstance(live, int) and live % simd.lanes == 0
            if in_place:

                def load(at: Expr, vector: int) -> Expr:
                    lanes = ramp(column + vector * simd.lanes, simd)
                    return right[tuple(b.at(batch, at, lanes))]

            else:
                panel = T.alloc_buffer((k, vectors * simd.lanes), "float32")
                _pack(right, b, batch, k, column, live, panel, simd)

                def load(at: Expr, vector: int) -> Expr:
                    return panel[at, ramp(vector * simd.lanes, simd)]

            def block(first: Expr, size: int) -> None:
                acc = Registers(size, vectors, simd)
                acc.fill(lambda i, vector: zero(simd))
                with T.serial(0, k) as at:
                    acc.multiply_add(
                        lambda i: left[tuple(a.at(batch, row + first + i, at))],
                        lambda vector: load(at, vector),
                    )
                _store(y, batch, row + first, acc, column, live, simd)

            _in_blocks(count, rows, block)

        jobs = panels * strips
        for extent in out[:-2]:
            jobs = jobs * extent
        with T.parallel(0, jobs) as job:
            column = scalar(job % panels * width)
            row = scalar(job // panels % strips * height)
            index = scalar(job // (panels * strips))
            batch: list[Expr] = []
            for extent in reversed(out[:-2]):
                batch.insert(0, scalar(index % extent))
                index = scalar(index // extent)

            def rows_of(live: Expr) -> None:
                _in_parts(row, m, height, lambda count: product(batch, row, count, column, live))

            _in_parts(column, n, width, rows_of)
    return result["func"]


def _in_parts(start: Expr, extent: Expr, size: int, body: Callable[[Expr], None]) -> None:
    """Call ``body`` with how many there are from ``start`` on, at most ``size``."""
    if not isinstance(extent, int):
        body(scalar(tirx.min(size, extent - start)))
    elif extent <= size or extent % size == 0:
        body(min(extent, size))
    else:
        with T.If(start + size <= extent):
            with T.Then():
                body(size)
            with T.Else():
                body(extent % size)


def _in_blocks(count: Expr, size: int, body: Callable[[Expr, int], None]) -> None:
    """Call ``body(first, size)`` for all blocks, smaller ones at the end."""
    if isinstance(count, int):
        if count >= size:
            with T.serial(0, count // size) as i:
                body(i * size, size)
        if count % size:
            body(count // size * size, count % size)
        return
    with T.serial(0, count // size) as i:
        body(i * size, size)
    with T.serial(0, count % size) as i:
        body(count // size * size + i, 1)


def _pack(
    source: Buffer,
    b: Operand,
    batch: list[Expr],
    k: Expr,
    column: Expr,
    live: Expr,
    panel: Buffer,
    simd: Simd,
) -> None:
    """Copy ``live`` columns of the right operand, zeros behind them, into a panel."""
    width = int(panel.shape[1])
    with T.serial(0, k) as at:
        if not isinstance(live, int) or live < width:
            for start in range(0, width, simd.lanes):
                T.buffer_store(panel, zero(simd), [at, ramp(start, simd)])
        if isinstance(live, int):
            for start in range(0, live, simd.lanes):
                lanes = min(simd.lanes, live - start)
                with T.vectorized(0, lanes) as lane:
                    value = source[tuple(b.at(batch, at, column + (start + lane)))]
                    T.buffer_store(panel, value, [at, start + lane])
        else:
            with T.serial(0, live) as i:
                T.buffer_store(panel, source[tuple(b.at(batch, at, column + i))], [at, i])


def _store(
    y: Buffer,
    batch: list[Expr],
    row: Expr,
    acc: Registers,
    column: Expr,
    live: Expr,
    simd: Simd,
) -> None:
    """Store the ``live`` columns of a block of sums."""
    if isinstance(live, int) and live % simd.lanes == 0:
        for i in range(acc.rows):
            for vector in range(acc.vectors):
                at = ramp(column + vector * simd.lanes, simd)
                T.buffer_store(y, acc.get(i, vector), [*batch, row + i, at])
        return
    gathered = T.alloc_buffer((acc.vectors * simd.lanes,), "float32")
    for i in range(acc.rows):
        for vector in range(acc.vectors):
            at = ramp(vector * simd.lanes, simd)
            T.buffer_store(gathered, acc.get(i, vector), [at])
        if isinstance(live, int):
            for start in range(0, live, simd.lanes):
                lanes = min(simd.lanes, live - start)
                value = gathered[span(start, lanes)]
                T.buffer_store(y, value, [*batch, row + i, span(column + start, lanes)])
        else:
            with T.serial(0, live) as j:
                T.buffer_store(y, gathered[j], [*batch, row + i, column + j])
