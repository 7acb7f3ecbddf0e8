"""Dense layers on Hopper's warpgroups: the weight dense, in blocks of 64x64, or 2:4.

The weight is the first factor of ``wgmma``, so its rows, the outputs, come in 64s; tokens are the
columns of a product. A tile of outputs by tokens is one or two warpgroups' work, who keep its sums
in registers. Thread blocks stay and take tile after tile. One more warpgroup, of which a single
thread works, copies what the steps of 64 columns need, as far ahead as shared memory has stages:
activations as a box of the matrix, the weight as it lies in memory (see :mod:`.warpgroup_weights`).
Barriers in shared memory tell when a stage is full and when it is empty again.

Two warpgroups either share a tile, each with 64 of its outputs, or alternate, each with tiles of
its own, so that one multiplies while the other stores: for weights in blocks, whose tiles have few
steps.

Sums go to float16 and through shared memory, from where the copy engine stores them as boxes; where
a residual is added last, threads read it and store whole rows of 128 bytes. Outputs in float32, and
epilogues that do more behind the residual, are stored from registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.families import Extents
from sparse_tvm.operators import Bias, Epilogue, Layout, Residual, Step
from sparse_tvm.schedules.cuda import instructions, warpgroup
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
from sparse_tvm.schedules.cuda.warpgroup_tiles import WarpgroupTile
from sparse_tvm.schedules.cuda.warpgroup_weights import SIDE

Expr = Any
Buffer = Any

_WARPGROUP = 128
_TOGETHER = 4
"""Chunks that a thread stores one after another, having asked for what is added to all of them."""

_SWIZZLE_128, _L2_256 = 3, 3  # of the driver's CUtensorMapSwizzle and CUtensorMapL2promotion


@dataclass(frozen=True)
class Problem:
    """One kernel.

    Attributes
    ----------
    outputs, inputs : int
        N and K, multiples of eight.
    x, y : Extents
        Activations ``[..., K]`` in float16, and the output ``[..., N]``, whose rows are the same.
    extras : tuple[Extents, ...]
        What the epilogue reads.
    layout : Layout
        The weight's.
    tile : WarpgroupTile
        Who computes what.
    epilogue : tuple[Step, ...]
        Behind the sums.
    processors : int
        Of the device: no more thread blocks are started.
    """

    outputs: int
    inputs: int
    x: Extents
    extras: tuple[Extents, ...]
    y: Extents
    layout: Layout
    tile: WarpgroupTile
    epilogue: Epilogue
    processors: int

    @property
    def structured(self) -> bool:
        """Whether the weight is 2:4."""
        return self.layout.format == "2:4"

    @property
    def blocked(self) -> bool:
        """Whether the weight is in blocks."""
        return self.layout.format == "bsr"

    @property
    def row_tiles(self) -> int:
        """Tiles along the outputs."""
        return -(-self.outputs // self.tile.rows)

    @property
    def steps(self) -> int:
        """Steps of all columns."""
        return -(-self.inputs // SIDE)

    @property
    def depth(self) -> int:
        """Columns of the weight that one product multiplies."""
        return 32 if self.structured else 16

    @property
    def staged(self) -> bool:
        """Whether sums go through shared memory: a residual may come last, and nothing else.

        It and the output are of float16 then; a model's own input is not.
        """
        before = self.epilogue[:-1] if self.ends_with_residual else self.epilogue
        words = [self.y, *(self.extras[-1:] if self.ends_with_residual else ())]
        alike = all(extents.dtype == "float16" for extents in words)
        return alike and not any(isinstance(s, Residual) for s in before)

    @property
    def boxed(self) -> bool:
        """Whether what is staged is stored as boxes of the output: nothing is added to it."""
        return self.staged and not self.ends_with_residual

    @property
    def ends_with_residual(self) -> bool:
        """Whether the last step adds a residual."""
        return bool(self.epilogue) and isinstance(self.epilogue[-1], Residual)


def warpgroup_matmul(problem: Problem) -> tirx.PrimFunc:
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
            self.tokens = tokens = size_of(y.shape[:-1])
            self.y = flat(y, tokens * p.outputs)
            self.weight = {n: flat(array, size_of(array.shape)) for n, array in weight.items()}
            self.extras = [
                extra if len(extra.shape) == 1 else flat(extra, tokens * p.outputs)
                for extra in extras
            ]
            self.x_map = self._tensor_map("x_map", x, p.inputs)
            if p.boxed:
                self.y_map = self._tensor_map("y_map", y, p.outputs)
            self.tiles = tirx.Cast("int32", (tokens + (tile.tokens - 1)) // tile.tokens)
            self.tiles = self.tiles * p.row_tiles
            with (
                T.launch_thread("blockIdx.x", tirx.min(self.tiles, p.processors)) as block,
                T.launch_thread("threadIdx.x", tile.threads) as thread,
                # Without it, registers cannot be handed on.
                T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}),
            ):
                self.blocks = tirx.min(self.tiles, p.processors)
                self._body(block, thread)
        return result["func"]

    def _weight_arguments(self) -> dict[str, Buffer]:
        p = self.problem
        words = self.tile.weight_bytes(p.structured) // 4
        if p.blocked:
            blocks = symbol("blocks")
            return {
                "data": argument("data", (blocks, words), "uint32"),
                "columns": argument("columns", (blocks,), "int32"),
                "indptr": argument("indptr", (-(-p.outputs // SIDE) + 1,), "int32"),
            }
        shape = (-(-p.outputs // SIDE), p.steps)
        arrays = {"data": argument("data", (*shape, words), "uint32")}
        if p.structured:
            places = self.tile.places_bytes // 4
            arrays["places"] = argument("places", (*shape, places), "uint32")
        return arrays

    def _tensor_map(self, name: str, rows: Buffer, columns: int) -> Expr:
        """What the driver makes of activations in rows, for copies of boxes of 64 columns."""
        tensor_map = tirx.Var(name, T.handle("tensormap").ty)
        T.Bind(T.tvm_stack_alloca("tensormap", 1), var=tensor_map)
        sizes, strides, box = (columns, self.tokens), (columns * 2,), (SIDE, self.tile.tokens)
        encoded = tirx.tensormap_encode_tiled(
            tensor_map,
            rows.data,
            *sizes,
            *strides,
            *box,
            1,
            1,
            descriptor_dtype="float16",
            rank=2,
            swizzle=_SWIZZLE_128,
            l2_promotion=_L2_256,
        )
        T.evaluate(encoded)
        return tensor_map

    def _body(self, block: Expr, thread: Expr) -> None:
        p, tile = self.problem, self.tile
        words = tile.shared_bytes(p.structured) // 4
        self.shared = T.alloc_buffer((words,), "uint32", scope="shared.dyn")
        self.block, self.thread = block, thread
        # Full and empty in turn: copies fill a stage, and those who multiplied empty it.
        with T.If(thread == 0), T.Then():
            for stage in range(tile.stages):
                warpgroup.barrier_init(self._barrier(stage), 1)
                arrivals = 1 if tile.alternating else tile.groups
                warpgroup.barrier_init(self._barrier(stage, empty=True), arrivals)
            if tile.alternating:
                for group in range(tile.groups):
                    warpgroup.barrier_init(self._turn_barrier(group), 1)
            warpgroup.fence_barriers()
            warpgroup.prefetch_map(self.x_map)
            if p.boxed:
                warpgroup.prefetch_map(self.y_map)
        instructions.await_previous()
        instructions.barrier()
        with T.If(thread >= tile.groups * _WARPGROUP):
            with T.Then():
                if tile.groups == 2:
                    warpgroup.leave_registers()
                with T.If(thread == tile.groups * _WARPGROUP), T.Then():
                    self._copy_all()
            with T.Else():
                if tile.groups == 2:
                    warpgroup.take_registers()
                self._multiply_all()

    def _at(self, byte: Expr) -> Expr:
        """Address of a byte of shared memory, a multiple of four."""
        return instructions.address(self.shared, byte // 4)

    def _barrier(self, stage: Expr, empty: bool = False) -> Expr:
        first = self.tile.barriers_at(self.problem.structured)
        return self._at(first + stage * 16 + (8 if empty else 0))

    def _turn_barrier(self, group: Expr) -> Expr:
        """Whose phases tell how many tiles the other warpgroup has multiplied."""
        return self._at(self.tile.turns_at(self.problem.structured) + group * 8)

    def _stage(self, stage: Expr) -> Expr:
        """First byte of a stage: activations, the weight, places."""
        return stage * self.tile.stage_bytes(self.problem.structured)

    def _each_tile(self) -> Any:
        """Open the loop over the tiles of this thread block."""
        turns = (self.tiles - self.block + self.blocks - 1) // self.blocks
        return T.serial(0, turns)

    def _tile_of(self, turn: Expr) -> tuple[Expr, Expr]:
        """Which tile along the outputs, and which along the tokens: all outputs of some tokens
        one after another, so that their activations stay in the second cache."""
        number = self.block + turn * self.blocks
        return number % self.problem.row_tiles, number // self.problem.row_tiles

    def _steps_of(self, row_tile: Expr) -> tuple[Expr, Expr]:
        """First step of a tile among all there are, and their number."""
        if not self.problem.blocked:
            return tirx.const(0, "int32"), tirx.const(self.problem.steps, "int32")
        first = self.weight["indptr"][row_tile]
        return first, self.weight["indptr"][row_tile + 1] - first

    def _copy_all(self) -> None:
        """What the copying thread does: for each step of each tile, fill a stage."""
        done = local(1, "int32")
        T.buffer_store(done, 0, [0])
        with self._each_tile() as turn:
            row_tile, token_tile = self._tile_of(turn)
            first, count = self._steps_of(row_tile)
            with T.serial(0, count) as step:
                stage, parity = self._ring(done[0])
                warpgroup.barrier_wait(self._barrier(stage, empty=True), parity ^ 1)
                self._copy(stage, row_tile, token_tile, first + step)
                T.buffer_store(done, done[0] + 1, [0])

    def _ring(self, count: Expr) -> tuple[Expr, Expr]:
        """Stage of a step, and the parity of its phase."""
        return count % self.tile.stages, count // self.tile.stages % 2

    def _copy(self, stage: Expr, row_tile: Expr, token_tile: Expr, step: Expr) -> None:
        p, tile = self.problem, self.tile
        full, at = self._barrier(stage), self._stage(stage)
        warpgroup.barrier_expect(full, tile.step_bytes(p.structured))
        column = self.weight["columns"][step] if p.blocked else step * SIDE
        warpgroup.copy_box(self._at(at), self.x_map, column, token_tile * tile.tokens, full)
        arrays = {"data": (tile.weight_at, tile.weight_bytes(p.structured))}
        if p.structured:
            arrays["places"] = (tile.places_at, tile.places_bytes)
        for group in range(tile.rows // SIDE):
            row = row_tile * (tile.rows // SIDE) + group
            if p.outputs % tile.rows and not p.blocked:  # the last tile's rows may not all be there
                row = tirx.min(row, -(-p.outputs // SIDE) - 1)
            number = step if p.blocked else row * p.steps + step
            for name, (first, size) in arrays.items():
                source = instructions.address(self.weight[name], number * (size // 4))
                warpgroup.copy_bytes(self._at(at + first + group * size), source, size, full)

    def _multiply_all(self) -> None:
        """What the other warpgroups do: multiply the steps of a tile, and store it."""
        tile = self.tile
        self.group = self.thread // _WARPGROUP
        self.member = self.thread % _WARPGROUP
        self.warp, self.lane = self.member // 32, self.member % 32
        self.sums = local(tile.sums, "float32")
        done = local(1, "int32")
        T.buffer_store(done, 0, [0])
        with self._each_tile() as turn:
            row_tile, token_tile = self._tile_of(turn)
            _, count = self._steps_of(row_tile)

            if tile.alternating:
                with T.If(turn % 2 == self.group), T.Then():
                    # One after the other: who waits for a stage must know of all phases before.
                    parity = (turn // 2 + 1 + self.group) % 2
                    warpgroup.barrier_wait(self._turn_barrier(self.group), parity)
                    self._multiply_steps(done, count)
                    self._store(row_tile, token_tile)
            else:
                self._multiply_steps(done, count)
                self._store(row_tile, token_tile)
            T.buffer_store(done, done[0] + count, [0])
        if self.problem.boxed:  # shared memory must last until then
            with T.If(self.member == 0), T.Then():
                warpgroup.stores_wait()

    def _multiply_steps(self, done: Buffer, count: Expr) -> None:
        with T.serial(0, count) as step:
            stage, parity = self._ring(done[0] + step)
            warpgroup.barrier_wait(self._barrier(stage), parity)
            self._multiply(stage, step)
            warpgroup.products_wait(1)
            with T.If(step > 0), T.Then():
                before, _ = self._ring(done[0] + step - 1)
                self._release(before)
        if self.tile.alternating:
            # Nobody may still wait for a turn when the next one ends.
            warpgroup.sync_threads(self.group + 1, _WARPGROUP)
            with T.If(self.member == 0), T.Then():
                warpgroup.barrier_arrive(self._turn_barrier(1 - self.group))
        warpgroup.products_wait(0)
        last, _ = self._ring(done[0] + count - 1)
        self._release(last)

    def _release(self, stage: Expr) -> None:
        with T.If(self.member == 0), T.Then():
            warpgroup.barrier_arrive(self._barrier(stage, empty=True))

    def _multiply(self, stage: Expr, step: Expr) -> None:
        p, tile = self.problem, self.tile
        x = self._stage(stage)
        first = 0 if tile.alternating else self.group * tile.parts
        steps = [(k, part) for k in range(SIDE // p.depth) for part in range(tile.parts)]
        later = tirx.Cast("int32", step > 0)
        if p.structured:
            places = local(len(steps), "uint32")
            for i, (k, part) in enumerate(steps):
                byte = x + tile.places_at + (first + part) * tile.places_bytes + k * 256
                at = byte // 4 + self.warp * 16 + self.lane // 4 * 2 + self.lane % 2
                T.buffer_store(places, self.shared[at], [i])
        warpgroup.products_begin()
        for i, (k, part) in enumerate(steps):
            weight = x + tile.weight_at + (first + part) * tile.weight_bytes(p.structured)
            a, b = self._at(weight + k * 32), self._at(x + k * p.depth * 2)
            sums, keep = part * tile.tokens // 2, later if k == 0 else 1
            if p.structured:
                warpgroup.multiply_2_of_4(tile.tokens, self.sums, sums, a, b, places[i], keep)
            else:
                warpgroup.multiply(tile.tokens, self.sums, sums, a, b, keep)
        warpgroup.products_commit()

    def _store(self, row_tile: Expr, token_tile: Expr) -> None:
        first = row_tile * self.tile.rows
        if not self.tile.alternating:
            first = first + self.group * (self.tile.parts * SIDE)
        if self.problem.staged:
            if self.problem.boxed:
                with T.If(self.member == 0), T.Then():
                    warpgroup.stores_wait()  # the last tile's
            warpgroup.sync_threads(self.group + 1, _WARPGROUP)
            for part in range(self.tile.parts):
                self._stage_sums(first, part)
            if self.problem.boxed:
                warpgroup.fence_shared()
            warpgroup.sync_threads(self.group + 1, _WARPGROUP)
            if self.problem.boxed:
                with T.If(self.member == 0), T.Then():
                    self._store_boxes(first, token_tile)
            else:
                self._write_staged(first, token_tile)
        else:
            for part in range(self.tile.parts):
                self._write_sums(first, token_tile, part)

    def _store_boxes(self, first: Expr, token_tile: Expr) -> None:
        """Have what is staged stored: 64 outputs of all tokens at a time."""
        tile = self.tile
        for part in range(tile.parts):
            staged = self._at(self._staging(part, 0, 0))
            warpgroup.store_box(self.y_map, first + part * SIDE, token_tile * tile.tokens, staged)
        warpgroup.stores_commit()

    def _load_biases(self, first: Expr, part: int) -> Expr:
        """Read what is added to a thread's two rows of a part, once for all columns; return the
        first row. Where outputs end, what is read is another's."""
        output = first + part * SIDE + self.warp * 16 + self.lane // 4
        self.biases = []
        for step, buffer in zip(self._reading(), self.extras, strict=True):
            if isinstance(step, Bias):
                self.biases.append(local(2, "float32"))
                for row in range(2):
                    at = tirx.min(output + row * 8, self.problem.outputs - 1)
                    T.buffer_store(self.biases[-1], tirx.Cast("float32", buffer[at]), [row])
        return output

    def _value(self, i: int, steps: Epilogue, at: Expr = None) -> Expr:
        """A sum behind some steps; ``at`` is where residuals are read."""
        operands, biases = [], iter(self.biases)
        for step, buffer in zip(self._reading(), self.extras, strict=True):
            operand = next(biases)[i % 4 // 2] if isinstance(step, Bias) else buffer[at]
            if step in steps:
                operands.append(operand)
        return epilogue_value(self.sums[i], steps, operands, "float32", self.problem.y.dtype)

    def _reading(self) -> list[Step]:
        return [step for step in self.problem.epilogue if step.operand]

    def _staging(self, part: Expr, token: Expr, chunk: Expr) -> Expr:
        """Where 8 outputs of a token are staged: 128 bytes a token, chunks of 16 swizzled."""
        first = self.tile.staging_at(self.problem.structured)
        first = first + (self.group * self.tile.parts + part) * (self.tile.tokens * 128)
        return first + token * 128 + (chunk ^ (token % 8)) * 16

    def _stage_sums(self, first: Expr, part: int) -> None:
        p = self.problem
        steps = p.epilogue[:-1] if p.ends_with_residual else p.epilogue
        self._load_biases(first, part)
        for column in range(0, self.tile.tokens // 8, 2):
            words = []
            for matrix in range(4):  # outputs 0 to 7 and 8 to 15 of some tokens, then of the next
                i = part * self.tile.tokens // 2 + column * 4 + matrix * 2
                pair = [self._value(i + j, steps, 0) for j in range(2)]
                words.append(warpgroup.pack(*pair))
            token = (column + self.lane // 16) * 8 + self.lane % 8
            chunk = self.warp * 2 + self.lane // 8 % 2
            warpgroup.store_matrices(self._at(self._staging(part, token, chunk)), words)

    def _write_staged(self, first: Expr, token_tile: Expr) -> None:
        """Store what is staged, neighbouring threads neighbouring outputs."""
        p, tile = self.problem, self.tile
        self.words = self.tokens * (p.outputs // 2)
        turns = tile.tokens * tile.parts * 8 // _WARPGROUP
        with T.serial(0, turns // _TOGETHER) as turn:
            places = [
                self._place(first, token_tile, turn * _TOGETHER + i) for i in range(_TOGETHER)
            ]
            added = None
            if p.ends_with_residual:  # all on their way before one is waited for
                added = local(4 * _TOGETHER, "uint32")
                extra = T.decl_buffer((self.words,), "uint32", data=self.extras[-1].data)
                for i, (inside, at, _) in enumerate(places):
                    with T.If(inside), T.Then():
                        T.buffer_store(added, extra[T.ramp(at, 1, 4)], [T.ramp(4 * i, 1, 4)])
            for i, (inside, at, staged) in enumerate(places):
                with T.If(inside), T.Then():
                    self._write_chunk(at, staged, added, 4 * i)

    def _place(self, first: Expr, token_tile: Expr, turn: Expr) -> tuple[Expr, Expr, Expr]:
        """Of a thread's chunk of eight outputs: is it there, its word in y, and where staged."""
        p, tile = self.problem, self.tile
        chunks = tile.parts * 8
        number = turn * _WARPGROUP + self.member
        token, part, chunk = number // chunks, number % chunks // 8, number % 8
        output = first + part * SIDE + chunk * 8
        where = tirx.Cast("int64", token_tile * tile.tokens + token)
        inside = tirx.all(where < self.tokens, output < p.outputs)
        at = (where * p.outputs + output) // 2
        return inside, at, self._staging(part, token, chunk) // 4

    def _write_chunk(self, at: Expr, staged: Expr, added: Buffer | None, first: int) -> None:
        lanes, result = T.ramp(0, 1, 4), local(4, "uint32")
        T.buffer_store(result, self.shared[T.ramp(staged, 1, 4)], [lanes])
        if added is not None:
            for i in range(4):
                T.buffer_store(result, warpgroup.add_pairs(result[i], added[first + i]), [i])
        y = T.decl_buffer((self.words,), "uint32", data=self.y.data)
        T.buffer_store(y, result[lanes], [T.ramp(at, 1, 4)])

    def _write_sums(self, first: Expr, token_tile: Expr, part: int) -> None:
        """Store from registers: a warp has eight outputs of four tokens at a time."""
        p, tile = self.problem, self.tile
        row = self._load_biases(first, part)
        for i in range(tile.tokens // 2):
            output = row + i % 4 // 2 * 8
            token = token_tile * tile.tokens + i // 4 * 8 + self.lane % 4 * 2 + i % 2
            where = tirx.Cast("int64", token)
            with T.If(tirx.all(where < self.tokens, output < p.outputs)), T.Then():
                at = where * p.outputs + output
                value = self._value(part * tile.tokens // 2 + i, p.epilogue, at)
                if p.y.dtype != "float32":
                    value = epilogue_value(value, (), [], p.y.dtype)
                T.buffer_store(self.y, value, [at])
