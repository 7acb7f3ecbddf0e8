"""Innermost loops of lowered TIR, cut into vectors and a tail of any size.

TVM's schedules vectorise only what a vector width divides, and reduce along consecutive elements
one by one. Here an innermost loop of any static extent becomes a loop of vectors and one shorter
vector, and a reduction keeps several vectors of partial results. A symbolic extent ends in scalar
iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import structural_map, structural_walk

from sparse_tvm.schedules.cpu.lane_tiles import Expr
from sparse_tvm.schedules.cpu.simd import Simd

_Stmt = Any
_ANALYZER = Analyzer()

_PARTIAL = 4
"""Vectors of partial results: hides the latency of the additions."""

_STACK_BYTES = 1 << 16

_LOWER = tvm.transform.Sequential(
    [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
    ]
)


def vectorise_innermost(function: tirx.PrimFunc, simd: Simd) -> tirx.PrimFunc:
    """Lower a scheduled function's blocks, and vectorise the innermost loops left serial."""
    lowered = _LOWER(tvm.IRModule({"main": function}))["main"]

    def visit(loop: tirx.For) -> _Stmt:
        if loop.kind != tirx.ForKind.SERIAL or not isinstance(loop.body, tirx.BufferStore):
            return loop
        return _cut(loop, simd) or _reduce(loop, simd) or loop

    body = structural_map(lowered.body, ((tirx.For, visit), (tirx.AllocBuffer, _on_stack)))
    return lowered.with_body(body)


def _cut(loop: tirx.For, simd: Simd) -> _Stmt | None:
    """A loop over consecutive elements, in vectors."""
    store, var = loop.body, loop.loop_var
    if _stride(store.buffer, store.indices, var) != 1 or not _reads_vectors(store.value, var):
        return None
    return _strips(loop, [simd.lanes], lambda at, _: _replace(store, var, at))


def _reduce(loop: tirx.For, simd: Simd) -> _Stmt | None:
    """A reduction over consecutive elements, in vectors of partial results."""
    store, var = loop.body, loop.loop_var
    found = _combination(store)
    if (
        found is None
        or _stride(store.buffer, store.indices, var) != 0
        or not _reads_vectors(found[1], var)
    ):
        return None
    combine, term, identity = found
    dtype, width = str(store.buffer.dtype), _PARTIAL * simd.lanes
    partial = tirx.decl_buffer((width,), dtype, "partial")

    def add(at: Expr, lane: Expr) -> _Stmt:
        value = combine(tirx.BufferLoad(partial, [lane]), _replace(term, var, at))
        return tirx.BufferStore(partial, value, [lane])

    start = tirx.Broadcast(tirx.const(identity, dtype), width)
    first, *others = (partial[tirx.Ramp(i, 1, simd.lanes)] for i in range(0, width, simd.lanes))
    result = _joined(reduce(combine, others, first), simd.lanes, combine)
    before = tirx.BufferLoad(store.buffer, store.indices)
    return tirx.SeqStmt(
        [
            tirx.AllocBuffer(partial),
            tirx.BufferStore(partial, start, [tirx.Ramp(0, 1, width)]),
            _strips(loop, [width, simd.lanes], add),
            tirx.BufferStore(store.buffer, combine(before, result), store.indices),
        ]
    )


def _joined(vector: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """All lanes of a vector combined, by halves."""
    if lanes == 1:
        return vector
    half = lanes // 2
    whole = tirx.Var("whole", vector.ty)
    low, high = (tirx.Shuffle([whole], list(range(i, i + half))) for i in (0, half))
    return tirx.Let(whole, vector, _joined(combine(low, high), half, combine))


def _on_stack(alloc: tirx.AllocBuffer) -> _Stmt:
    """Keep a small buffer on the stack: TVM asks the heap for all above a kilobyte."""
    sizes = [
        int(dim) if isinstance(dim, tirx.IntImm) else _STACK_BYTES for dim in alloc.buffer.shape
    ]
    if math.prod(sizes) * 8 > _STACK_BYTES:
        return alloc
    return tirx.AllocBuffer(alloc.buffer, {"disable_lower_builtin": tirx.const(1, "int32")})


def _strips(loop: tirx.For, widths: list[int], body: Callable[[Expr, Expr], _Stmt]) -> _Stmt:
    """The loop as strips of each width in turn, then what is left: in one vector if static.

    ``body`` gets an element's index and the same counted from the start of its strip.
    """
    dtype, extent = loop.loop_var.ty.dtype, loop.extent
    start: Expr = tirx.const(0, dtype)
    parts = []

    def strip(first: Expr, width: Expr, kind: Any = tirx.ForKind.VECTORIZED) -> _Stmt:
        lane = tirx.Var("lane", loop.loop_var.ty)
        return _for(lane, width, body(first + lane, lane), kind)

    for width in widths:
        count = _ANALYZER.simplify(tirx.floordiv(extent - start, width))
        if not _is_zero(count):
            index = tirx.Var("strip", loop.loop_var.ty)
            parts.append(_for(index, count, strip(start + index * width, tirx.const(width, dtype))))
            start = _ANALYZER.simplify(start + count * width)
    rest = _ANALYZER.simplify(extent - start)
    if isinstance(rest, tirx.IntImm) and int(rest) > 0:
        parts.append(strip(start, rest))
    elif not isinstance(rest, tirx.IntImm):
        parts.append(strip(start, rest, tirx.ForKind.SERIAL))
    return tirx.SeqStmt(parts) if len(parts) > 1 else parts[0]


def _for(var: Any, extent: Expr, body: _Stmt, kind: Any = tirx.ForKind.SERIAL) -> _Stmt:
    return tirx.For(var, tirx.const(0, var.ty.dtype), extent, kind, body)


def _is_zero(value: Expr) -> bool:
    return isinstance(value, tirx.IntImm) and int(value) == 0


def _replace(node: Any, var: Any, value: Expr) -> Any:
    return structural_map(node, (tirx.Var, lambda v: value if v.same_as(var) else v))


def _stride(buffer: Any, indices: Any, var: Any) -> int | None:
    """How many elements apart accesses are for consecutive values of ``var``, if constant."""
    (offset,) = buffer.offset_of(indices)
    step = _ANALYZER.simplify(_replace(offset, var, var + 1) - offset)
    return int(step) if isinstance(step, tirx.IntImm) else None


def _reads_vectors(value: Expr, var: Any) -> bool:
    """Whether everything ``value`` reads is consecutive along ``var``, or the same."""
    loads: list[Any] = []
    structural_walk(value, (TensorLoad, loads.append))
    return all(_stride(load.source, load.indices, var) in (0, 1) for load in loads)


_COMBINATIONS: dict[Any, tuple[Callable[[Expr, Expr], Expr], float]] = {
    tirx.Add: (lambda a, b: a + b, 0.0),
    tirx.Mul: (lambda a, b: a * b, 1.0),
    tirx.Max: (tirx.max, -math.inf),
    tirx.Min: (tirx.min, math.inf),
}


def _combination(store: tirx.BufferStore) -> tuple[Any, Expr, float] | None:
    """Operator, term and identity of ``b[i] = op(b[i], term)``, for float32."""
    found = _COMBINATIONS.get(type(store.value))
    if found is None or str(store.buffer.dtype) != "float32":
        return None
    combine, identity = found
    for kept, term in ((store.value.a, store.value.b), (store.value.b, store.value.a)):
        if isinstance(kept, TensorLoad) and kept.source.same_as(store.buffer):
            same = all(
                _is_zero(_ANALYZER.simplify(i - j))
                for i, j in zip(kept.indices, store.indices, strict=True)
            )
            if same:
                return combine, term, identity
    return None
