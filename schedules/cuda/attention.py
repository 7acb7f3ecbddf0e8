"""Attention on tensor cores, its scores in registers from the first product to the second.

A thread block computes one head of some queries, sixteen of them each warp. It walks through the
keys, :data:`KEYS` at a time, of which the next are copied to shared memory meanwhile. A warp's
scores, the first product's sums, are lined up as the second product's first factor is: each thread
has what it needs, and the soft-max only compares four neighbours. The soft-max is made as the keys
come: where a larger score shows up, what was summed so far is scaled down.

Powers are of two, so scores are multiplied by its logarithm's inverse along with their scale. Rows
of heads lie in shared memory an odd number of 16 bytes apart, so that eight of them are in
different banks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import e, inf, log2
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.families import Extents
from sparse_tvm.operators import Attention
from sparse_tvm.schedules.cuda import instructions
from sparse_tvm.schedules.cuda.build import Registers, flat, prim_func, registers, size_of, tensor

Expr = Any
Buffer = Any

KEYS = 64
"""Keys that are multiplied at a time, at most."""

_LOG2E = log2(e)
_LOWEST = float(np.finfo(np.float32).min)
_ALMOST_LOWEST = -1e38
"""Below this a mask only says "not this one"; multiplied it would become an infinity."""

_PROCESSORS = 108
_QUERIES = 64


@dataclass(frozen=True)
class AttentionProblem:
    """One kernel.

    Attributes
    ----------
    op : Attention
        With the sizes of its heads.
    q, k, v : Extents
        float16, or bfloat16, ``[batch, rows, features]``, features being those of all heads or
        more.
    mask : Extents | None
        float32, extents 1 where the operator's mask has none.
    y : Extents
        ``[batch, queries, heads * value size]``, of that type or float32.
    """

    op: Attention
    q: Extents
    k: Extents
    v: Extents
    mask: Extents | None
    y: Extents

    @property
    def sizes(self) -> tuple[int, int]:
        """Features of a head of q and k, and of v."""
        assert self.op.sizes is not None
        return self.op.sizes

    @property
    def dtype(self) -> str:
        """What is multiplied."""
        return self.q.dtype

    @property
    def queries(self) -> int:
        """Queries of a thread block: as many as leave no processor of a usual device idle."""
        batch, rows, _ = self.q.shape
        if rows is None or batch is None:
            return _QUERIES
        largest = 64 if max(self.sizes) > 64 or self.row_mask else 128
        sizes = [size for size in (128, 64, 32, 16) if size <= largest and size < 2 * rows]
        count = batch * self.op.heads
        busy = (size for size in sizes if count * -(-rows // size) >= _PROCESSORS)
        return next(busy, min(sizes[0], 32) if sizes else 16)

    @property
    def keys(self) -> int:
        """Keys that are multiplied at a time."""
        rows = self.k.shape[1]
        return KEYS if rows is None else min(KEYS, -(-rows // 16) * 16)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 2 * self.queries

    @property
    def resident(self) -> int:
        """Thread blocks that share a processor's registers; with more of them, some would spill."""
        if self.queries > 64:
            return 2
        return (2 if max(self.sizes) > 64 else 3) * 64 // self.queries

    @property
    def row_mask(self) -> bool:
        """Whether each query has a mask of its own, which takes registers."""
        return self.op.mask is not None and self.op.mask[2]

    @property
    def query_stride(self) -> int:
        """Chunks of 16 bytes from query to query, whose rows the outputs take in the end."""
        return max(map(_chunks, self.sizes)) + 1

    @property
    def stage_chunks(self) -> int:
        """Chunks of the keys and values of one step."""
        return self.keys * sum(_chunks(size) + 1 for size in self.sizes)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return 16 * (self.queries * self.query_stride + 2 * self.stage_chunks)


def attention(problem: AttentionProblem) -> tirx.PrimFunc:
    """The kernel: q, k, v, the mask if any, y."""
    return _AttentionKernel(problem).build()


class _AttentionKernel:
    def __init__(self, problem: AttentionProblem) -> None:
        self.problem, self.op = problem, problem.op
        self.axes = problem.op.mask or (False,) * 4
        self.steps, self.value_steps = (_chunks(size) // 2 for size in problem.sizes)

    def build(self) -> tirx.PrimFunc:
        p = self.problem
        with prim_func() as result:
            q, k, v = tensor("q", p.q), tensor("k", p.k), tensor("v", p.v)
            mask = tensor("mask", p.mask) if p.mask is not None else None
            y = tensor("y", p.y)
            self.mask_shape = tuple(mask.shape) if mask is not None else ()
            self.mask: Buffer = flat(mask, size_of(mask.shape)) if mask is not None else None
            (batch, self.queries, _), self.keys = q.shape, k.shape[1]
            self.features = [array.shape[2] for array in (q, k, v)]
            self.q, self.k, self.v = (flat(array, size_of(array.shape)) for array in (q, k, v))
            self.y, size = y, size_of(y.shape)
            self.flat_y = flat(y, size)
            if p.y.dtype == p.dtype:
                self.y_words = T.decl_buffer((size // 2,), "uint32", data=y.data)
            blocks = (self.queries + (p.queries - 1)) // p.queries
            with (
                T.launch_thread("blockIdx.x", batch * self.op.heads * blocks) as block,
                T.launch_thread("threadIdx.x", p.threads) as thread,
            ):
                self.first = block % blocks * p.queries
                self.head = block // blocks % self.op.heads
                self.batch = block // (blocks * self.op.heads)
                self.thread, self.lane, self.warp = thread, thread % 32, thread // 32
                with T.attr(block, "tirx.launch_bounds_min_blocks_per_sm", p.resident):
                    self._body()
        return result["func"]

    def _body(self) -> None:
        p = self.problem
        instructions.await_previous()
        self.shared = T.alloc_buffer((p.shared_bytes // 4,), "uint32", scope="shared.dyn")
        self._copy_rows(0, p.query_stride, p.queries, self.q, 0, self.first, self.queries)
        self._copy_keys(0, 0)
        instructions.commit()
        self._start()
        steps = (self.keys + (p.keys - 1)) // p.keys
        with T.serial(0, steps) as i:
            with T.If(i + 1 < steps), T.Then():
                self._copy_keys(i + 1, (i + 1) % 2)
            instructions.commit()
            instructions.wait(1)
            instructions.barrier()
            self._score(i % 2)
            self._scale(i)
            self._soften()
            self._weigh(i % 2)
            instructions.barrier()
        self._finish()

    def _start(self) -> None:
        """Registers: of each thread two rows of scores, of outputs, of their largest and sum."""
        p = self.problem
        self.scores, self.output, self.top, self.total, self.highest, self.addend = registers(
            "float32", p.keys // 2, self.value_steps * 8, 2, 2, 2, 1
        )
        self.factor, self.words = registers("uint32", 4, 4)
        for i in range(self.value_steps * 8):
            self.output.store(i, T.float32(0))
        for i in range(2):
            self.top.store(i, T.float32(_LOWEST))
            self.total.store(i, T.float32(0))

    def _copy_keys(self, step: Expr, stage: Expr) -> None:
        """Copy the keys and values of a step to shared memory."""
        p = self.problem
        at = p.queries * p.query_stride + stage * p.stage_chunks
        key_stride, value_stride = (_chunks(size) + 1 for size in p.sizes)
        first = step * p.keys
        self._copy_rows(at, key_stride, p.keys, self.k, 1, first, self.keys)
        at += p.keys * key_stride
        self._copy_rows(at, value_stride, p.keys, self.v, 2, first, self.keys)

    def _copy_rows(
        self, at: Expr, stride: int, count: int, array: Buffer, which: int, first: Expr, rows: Expr
    ) -> None:
        """Copy ``count`` rows of the head, zeros beyond the last of them and its features."""
        size = self.problem.sizes[which == 2]
        chunks = _chunks(size)

        def copy(number: Expr) -> None:
            row, part = number // chunks, number % chunks
            valid = first + row < rows
            if chunks * 8 != size:
                valid = tirx.all(valid, part * 8 < size)
            source = (self.batch * rows + first + row) * self.features[which]
            source += self.op.starts[which] + self.head * size + part * 8
            source = tirx.if_then_else(valid, source, 0)
            there = instructions.address(array, source)
            instructions.copy16(self._address(at + row * stride + part), there, valid)

        self._shared_out(count * chunks, copy)

    def _shared_out(self, count: int, body: Callable[[Expr], None]) -> None:
        """Call ``body`` for so many numbers, each by one thread of the block."""
        threads = self.problem.threads
        for turn in range(-(-count // threads)):
            number = self.thread + turn * threads
            if (turn + 1) * threads <= count:
                body(number)
            else:
                with T.If(number < count), T.Then():
                    body(number)

    def _address(self, chunk: Expr) -> Expr:
        return instructions.address(self.shared, chunk * 4)

    def _row(self, half: int) -> Expr:
        """The query of a thread's first or second row."""
        return self.first + self.warp * 16 + self.lane // 4 + 8 * half

    def _key(self, step: Expr, column: int) -> Expr:
        """The key of a thread's score in a row."""
        return step * self.problem.keys + column // 2 * 8 + self.lane % 4 * 2 + column % 2

    def _outside(self, key: Expr) -> Expr:
        """Whether a key is beyond the last; False where none can be."""
        known = self.problem.k.shape[1]
        return False if known is not None and known % self.problem.keys == 0 else key >= self.keys

    def _scale(self, step: Expr) -> None:
        """Scale the scores, add the mask, and let none be of a key beyond the last."""
        scale = T.float32(self.op.scale * _LOG2E)
        for column in range(self.problem.keys // 4):
            key = self._key(step, column)
            outside = self._outside(key)
            for half in range(2):
                place = self._place(half, column)
                if self.mask is not None:
                    if half == 0 or self.axes[2]:
                        self._load_addend(half, key, outside)
                    self.scores.store(place, self.scores[place] * scale + self.addend[0])
                    continue
                score = self.scores[place] * scale
                if outside is not False:
                    score = tirx.Select(outside, T.float32(-inf), score)
                self.scores.store(place, score)

    def _load_addend(self, half: int, key: Expr, outside: Expr) -> None:
        """What the mask adds, times the logarithm of e."""
        row = tirx.min(self._row(half), self.queries - 1)
        at: Expr = 0
        places = (self.batch, self.head, row, key)
        for index, extent in zip(places, self._mask_axes(), strict=True):
            at = at if extent is None else at * extent + index
        found = self.mask[at]
        if outside is not False:
            found = tirx.if_then_else(outside, T.float32(-inf), found)
        self.addend.store(0, found)
        plain = self.addend[0] > T.float32(_ALMOST_LOWEST)
        scaled = self.addend[0] * T.float32(_LOG2E)
        self.addend.store(0, tirx.Select(plain, scaled, self.addend[0]))

    def _place(self, half: int, column: int) -> int:
        """Where a score of a thread's first or second row lies."""
        return column // 2 * 4 + half * 2 + column % 2

    def _mask_axes(self) -> list[Expr | None]:
        """Extents of the mask, None where it is broadcast."""
        return [n if has else None for n, has in zip(self.mask_shape, self.axes, strict=True)]

    def _score(self, stage: Expr) -> None:
        """A warp's scores of the keys of a step."""
        p = self.problem
        stride = _chunks(p.sizes[0]) + 1
        first = p.queries * p.query_stride + stage * p.stage_chunks
        for i in range(p.keys // 2):
            self.scores.store(i, T.float32(0))
        query = self.warp * 16 + self.lane % 16
        for step in range(self.steps):
            at = query * p.query_stride + step * 2 + self.lane // 16
            _load(instructions.load_matrices, self.factor, self._address(at))
            for pair in range(p.keys // 16):
                row = pair * 16 + self.lane // 16 * 8 + self.lane % 8
                at = first + row * stride + step * 2 + self.lane // 8 % 2
                _load(instructions.load_matrices, self.words, self._address(at))
                for i in range(2):
                    self._product(self.scores, pair * 2 + i, i)

    def _soften(self) -> None:
        """Turn the scores into powers, and scale what was summed before by the larger maximum."""
        for half in range(2):
            places = [self._place(half, column) for column in range(self.problem.keys // 4)]
            highest, shrunk = self.highest[0], self.highest[1]
            self.highest.store(0, self.top[half])
            for place in places:
                self.highest.store(0, tirx.max(highest, self.scores[place]))
            self.highest.store(0, instructions.value("quad_max", highest))
            self.highest.store(1, _exp2(self.top[half] - highest))
            self.top.store(half, highest)
            self.total.store(half, self.total[half] * shrunk)
            for place in places:
                self.scores.store(place, _exp2(self.scores[place] - highest))
                self.total.store(half, self.total[half] + self.scores[place])
            for group in range(self.value_steps * 2):
                for i in range(2):
                    place = group * 4 + half * 2 + i
                    self.output.store(place, self.output[place] * shrunk)

    def _weigh(self, stage: Expr) -> None:
        """Add the values, weighted by the powers."""
        p = self.problem
        key_stride, stride = (_chunks(size) + 1 for size in p.sizes)
        first = p.queries * p.query_stride + stage * p.stage_chunks + p.keys * key_stride
        for step in range(p.keys // 16):
            for i in range(4):
                a, b = (self.scores[step * 8 + i * 2 + j] for j in range(2))
                self.factor.store(i, instructions.pack(a, b, p.dtype))
            for pair in range(self.value_steps):
                row = step * 16 + self.lane % 16
                at = first + row * stride + pair * 2 + self.lane // 16
                _load(instructions.load_transposed, self.words, self._address(at))
                for i in range(2):
                    self._product(self.output, pair * 2 + i, i)

    def _product(self, sums: Registers, group: int, which: int) -> None:
        """Add a product to the sums of eight columns."""
        a, b = self.factor, self.words
        instructions.multiply(
            sums.buffer,
            sums.first + group * 4,
            a.buffer,
            a.first,
            b.buffer,
            b.first + which * 2,
            self.problem.dtype,
        )

    def _finish(self) -> None:
        """Divide by the sums of the powers, and store."""
        for half in range(2):
            total = instructions.value("quad_sum", self.total[half])
            # The largest score's power is 1, so only a query without any key has a sum of 0.
            self.total.store(half, T.float32(1) / tirx.max(total, T.float32(1e-30)))
        if self.problem.y.dtype == self.problem.dtype:
            self._write_halves()
        else:
            self._write_floats()

    def _outputs(self, half: int, group: int) -> list[Expr]:
        """Two neighbouring outputs of one of a thread's rows."""
        return [self.output[group * 4 + half * 2 + i] * self.total[half] for i in range(2)]

    def _write_floats(self) -> None:
        size = self.problem.sizes[1]
        for half in range(2):
            for group in range(-(-size // 8)):
                for i, value in enumerate(self._outputs(half, group)):
                    at = (self.batch * self.queries + self._row(half)) * (self.op.heads * size)
                    at += self.head * size + group * 8 + self.lane % 4 * 2 + i
                    with T.If(self._row(half) < self.queries), T.Then():
                        T.buffer_store(self.flat_y, value, [at])

    def _write_halves(self) -> None:
        """Through shared memory, where the queries were, so that threads store 16 bytes each."""
        p = self.problem
        chunks = p.sizes[1] // 8
        for half in range(2):
            row = self.warp * 16 + self.lane // 4 + half * 8
            for group in range(chunks):
                at = (row * p.query_stride + group) * 4 + self.lane % 4
                first, second = self._outputs(half, group)
                word = instructions.pack(first, second, p.dtype)
                T.buffer_store(self.shared, word, [at])
        instructions.barrier()

        def store(number: Expr) -> None:
            row, part = number // chunks, number % chunks
            with T.If(self.first + row < self.queries), T.Then():
                source = (row * p.query_stride + part) * 4
                at = (self.batch * self.queries + self.first + row) * (self.op.heads * chunks)
                at = (at + self.head * chunks + part) * 4
                words = self.shared[T.ramp(source, 1, 4)]
                T.buffer_store(self.y_words, words, [T.ramp(at, 1, 4)])

        self._shared_out(p.queries * chunks, store)


def _chunks(size: int) -> int:
    """Chunks of 16 bytes that a head's features take, filled up to the sixteen of a product."""
    return -(-size // 16) * 2


def _exp2(x: Expr) -> Expr:
    return instructions.value("exp2", x)


def _load(load: Callable[..., None], words: Registers, address: Expr) -> None:
    load(words.buffer, words.first, address)
