"""The k largest or smallest elements along an axis, in order, with their indices."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import Expr, argument, prim_func


def top_k(
    shape: Sequence[Expr], axis: int, k: Expr, largest: bool, dtype: str, index_dtype: str
) -> tirx.PrimFunc:
    """Build the kernel x of ``shape`` -> values and indices, with extent ``k`` on ``axis``.

    Each element is inserted into the k best so far; of equal ones the first wins, as in ONNX.
    """
    outer, extent, inner = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
    best_shape = (*shape[:axis], k, *shape[axis + 1 :])

    def better(a: Expr, b: Expr) -> Expr:
        return a > b if largest else a < b

    with prim_func() as result:
        x = argument("x", shape, dtype)
        values = argument("values", best_shape, dtype)
        indices = argument("indices", best_shape, index_dtype)
        x = T.decl_buffer((outer, extent, inner), dtype, data=x.data)
        values = T.decl_buffer((outer, k, inner), dtype, data=values.data)
        indices = T.decl_buffer((outer, k, inner), index_dtype, data=indices.data)

        with T.parallel(0, outer * inner) as job:
            best = T.alloc_buffer((k,), dtype)
            where = T.alloc_buffer((k,), index_dtype)
            first, last = job // inner, job % inner
            with T.serial(
                0,
                extent
                if isinstance(k, int)
                else tirx.Select(k > 0, T.int64(1), T.int64(0)) * extent,
            ) as i:
                value = x[first, i, last]
                with T.If(tirx.any(i < k, better(value, best[k - 1]))), T.Then():
                    # Everything worse moves down by one; what was last falls out.
                    place = T.alloc_buffer((1,), "int32")
                    T.buffer_store(place, T.Cast("int32", tirx.min(i, k - 1)), [0])
                    with T.While(tirx.all(place[0] > 0, better(value, best[place[0] - 1]))):
                        T.buffer_store(best, best[place[0] - 1], [place[0]])
                        T.buffer_store(where, where[place[0] - 1], [place[0]])
                        T.buffer_store(place, place[0] - 1, [0])
                    T.buffer_store(best, value, [place[0]])
                    T.buffer_store(where, T.Cast(index_dtype, i), [place[0]])
            with T.serial(0, k) as j:
                T.buffer_store(values, best[j], [first, j, last])
                T.buffer_store(indices, where[j], [first, j, last])
    return result["func"]
