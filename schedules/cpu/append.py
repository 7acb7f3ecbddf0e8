"""Tensors ``[lead, rows, size]`` behind each other along their rows."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import Expr, argument, prim_func, ramp, scalar
from sparse_tvm.schedules.cpu.simd import Simd

_ROWS_PER_JOB = 256


def append_rows(lead: Expr, rows: Sequence[Expr], size: int, simd: Simd) -> tirx.PrimFunc:
    """Build the kernel x_0 ``[lead, rows[0], size]``, x_1, ... -> y ``[lead, sum(rows), size]``."""
    total = sum(rows[1:], rows[0])
    with prim_func() as result:
        parts = [argument(f"x_{i}", (lead, count, size)) for i, count in enumerate(rows)]
        y = argument("y", (lead, total, size))
        jobs = (total + (_ROWS_PER_JOB - 1)) // _ROWS_PER_JOB
        with T.parallel(0, lead * jobs) as job:
            at = scalar(job // jobs)
            start = scalar(job % jobs * _ROWS_PER_JOB, "int64")
            stop = scalar(tirx.min(start + _ROWS_PER_JOB, total), "int64")
            begin: Expr = 0
            for part, count in zip(parts, rows, strict=True):
                first = scalar(tirx.max(start, begin), "int64")
                here = tirx.max(tirx.min(stop, begin + count) - first, 0)
                with T.serial(0, here) as i, T.serial(0, size // simd.lanes) as vector:
                    features = ramp(vector * simd.lanes, simd)
                    row = part[at, first - begin + i, features]
                    T.buffer_store(y, row, [at, first + i, features])
                begin = begin + count
    return result["func"]
