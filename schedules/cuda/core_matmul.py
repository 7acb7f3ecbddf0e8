"""Dense layers in float32, without tensor cores.

A thread block computes 64 outputs of 64 tokens, four by four of each a thread; both factors go
through shared memory, sixteen columns at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.families import Extents
from sparse_tvm.operators import Bias, Epilogue
from sparse_tvm.schedules.cuda import instructions
from sparse_tvm.schedules.cuda.build import argument, flat, local, prim_func, size_of, tensor
from sparse_tvm.schedules.cuda.epilogue import epilogue_value

Expr = Any

_SIDE, _EACH, _COLUMNS, _THREADS = 64, 4, 16, 256
_STRIDE = _SIDE + 4  # clear of bank conflicts where columns are stored


def core_matmul(
    outputs: int,
    inputs: int,
    operands: Sequence[Extents],
    output: Extents,
    epilogue: Epilogue,
) -> tirx.PrimFunc:
    """The kernel: x, the weight ``[N, K]``, the epilogue's operands, y.

    ``operands`` are all but the weight.
    """
    reading = [step for step in epilogue if step.operand]
    with prim_func() as result:
        x = tensor("x", operands[0])
        w = argument("data", (outputs, inputs), "float32")
        extras = [tensor(f"extra_{i}", extents) for i, extents in enumerate(operands[1:])]
        y = tensor("y", output)
        tokens = size_of(x.shape[:-1])
        x, w, y = flat(x, tokens * inputs), flat(w, outputs * inputs), flat(y, tokens * outputs)
        extras = [e if len(e.shape) == 1 else flat(e, tokens * outputs) for e in extras]
        with (
            T.launch_thread("blockIdx.x", -(-outputs // _SIDE)) as group,
            T.launch_thread("blockIdx.y", (tokens + (_SIDE - 1)) // _SIDE) as block,
            T.launch_thread("threadIdx.x", _THREADS) as thread,
        ):
            instructions.await_previous()
            shared = [
                T.alloc_buffer((_COLUMNS * _STRIDE,), "float32", scope="shared") for _ in range(2)
            ]
            sums = local(_EACH * _EACH, "float32")
            for i in range(_EACH * _EACH):
                T.buffer_store(sums, T.float32(0), [i])
            sides = ((x, block, tokens), (w, group, outputs))
            with T.serial(0, -(-inputs // _COLUMNS)) as step:
                instructions.barrier()
                for kept, (source, which, count) in zip(shared, sides, strict=True):
                    _keep(kept, source, which * _SIDE, count, step * _COLUMNS, inputs, thread)
                instructions.barrier()
                _multiply(sums, shared, thread)
            for i in range(_EACH):
                for j in range(_EACH):
                    token = block * _SIDE + thread // 16 * _EACH + i
                    feature = group * _SIDE + thread % 16 + j * 16
                    with T.If(tirx.all(token < tokens, feature < outputs)), T.Then():
                        at = token * outputs + feature
                        read = [
                            extra[feature] if isinstance(step, Bias) else extra[at]
                            for step, extra in zip(reading, extras, strict=True)
                        ]
                        total = sums[i * _EACH + j]
                        T.buffer_store(y, epilogue_value(total, epilogue, read, output.dtype), [at])
    return result["func"]


def _keep(
    kept: Any, source: Any, first: Expr, count: Expr, column: Expr, inputs: int, thread: Expr
) -> None:
    """Store 64 rows by 16 columns as ``[column, row]``, zeros beyond the edges."""
    for turn in range(_SIDE * _COLUMNS // _THREADS):
        number = thread + turn * _THREADS
        row, at = number // _COLUMNS, number % _COLUMNS
        valid = tirx.all(first + row < count, column + at < inputs)
        index = tirx.if_then_else(valid, (first + row) * inputs + column + at, 0)
        value = tirx.Cast("float32", source[index])
        zero = tirx.const(0.0, "float32")
        T.buffer_store(kept, tirx.Select(valid, value, zero), [at * _STRIDE + row])


def _multiply(sums: Any, shared: Sequence[Any], thread: Expr) -> None:
    x, w = shared
    with T.serial(0, _COLUMNS) as k:
        for i in range(_EACH):
            for j in range(_EACH):
                a = x[k * _STRIDE + thread // 16 * _EACH + i]
                b = w[k * _STRIDE + thread % 16 + j * 16]
                at = i * _EACH + j
                T.buffer_store(sums, sums[at] + a * b, [at])
