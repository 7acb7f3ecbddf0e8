"""Dense layers with weights in blocks of 32x32 on Hopper's warpgroups.

Tokens are the rows of a product here and outputs its columns, so that a block is a factor of its
own. A thread block computes some tokens of a band (see :mod:`.band_weights`): its warpgroups have
64 tokens each, and keep their sums of all of the band's block rows in registers. One more warp, of
which a single thread works, copies what each step needs, as far ahead as shared memory has stages:
a box of 32 columns of the activations, and the step's blocks. Only columns in which the band has
blocks are copied, and once for all of its block rows.

Barriers in shared memory tell when a stage is full and when it is empty again. A thread ends up
with eight neighbouring outputs of two tokens for each block row, which it stores at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.families import Extents
from sparse_tvm.operators import Bias, Epilogue, Residual, Step
from sparse_tvm.schedules.cuda import instructions, warpgroup
from sparse_tvm.schedules.cuda.band_tiles import TOKENS, BandTile
from sparse_tvm.schedules.cuda.band_weights import BLOCK_BYTES, SIDE
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

Expr = Any
Buffer = Any

_WARPGROUP = 128
_SWIZZLE_64, _L2_256 = 2, 3  # of the driver's CUtensorMapSwizzle and CUtensorMapL2promotion
_EACH = 8
"""Neighbouring outputs of a thread."""


@dataclass(frozen=True)
class BandProblem:
    """One kernel.

    Attributes
    ----------
    outputs, inputs : int
        N and K, multiples of eight.
    x, y : Extents
        Activations ``[..., K]`` in float16, and the output ``[..., N]``, whose rows are the same.
    extras : tuple[Extents, ...]
        What the epilogue reads.
    tile : BandTile
        Who computes what.
    epilogue : tuple[Step, ...]
        Behind the sums.
    processors : int
        Of the device: no more thread blocks are started than it has at a time.
    """

    outputs: int
    inputs: int
    x: Extents
    extras: tuple[Extents, ...]
    y: Extents
    tile: BandTile
    epilogue: Epilogue
    processors: int

    @property
    def bands(self) -> int:
        """How many there are."""
        return -(-self.outputs // (SIDE * self.tile.height))

    @property
    def ends_with_residual(self) -> bool:
        """Whether the last step adds a residual, and this and the output are in float16."""
        last = bool(self.epilogue) and isinstance(self.epilogue[-1], Residual)
        return last and self.extras[-1].dtype == self.y.dtype == "float16"


def band_matmul(problem: BandProblem) -> tirx.PrimFunc:
    """The kernel: x, the weight's arrays, the epilogue's operands, y."""
    return _Matmul(problem).build()


class _Matmul:
    def __init__(self, problem: BandProblem) -> None:
        self.problem, self.tile = problem, problem.tile

    def build(self) -> tirx.PrimFunc:
        p, tile = self.problem, self.tile
        with prim_func() as result:
            x = tensor("x", p.x)
            blocks, steps = symbol("blocks"), symbol("steps")
            self.data = argument("data", (blocks, BLOCK_BYTES // 4), "uint32")
            self.steps = argument("steps", (steps,), "uint32")
            self.first_step = argument("first_step", (p.bands + 1,), "int32")
            self.first_block = argument("first_block", (p.bands + 1,), "int32")
            self.rows = argument("rows", (p.bands, tile.height), "int32")
            extras = [tensor(f"extra_{i}", extents) for i, extents in enumerate(p.extras)]
            y = tensor("y", p.y)
            self.tokens = tokens = size_of(y.shape[:-1])
            self.data = flat(self.data, blocks * (BLOCK_BYTES // 4))
            self.y = flat(y, tokens * p.outputs)
            self.extras = [
                extra if len(extra.shape) == 1 else flat(extra, tokens * p.outputs)
                for extra in extras
            ]
            self.x_map = self._tensor_map(x, tokens)
            tiles = tirx.Cast("int32", (tokens + (tile.tokens - 1)) // tile.tokens)
            self.tasks = tiles * p.bands
            most = p.processors * tile.resident
            with (
                T.launch_thread("blockIdx.x", tirx.min(self.tasks, most)) as self.block,
                T.launch_thread("threadIdx.x", tile.threads) as self.thread,
                T.attr({"tirx.launch_bounds_min_blocks_per_sm": tile.resident}),
            ):
                self.blocks = tirx.min(self.tasks, most)
                self._body()
        return result["func"]

    def _tensor_map(self, x: Buffer, tokens: Expr) -> Expr:
        """What the driver makes of the activations, for copies of boxes of 32 columns."""
        p = self.problem
        tensor_map = tirx.Var("x_map", T.handle("tensormap").ty)
        T.Bind(T.tvm_stack_alloca("tensormap", 1), var=tensor_map)
        sizes, strides, box = (p.inputs, tokens), (p.inputs * 2,), (SIDE, self.tile.tokens)
        encoded = tirx.tensormap_encode_tiled(
            tensor_map,
            x.data,
            *sizes,
            *strides,
            *box,
            1,
            1,
            descriptor_dtype="float16",
            rank=2,
            swizzle=_SWIZZLE_64,
            l2_promotion=_L2_256,
        )
        T.evaluate(encoded)
        return tensor_map

    def _body(self) -> None:
        tile = self.tile
        self.shared = T.alloc_buffer((tile.shared_bytes // 4,), "uint32", scope="shared.dyn")
        # Full and empty in turn: copies fill a stage, and warps that multiplied empty it.
        with T.If(self.thread == 0), T.Then():
            for stage in range(tile.stages):
                warpgroup.barrier_init(self._barrier(stage), 1)
                warpgroup.barrier_init(self._barrier(stage, empty=True), tile.groups * 4)
            warpgroup.fence_shared()
        instructions.barrier()
        self.lane, self.warp = (
            self.thread % 32,
            _kept(warpgroup.uniform(tirx.Cast("uint32", self.thread // 32)), "uint32"),
        )
        self.band, self.token_tile = local(1, "int32"), local(1, "int32")
        self.first, self.count = local(1, "int32"), local(1, "int32")
        self.stage, self.parity = local(1, "int32"), local(1, "int32")
        T.buffer_store(self.stage, 0, [0])
        T.buffer_store(self.parity, 0, [0])
        with T.If(self.thread >= tile.groups * _WARPGROUP):
            with T.Then(), T.If(self.thread == tile.groups * _WARPGROUP), T.Then():
                self._copy_all()
            with T.Else():
                self._multiply_all()

    def _at(self, byte: Expr) -> Expr:
        """Address of a byte of shared memory, a multiple of four."""
        return instructions.address(self.shared, byte // 4)

    def _barrier(self, stage: Expr, empty: bool = False) -> Expr:
        return self._at(self.tile.barriers_at + stage * 16 + (8 if empty else 0))

    @contextmanager
    def _each_task(self) -> Iterator[None]:
        """Open the loop over what this thread block computes: a band of a tile of tokens, all bands
        of some tokens one after another, so that their activations stay in the second cache."""
        with T.serial(0, (self.tasks - self.block + self.blocks - 1) // self.blocks) as turn:
            number = self.block + turn * self.blocks
            T.buffer_store(self.band, number % self.problem.bands, [0])
            T.buffer_store(self.token_tile, number // self.problem.bands, [0])
            T.buffer_store(self.first, self.first_step[self.band[0]], [0])
            last = self.first_step[self.band[0] + 1]
            T.buffer_store(self.count, last - self.first[0], [0])
            yield

    @contextmanager
    def _each_step(self) -> Iterator[Expr]:
        """Open the loop over a band's steps; the word of each is loaded a step ahead."""
        first, count = self.first[0], self.count[0]
        word, later = local(1, "uint32"), local(1, "uint32")
        with T.If(count > 0), T.Then():
            T.buffer_store(later, self.steps[first], [0])
        with T.serial(0, count) as step:
            T.buffer_store(word, later[0], [0])
            T.buffer_store(later, self.steps[first + tirx.min(step + 1, count - 1)], [0])
            yield word[0]
            T.buffer_store(self.stage, self.stage[0] + 1, [0])
            with T.If(self.stage[0] == self.tile.stages), T.Then():
                T.buffer_store(self.stage, 0, [0])
                T.buffer_store(self.parity, self.parity[0] ^ 1, [0])

    def _copy_all(self) -> None:
        """What the copying thread does: for each step of each task, fill a stage."""
        warpgroup.prefetch_map(self.x_map)
        tile, stage = self.tile, self.stage[0]
        block = local(1, "int32")
        with self._each_task():
            T.buffer_store(block, self.first_block[self.band[0]], [0])
            with self._each_step() as word:
                blocks = tirx.Cast("int32", tirx.popcount(word >> 16))
                warpgroup.barrier_wait(self._barrier(stage, empty=True), self.parity[0] ^ 1)
                full, at = self._barrier(stage), stage * tile.stage_bytes
                warpgroup.barrier_expect(full, tile.columns_bytes + blocks * BLOCK_BYTES)
                column = tirx.Cast("int32", word & 0xFFFF) * SIDE
                row = self.token_tile[0] * tile.tokens
                warpgroup.copy_box(self._at(at), self.x_map, column, row, full)
                source = instructions.address(self.data, block[0] * (BLOCK_BYTES // 4))
                weight = self._at(at + tile.columns_bytes)
                warpgroup.copy_bytes(weight, source, blocks * BLOCK_BYTES, full)
                T.buffer_store(block, block[0] + blocks, [0])

    def _multiply_all(self) -> None:
        """What a warpgroup does: of each task, multiply all steps and store the sums."""
        tile = self.tile
        self.group = tirx.Cast("int32", self.warp) // 4
        self.sums = local(tile.height * 16, "float32")
        used, at, rows = local(1, "int32"), local(1, "int32"), local(1, "uint32")
        with self._each_task():
            for i in range(tile.height * 16):
                T.buffer_store(self.sums, T.float32(0), [i])
            T.buffer_store(used, -1, [0])
            warpgroup.products_begin()
            with self._each_step() as word:
                stage = self.stage[0]
                T.buffer_store(rows, warpgroup.uniform(word) >> 16, [0])
                T.buffer_store(at, stage * tile.stage_bytes + tile.columns_bytes, [0])
                warpgroup.barrier_wait(self._barrier(stage), self.parity[0])
                self._multiply(stage, rows[0], at)
                # What was begun before these is done: its stage is free.
                with T.If(used[0] >= 0), T.Then():
                    self._release(used[0])
                T.buffer_store(used, stage, [0])
            warpgroup.products_wait(0)
            with T.If(used[0] >= 0), T.Then():
                self._release(used[0])
            self._store()

    def _multiply(self, stage: Expr, mine: Expr, at: Buffer) -> None:
        """Multiply a step's blocks, each as a group of its own: the last may be under way."""
        columns = stage * self.tile.stage_bytes + self.group * (TOKENS * SIDE * 2)
        for row in range(self.tile.height):
            with T.If(mine >> row & 1 != 0), T.Then():
                warpgroup.products_begin()
                for k in range(SIDE // 16):
                    a, b = self._at(columns + k * 32), self._at(at[0] + k * 32)
                    warpgroup.multiply_block(self.sums, row * 16, a, b)
                warpgroup.products_commit()
                warpgroup.products_wait(1)
                T.buffer_store(at, at[0] + BLOCK_BYTES, [0])

    def _release(self, stage: Expr) -> None:
        with T.If(self.lane == 0), T.Then():
            warpgroup.barrier_arrive(self._barrier(stage, empty=True))

    def _store(self) -> None:
        p, tile = self.problem, self.tile
        warp = tirx.Cast("int32", self.warp) % 4
        token = self.token_tile[0] * tile.tokens + self.group * TOKENS + warp * 16 + self.lane // 4
        for row in range(tile.height):
            block_row = self.rows[self.band[0], row]
            output = block_row * SIDE + self.lane % 4 * _EACH
            with T.If(output < p.outputs), T.Then():
                for below in range(2):
                    where = tirx.Cast("int64", token + 8 * below)
                    with T.If(where < self.tokens), T.Then():
                        sums = [row * 16 + j * 4 + below * 2 + i for j in range(4) for i in (0, 1)]
                        self._store_each(sums, output, where * p.outputs + output)

    def _store_each(self, sums: list[int], output: Expr, at: Expr) -> None:
        """Store eight neighbouring outputs."""
        p = self.problem
        steps = p.epilogue[:-1] if p.ends_with_residual else p.epilogue
        values = [self._value(i, output + o, at + o, steps) for o, i in enumerate(sums)]
        if p.y.dtype != "float16":
            for o, value in enumerate(values):
                T.buffer_store(self.y, value, [at + o])
            return
        words = self.tokens * (p.outputs // 2)
        lanes, there = T.ramp(0, 1, 4), T.ramp(at // 2, 1, 4)
        result = local(4, "uint32")
        for i in range(4):
            T.buffer_store(result, warpgroup.pack(values[2 * i], values[2 * i + 1]), [i])
        if p.ends_with_residual:
            added = local(4, "uint32")
            extra = T.decl_buffer((words,), "uint32", data=self.extras[-1].data)
            T.buffer_store(added, extra[there], [lanes])
            for i in range(4):
                T.buffer_store(result, warpgroup.add_pairs(result[i], added[i]), [i])
        y = T.decl_buffer((words,), "uint32", data=self.y.data)
        T.buffer_store(y, result[lanes], [there])

    def _value(self, i: int, output: Expr, at: Expr, steps: Epilogue) -> Expr:
        """A sum behind some steps."""
        operands = [
            buffer[output] if isinstance(step, Bias) else buffer[at]
            for step, buffer in zip(self._reading(), self.extras, strict=True)
            if step in steps
        ]
        return epilogue_value(self.sums[i], steps, operands, "float32", self.problem.y.dtype)

    def _reading(self) -> list[Step]:
        return [step for step in self.problem.epilogue if step.operand]


def _kept(value: Expr, dtype: str) -> Expr:
    """A value computed once."""
    kept = local(1, dtype)
    T.buffer_store(kept, value, [0])
    return kept[0]
