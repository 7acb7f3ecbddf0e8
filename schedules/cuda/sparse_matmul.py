"""Dense layers with unstructured weights, on CUDA cores.

A thread block computes ``rows`` outputs of ``tokens`` tokens. It keeps activations in shared memory
as ``[column, token]``, some chunks of columns at a time. For every pair of a row, lanes read the
tokens at its column, eight a lane, and multiply-add in float32. Many tokens take eight lanes of a
warp, so that of each pair all banks are read once, and a warp has four rows; few tokens leave lanes
to share a row's pairs, and a warp sums what they found. At the end the sums go through shared
memory to the epilogue, which reads and writes rows of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.families import Extents
from sparse_tvm.operators import Bias, Epilogue
from sparse_tvm.schedules.cuda import instructions
from sparse_tvm.schedules.cuda.build import (
    argument,
    flat,
    local,
    prim_func,
    size_of,
    symbol,
    tensor,
)
from sparse_tvm.schedules.cuda.epilogue import epilogue_value
from sparse_tvm.schedules.cuda.sparse_rows import AHEAD, VECTOR, WINDOW, RowTile, chunks_of

Expr = Any
Buffer = Any

_COLUMNS = 8
"""Columns that a thread transposes at a time, of two tokens."""

_COPIES = 4
"""Of these, how many a thread has in flight."""


@dataclass(frozen=True)
class SparseProblem:
    """One kernel.

    Attributes
    ----------
    outputs, inputs : int
        N and K.
    x, y : Extents
        Activations ``[..., K]`` and the output ``[..., N]``, whose rows are the same.
    extras : tuple[Extents, ...]
        What the epilogue reads.
    tile : RowTile
        Who computes what.
    epilogue : tuple[Step, ...]
        Behind the sums.
    """

    outputs: int
    inputs: int
    x: Extents
    extras: tuple[Extents, ...]
    y: Extents
    tile: RowTile
    epilogue: Epilogue

    @property
    def slots(self) -> int:
        """Places of rows."""
        return -(-self.outputs // WINDOW) * WINDOW

    @property
    def chunks(self) -> int:
        """Chunks of all columns."""
        return chunks_of(self.inputs)[0]


def sparse_matmul(problem: SparseProblem) -> tirx.PrimFunc:
    """The kernel: x, the weight's arrays, the epilogue's operands, y."""
    return _SparseMatmul(problem).build()


class _SparseMatmul:
    def __init__(self, problem: SparseProblem) -> None:
        self.problem, self.tile = problem, problem.tile

    def build(self) -> tirx.PrimFunc:
        p, tile = self.problem, self.tile
        with prim_func() as result:
            x = tensor("x", p.x)
            vectors = symbol("vectors")
            pairs = argument("pairs", (vectors, VECTOR), "uint32")
            self.order = argument("order", (p.slots,), "int32")
            self.starts = argument("starts", (p.slots * p.chunks + 1,), "int32")
            extras = [tensor(f"extra_{i}", extents) for i, extents in enumerate(p.extras)]
            y = tensor("y", p.y)
            self.tokens = tokens = size_of(x.shape[:-1])
            words = tokens * (p.inputs // 2)
            self.x = T.decl_buffer((words,), "uint32", data=x.data)
            self.pairs = flat(pairs, vectors * VECTOR)
            self.y = flat(y, tokens * p.outputs)
            self.extras = [e if len(e.shape) == 1 else flat(e, tokens * p.outputs) for e in extras]
            groups, blocks = -(-p.slots // tile.rows), (tokens + (tile.tokens - 1)) // tile.tokens
            with (
                T.launch_thread("blockIdx.x", groups) as group,
                T.launch_thread("blockIdx.y", blocks) as block,
                T.launch_thread("threadIdx.x", tile.threads) as thread,
            ):
                instructions.await_previous()
                self._body(group, block, thread)
        return result["func"]

    def _body(self, group: Expr, block: Expr, thread: Expr) -> None:
        p, tile = self.problem, self.tile
        self.thread, self.warp, lane = thread, thread // 32, thread % 32
        self.token_lane = lane % tile.token_lanes
        self.value_lane = lane // tile.token_lanes % tile.value_lanes
        self.row_lane = lane // tile.token_lanes // tile.value_lanes
        self.first_slot, self.first_token = group * tile.rows, block * tile.tokens
        self.shared = T.alloc_buffer((tile.shared_bytes // 4,), "uint32", scope="shared.dyn")
        self.sums = local(tile.bundles * tile.each, "float32")
        for i in range(tile.bundles * tile.each):
            T.buffer_store(self.sums, T.float32(0), [i])
        for chunk in range(0, p.chunks, tile.chunks):
            count = min(tile.chunks, p.chunks - chunk)
            first = chunk * tile.columns
            if chunk:
                instructions.barrier()
            self._keep_activations(first, min(count * tile.columns, p.inputs - first))
            instructions.barrier()
            for bundle in range(tile.bundles):
                self._multiply(bundle, chunk, count)
        self._keep_sums()
        self._write_outputs()

    def _keep_activations(self, first: int, columns: int) -> None:
        """Store columns of the block's tokens as ``[column, token]``, two tokens a word."""
        tile = self.tile
        words = tile.tokens // 2
        items, threads = columns // _COLUMNS * words, tile.threads
        in_flight = min(_COPIES, -(-items // threads))

        def each(start: Expr) -> None:
            numbers = [start + i * threads + self.thread for i in range(in_flight)]
            read = [[local(_COLUMNS // 2, "uint32") for _ in range(2)] for _ in numbers]
            for number, tokens in zip(numbers, read, strict=True):
                for which, kept in enumerate(tokens):
                    column = first + number // words * _COLUMNS
                    token = self.first_token + number % words * 2 + which
                    self._read(kept, token, column, number < items)
            for number, (low, high) in zip(numbers, read, strict=True):
                with T.If(number < items), T.Then():
                    at = number // words * _COLUMNS * words + number % words
                    self._store_transposed(low, high, at)

        with T.serial(0, -(-items // (threads * in_flight))) as turn:
            each(turn * (threads * in_flight))

    def _read(self, kept: Buffer, token: Expr, column: Expr, valid: Expr) -> None:
        """Read eight columns of a token, zeros beyond the last one."""
        lanes = T.ramp(0, 1, _COLUMNS // 2)
        valid = tirx.all(valid, token < self.tokens)
        with T.If(valid):
            with T.Then():
                at = (token * self.problem.inputs + column) // 2
                T.buffer_store(kept, self.x[T.ramp(at, 1, _COLUMNS // 2)], [lanes])
            with T.Else():
                T.buffer_store(kept, T.broadcast(T.uint32(0), _COLUMNS // 2), [lanes])

    def _store_transposed(self, low: Buffer, high: Buffer, at: Expr) -> None:
        words = self.tile.tokens // 2
        for i in range(_COLUMNS // 2):
            a, b = low[i], high[i]
            even = (a & T.uint32(0xFFFF)) | (b << T.uint32(16))
            odd = (a >> T.uint32(16)) | (b & T.uint32(0xFFFF0000))
            T.buffer_store(self.shared, even, [at + 2 * i * words])
            T.buffer_store(self.shared, odd, [at + (2 * i + 1) * words])

    def _slot(self, bundle: int) -> Expr:
        """Which of the block's rows a lane sums; every other bundle goes backwards.

        Rows are sorted by length, so that warps come out even.
        """
        tile = self.tile
        warp = self.warp if bundle % 2 == 0 else tile.warps - 1 - self.warp
        return (bundle * tile.warps + warp) * tile.row_lanes + self.row_lane

    def _multiply(self, bundle: int, chunk: int, count: int) -> None:
        """Multiply-add what rows have in the chunks that are in shared memory."""
        p, tile = self.problem, self.tile
        slot = self.first_slot + self._slot(bundle)
        part = tirx.min(slot, p.slots - 1) * p.chunks + chunk
        start, end = self.starts[part], self.starts[part + count]
        steps = (end - start - self.value_lane + (tile.value_lanes - 1)) // tile.value_lanes
        loaded = [local(VECTOR, "uint32") for _ in range(AHEAD + 1)]
        # Offsets in words: of the tokens of a lane, and of a column from the first that is there.
        words, each = tile.tokens // 2, tile.each // 2
        base = self.token_lane * each - chunk * tile.columns * words

        def load(to: Buffer, step: Expr) -> None:
            at = (start + self.value_lane + step * tile.value_lanes) * VECTOR
            lanes = T.ramp(0, 1, VECTOR)
            T.buffer_store(to, self.pairs[T.ramp(at, 1, VECTOR)], [lanes])

        with T.If(slot < p.slots), T.Then():
            for i in range(AHEAD):
                load(loaded[i], i)
            with T.serial(0, tirx.max(steps, 0)) as step:
                load(loaded[AHEAD], step + AHEAD)
                for i in range(VECTOR):
                    pair = loaded[0][i]
                    column = tirx.Cast("int32", pair >> T.uint32(16))
                    x = instructions.address(self.shared, base + column * words)
                    first, dtype = bundle * tile.each, p.x.dtype
                    instructions.multiply_add(self.sums, first, tile.each, x, pair, dtype)
                for here, ahead in pairwise(loaded):
                    for i in range(VECTOR):
                        T.buffer_store(here, ahead[i], [i])

    def _keep_sums(self) -> None:
        """Store the sums as ``[token, slot]`` in shared memory."""
        tile = self.tile
        instructions.barrier()
        self.kept = T.decl_buffer(
            (tile.tokens * tile.sum_stride,),
            "float32",
            data=self.shared.data,
            scope="shared.dyn",
        )
        distance = tile.token_lanes
        while distance < tile.token_lanes * tile.value_lanes:
            for i in range(tile.bundles * tile.each):
                instructions.add_lanes(self.sums, i, distance)
            distance *= 2
        with T.If(self.value_lane == 0), T.Then():
            for bundle in range(tile.bundles):
                for i in range(tile.each):
                    token = self.token_lane * tile.each + i
                    at = token * tile.sum_stride + self._slot(bundle)
                    T.buffer_store(self.kept, self.sums[bundle * tile.each + i], [at])
        instructions.barrier()

    def _write_outputs(self) -> None:
        """Apply the epilogue and store, neighbouring threads outputs of one sector."""
        p, tile = self.problem, self.tile
        reading = [step for step in p.epilogue if step.operand]

        def write(number: Expr) -> None:
            token, slot = number // tile.rows, number % tile.rows
            place = tirx.min(self.first_slot + slot, p.slots - 1)
            output, where = self.order[place], self.first_token + token
            there = tirx.all(self.first_slot + slot < p.slots, output < p.outputs)
            with T.If(tirx.all(there, where < self.tokens)), T.Then():
                at = where * p.outputs + output
                operands = [
                    buffer[output] if isinstance(step, Bias) else buffer[at]
                    for step, buffer in zip(reading, self.extras, strict=True)
                ]
                total = self.kept[token * tile.sum_stride + slot]
                value = epilogue_value(total, p.epilogue, operands, p.y.dtype)
                T.buffer_store(self.y, value, [at])

        self._shared_out(tile.rows * tile.tokens, write)

    def _shared_out(self, count: int, body: Callable[[Expr], None]) -> None:
        """Call ``body`` for so many numbers, each by one thread of the block."""
        threads = self.tile.threads
        with T.serial(0, -(-count // threads)) as turn:
            number = turn * threads + self.thread
            if count % threads == 0:
                body(number)
            else:
                with T.If(number < count), T.Then():
                    body(number)
