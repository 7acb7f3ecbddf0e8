"""Dense layers on tensor cores: the weight dense, in blocks, or 2:4.

The weight is the first factor of ``mma.sync``, so its rows, the outputs, come in sixteens and
tokens in eights. A thread block computes ``rows`` outputs of ``tokens`` tokens. It walks through
steps of 32 columns of the weight: all of them, or those with stored blocks, whose columns of the
activations it gathers. Copies to shared memory run some steps ahead. The weight lies in memory in
the order of registers (see :mod:`.fragments`); activations are swizzled so that no two of eight
rows share a bank. At the end the sums go through shared memory to the epilogue, which reads and
writes rows of tokens.

Dense is the same kernel with every block present.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.families import Extents
from sparse_tvm.operators import Bias, Epilogue, Layout, Step
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
from sparse_tvm.schedules.cuda.fragments import ROWS, STEP
from sparse_tvm.schedules.cuda.tiles import Tile
from sparse_tvm.schedules.cuda.weights import pieces_per_step

Expr = Any
Buffer = Any

_CHUNKS = STEP * 2 // 16
"""Chunks of 16 bytes in one token's part of a step."""

_FRAGMENT_WORDS = 128


@dataclass(frozen=True)
class Problem:
    """One kernel.

    Attributes
    ----------
    outputs, inputs : int
        N and K.
    x, y : Extents
        Activations ``[..., K]`` and the output ``[..., N]``, whose rows are the same.
    extras : tuple[Extents, ...]
        What the epilogue reads.
    layout : Layout
        The weight's.
    tile : Tile
        Who computes what.
    epilogue : tuple[Step, ...]
        Behind the sums.
    """

    outputs: int
    inputs: int
    x: Extents
    extras: tuple[Extents, ...]
    y: Extents
    layout: Layout
    tile: Tile
    epilogue: Epilogue

    @property
    def structured(self) -> bool:
        """Whether the weight is 2:4."""
        return self.layout.format == "2:4"

    @property
    def groups(self) -> int:
        """Thread blocks along the outputs."""
        return -(-self.outputs // self.tile.rows)

    @property
    def fragments(self) -> int:
        """Fragments along the outputs."""
        return -(-self.outputs // ROWS)

    @property
    def steps(self) -> int:
        """Steps of all columns."""
        return -(-self.inputs // STEP)

    @property
    def row_words(self) -> int:
        """Words of sixteen rows of a step."""
        return _FRAGMENT_WORDS if self.structured else 2 * _FRAGMENT_WORDS

    @property
    def weight_words(self) -> int:
        """Words of a step of one thread block's weight."""
        return self.tile.rows // ROWS * self.row_words


def tensor_matmul(problem: Problem) -> tirx.PrimFunc:
    """The kernel: x, the weight's arrays, the epilogue's operands, y."""
    return _Matmul(problem).build()


class _Matmul:
    def __init__(self, problem: Problem) -> None:
        self.problem, self.tile = problem, problem.tile

    def build(self) -> tirx.PrimFunc:
        p, tile = self.problem, self.tile
        with prim_func() as result:
            x = tensor("x", p.x)
            weight = self._weight_arguments()
            extras = [tensor(f"extra_{i}", extents) for i, extents in enumerate(p.extras)]
            y = tensor("y", p.y)
            self.tokens = tokens = size_of(x.shape[:-1])
            self.x, self.y = flat(x, tokens * p.inputs), flat(y, tokens * p.outputs)
            self.weight = {n: flat(array, size_of(array.shape)) for n, array in weight.items()}
            self.extras = [
                extra if len(extra.shape) == 1 else flat(extra, tokens * p.outputs)
                for extra in extras
            ]
            blocks = (tokens + (tile.tokens - 1)) // tile.tokens
            with (
                T.launch_thread("blockIdx.x", p.groups) as group,
                T.launch_thread("blockIdx.y", blocks) as block,
                T.launch_thread("threadIdx.x", tile.threads) as thread,
            ):
                instructions.await_previous()
                self._body(group, block, thread)
        return result["func"]

    def _reading(self) -> list[Step]:
        return [step for step in self.problem.epilogue if step.operand]

    def _weight_arguments(self) -> dict[str, Buffer]:
        p = self.problem
        shape = (32, 4) if p.structured else (2, 32, 4)
        if p.layout.format == "bsr":
            steps = symbol("steps")
            return {
                "data": argument("data", (steps, p.tile.rows // ROWS, *shape), "uint32"),
                "columns": argument("columns", (steps, pieces_per_step(p.layout)), "int32"),
                "indptr": argument("indptr", (p.groups + 1,), "int32"),
            }
        arrays = {"data": argument("data", (p.fragments, p.steps, *shape), "uint32")}
        if p.structured:
            arrays["places"] = argument("places", (p.fragments, p.steps, ROWS), "uint32")
        return arrays

    def _body(self, group: Expr, block: Expr, thread: Expr) -> None:
        p, tile = self.problem, self.tile
        words = tile.shared_bytes(p.structured) // 4
        self.shared = T.alloc_buffer((words,), "uint32", scope="shared.dyn")
        self.group, self.thread = group, thread
        self.first_token = block * tile.tokens
        self.lane, warp = thread % 32, thread // 32
        self.row_warp, self.token_warp = warp % tile.row_warps, warp // tile.row_warps
        self.sums = local(tile.fragments * tile.columns * 4, "float32")
        for i in range(tile.fragments * tile.columns * 4):
            T.buffer_store(self.sums, T.float32(0), [i])
        if p.layout.format == "bsr":
            first = self.weight["indptr"][group]
            self._pipeline(first, self.weight["indptr"][group + 1] - first)
        else:
            self._pipeline(0, p.steps)
        self._keep_sums()
        self._write_outputs()

    def _pipeline(self, first: Expr, count: Expr) -> None:
        ahead = self.tile.stages - 1
        for stage in range(ahead):
            with T.If(count > stage), T.Then():
                self._copy(first + stage, stage)
            instructions.commit()
        with T.serial(0, count) as i:
            instructions.wait(ahead - 1)
            instructions.barrier()
            with T.If(i + ahead < count), T.Then():
                self._copy(first + i + ahead, (i + ahead) % self.tile.stages)
            instructions.commit()
            self._multiply(i % self.tile.stages)
        instructions.wait(0)
        instructions.barrier()

    def _stage(self, stage: Expr) -> Expr:
        """First word of a stage: activations, the weight, places."""
        return stage * (self.tile.stage_bytes(self.problem.structured) // 4)

    def _weight_at(self, stage: Expr) -> Expr:
        return self._stage(stage) + self.tile.tokens * STEP // 2

    def _places_at(self, stage: Expr) -> Expr:
        return self._weight_at(stage) + self.problem.weight_words

    def _copy(self, step: Expr, stage: Expr) -> None:
        """Copy what a step needs to shared memory."""
        p, tile = self.problem, self.tile

        def activations(chunk: Expr) -> None:
            row, part = chunk // _CHUNKS, chunk % _CHUNKS
            column = self._column(step, part)
            token = self.first_token + row
            valid = tirx.all(token < self.tokens, column < p.inputs)
            at = self._stage(stage) + row * (STEP // 2) + _swizzled(row, part) * 4
            self._copy16(at, self.x, token * p.inputs + column, valid)

        def rows(array: Buffer, words: int, to: Expr) -> Callable[[Expr], None]:
            """Copies ``words`` of a step for each sixteen rows."""

            def copy(chunk: Expr) -> None:
                if p.layout.format == "bsr":
                    source = step * p.weight_words + chunk * 4
                    self._copy16(to + chunk * 4, array, source, True)
                    return
                fragment = self.group * (tile.rows // ROWS) + chunk * 4 // words
                source = (fragment * p.steps + step) * words + chunk * 4 % words
                self._copy16(to + chunk * 4, array, source, fragment < p.fragments)

            return copy

        self._shared_out(tile.tokens * _CHUNKS, activations)
        weight = rows(self.weight["data"], p.row_words, self._weight_at(stage))
        self._shared_out(p.weight_words // 4, weight)
        if p.structured:
            places = rows(self.weight["places"], ROWS, self._places_at(stage))
            self._shared_out(tile.rows // 4, places)

    def _copy16(self, to: Expr, array: Buffer, source: Expr, valid: Expr) -> None:
        """Copy 16 bytes, or zeros where the source is none of the array's."""
        if valid is True:
            valid = tirx.const(True)
        else:
            source = tirx.if_then_else(valid, source, 0)
        there, here = instructions.address(array, source), instructions.address(self.shared, to)
        instructions.copy16(here, there, valid)

    def _column(self, step: Expr, part: Expr) -> Expr:
        """Column of the activations that a chunk of a step begins with."""
        p = self.problem
        if p.layout.format != "bsr":
            return step * STEP + part * 8
        pieces = pieces_per_step(p.layout)
        chunks = _CHUNKS // pieces
        return self.weight["columns"][step * pieces + part // chunks] + part % chunks * 8

    def _shared_out(self, count: int, body: Callable[[Expr], None]) -> None:
        """Call ``body`` for so many numbers, each by one thread of the block."""
        threads = self.tile.threads
        for turn in range(-(-count // threads)):
            number = self.thread + turn * threads
            if (turn + 1) * threads <= count:
                body(number)
            else:
                with T.If(number < count), T.Then():
                    body(number)

    def _multiply(self, stage: Expr) -> None:
        """Multiply one step: all fragments of a warp by all its groups of eight tokens."""
        p, tile = self.problem, self.tile
        tokens = local(tile.columns * 4, "uint32")
        for column in range(tile.columns):
            row = (self.token_warp * tile.columns + column) * 8 + self.lane % 8
            at = self._stage(stage) + row * (STEP // 2) + _swizzled(row, self.lane // 8) * 4
            instructions.load_matrices(tokens, column * 4, instructions.address(self.shared, at))
        weight = local(4, "uint32")
        for fragment in range(tile.fragments):
            which = self.row_warp * tile.fragments + fragment
            if p.structured:
                self._load(weight, self._weight_at(stage) + which * _FRAGMENT_WORDS)
                place = self._places_at(stage) + which * ROWS + self.lane // 4 * 2 + self.lane % 2
                places = local(1, "uint32")
                T.buffer_store(places, self.shared[place], [0])
                for column in range(tile.columns):
                    instructions.multiply_2_of_4(
                        self.sums,
                        self._sum(fragment, column),
                        weight,
                        0,
                        tokens,
                        column * 4,
                        places[0],
                        p.x.dtype,
                    )
                continue
            for half in range(2):
                self._load(weight, self._weight_at(stage) + (which * 2 + half) * _FRAGMENT_WORDS)
                for column in range(tile.columns):
                    instructions.multiply(
                        self.sums,
                        self._sum(fragment, column),
                        weight,
                        0,
                        tokens,
                        column * 4 + half * 2,
                        p.x.dtype,
                    )

    def _load(self, words: Buffer, first: Expr) -> None:
        """Load a thread's four words of a fragment."""
        lanes = T.ramp(first + self.lane * 4, 1, 4)
        T.buffer_store(words, self.shared[lanes], [T.ramp(0, 1, 4)])

    def _sum(self, fragment: int, column: int) -> int:
        return (fragment * self.tile.columns + column) * 4

    def _keep_sums(self) -> None:
        """Store the sums as ``[token, output]`` in shared memory."""
        tile = self.tile
        self.kept = T.decl_buffer(
            (tile.tokens * tile.sum_stride,),
            "float32",
            data=self.shared.data,
            scope="shared.dyn",
        )
        for fragment in range(tile.fragments):
            for column in range(tile.columns):
                for i in range(4):
                    row = (self.row_warp * tile.fragments + fragment) * ROWS
                    row += self.lane // 4 + i // 2 * 8
                    token = (self.token_warp * tile.columns + column) * 8
                    token += self.lane % 4 * 2 + i % 2
                    value = self.sums[self._sum(fragment, column) + i]
                    T.buffer_store(self.kept, value, [token * tile.sum_stride + row])
        instructions.barrier()

    def _write_outputs(self) -> None:
        """Apply the epilogue and store, neighbouring threads neighbouring outputs."""
        p, tile = self.problem, self.tile
        with T.serial(0, tile.rows * tile.tokens // tile.threads) as turn:
            number = turn * tile.threads + self.thread
            token, row = number // tile.rows, number % tile.rows
            output, where = self.group * tile.rows + row, self.first_token + token
            with T.If(tirx.all(where < self.tokens, output < p.outputs)), T.Then():
                at = where * p.outputs + output
                operands = [
                    buffer[output] if isinstance(step, Bias) else buffer[at]
                    for step, buffer in zip(self._reading(), self.extras, strict=True)
                ]
                total = self.kept[token * tile.sum_stride + row]
                value = epilogue_value(total, p.epilogue, operands, p.y.dtype)
                T.buffer_store(self.y, value, [at])


def _swizzled(row: Expr, chunk: Expr) -> Expr:
    """Where a chunk of a row lies: eight rows of one chunk are in different banks."""
    return chunk ^ ((row // 2) % _CHUNKS)
