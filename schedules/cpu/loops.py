"""Innermost loops of lowered TIR, cut into vectors and a tail of any size.

What a schedule leaves serial is looked at loop by loop, cut first where an index wraps around, its
conditions moved out:

- a loop over consecutive elements becomes vectors, and one shorter vector for what is left;
- a reduction along consecutive elements keeps several vectors of partial results;
- a reduction over other loops keeps the elements it adds up to in registers meanwhile.

Reads a few elements apart (windows with strides) are loaded as vectors and shuffled. What reads in
another way, by computed indices say, is left as it is: LLVM has gathers for it. A symbolic extent
ends in scalar iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from itertools import product
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import structural_map, structural_walk

from sparse_tvm.schedules.cpu.conditions import comparisons, hoist_conditions, replace, uses
from sparse_tvm.schedules.cpu.lane_tiles import Expr
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.wraps import keep_apart, split_wraps

_Stmt = Any
_ANALYZER = Analyzer()

_PARTIAL = 4
"""Vectors of partial results: hides the latency of the additions."""

_MAX_STRIDE = 4
"""Elements between reads that are worth as many vector loads and a shuffle."""

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
    body = _LOWER(tvm.IRModule({"main": function}))["main"]

    def nest(loop: tirx.For) -> _Stmt:
        while isinstance(loop, tirx.For) and _once(loop):
            loop = replace(loop.body, loop.loop_var, loop.min)
        return _accumulate(loop, simd) or loop

    def finish(plain: tirx.For) -> _Stmt:
        return _vectorised(plain, simd)

    def finished(loop: tirx.For) -> _Stmt:
        if loop.kind not in (tirx.ForKind.SERIAL, tirx.ForKind.PARALLEL):
            return loop
        if loop.kind == tirx.ForKind.PARALLEL or not isinstance(loop.body, _LEAVES):
            return keep_apart(loop)
        return split_wraps(loop, lambda part: hoist_conditions(part, finish))

    nests = structural_map(body.body, (tirx.For, nest), order="pre")
    loops = structural_map(nests, ((tirx.For, finished), (tirx.AllocBuffer, _on_stack)))
    return body.with_body(loops)


_LEAVES = (tirx.BufferStore, tirx.IfThenElse)


def _vectorised(loop: tirx.For, simd: Simd) -> _Stmt:
    if isinstance(loop.body, tirx.BufferStore):
        return _cut(loop, simd) or _reduce(loop, simd) or loop
    return loop


def _once(loop: tirx.For) -> bool:
    return loop.kind == tirx.ForKind.SERIAL and _is(loop.extent, 1)


def _cut(loop: tirx.For, simd: Simd) -> _Stmt | None:
    """A loop over consecutive elements, in vectors."""
    store, var = loop.body, loop.loop_var
    if stride(store.buffer, store.indices, var) != 1 or not _reads_vectors(store.value, var):
        return None
    value = _multiplying(store.value, var)

    def strip(first: Expr, width: int) -> _Stmt:
        before, read = _loaded(value, var, first, width)
        return _in_order(
            *before,
            _lanes(var, width, lambda lane: _put(store, var, first + lane, read(lane))),
        )

    return _strips(loop, [simd.lanes], strip)


def _reduce(loop: tirx.For, simd: Simd) -> _Stmt | None:
    """A reduction over consecutive elements, in vectors of partial results."""
    store, var = loop.body, loop.loop_var
    found = _combination(store)
    if (
        found is None
        or str(store.buffer.dtype) != "float32"
        or stride(store.buffer, store.indices, var) != 0
        or not _reads_vectors(found[1], var)
    ):
        return None
    combine, term, identity = found
    width = _PARTIAL * simd.lanes
    partial = tirx.decl_buffer((width,), "float32", "partial")

    def add(first: Expr, width: int) -> _Stmt:
        before, read = _loaded(term, var, first, width)

        def step(lane: Expr) -> _Stmt:
            value = combine(tirx.BufferLoad(partial, [lane]), read(lane))
            return tirx.BufferStore(partial, value, [lane])

        return _in_order(*before, _lanes(var, width, step))

    start = tirx.Broadcast(tirx.const(identity, "float32"), width)
    first, *others = (partial[tirx.Ramp(i, 1, simd.lanes)] for i in range(0, width, simd.lanes))
    result = joined(reduce(combine, others, first), simd.lanes, combine)
    so_far = tirx.BufferLoad(store.buffer, store.indices)
    return _in_order(
        _on_stack(tirx.AllocBuffer(partial)),
        tirx.BufferStore(partial, start, [tirx.Ramp(0, 1, width)]),
        _strips(loop, [width, simd.lanes], add),
        tirx.BufferStore(store.buffer, combine(so_far, result), store.indices),
    )


def joined(vector: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """All lanes of a vector combined, by halves."""
    if lanes == 1:
        return vector
    half = lanes // 2
    whole = tirx.Var("whole", vector.ty)
    low, high = (tirx.Shuffle([whole], list(range(i, i + half))) for i in (0, half))
    return tirx.Let(whole, vector, joined(combine(low, high), half, combine))


def _accumulate(loop: tirx.For, simd: Simd) -> _Stmt | None:
    """Reduction loops around a loop over consecutive elements, turned inside out.

    The elements are cut into strips first, and each strip stays in registers while everything is
    added to it: of each row, if loops over a few rows lie between.
    """
    *around, inner = _perfect(loop) or [None]
    if not around or not isinstance(inner.body, tirx.BufferStore):
        return None
    store, var = inner.body, inner.loop_var
    over_rows = [other for other in around if uses(list(store.indices), other.loop_var)]
    reduced = [other for other in around if other not in over_rows]
    found = _combination(store)
    if (
        found is None
        or not reduced
        or stride(store.buffer, store.indices, var) != 1
        or not all(isinstance(other.extent, tirx.IntImm) for other in over_rows)
        or not _reads_vectors(found[1], var)
    ):
        return None
    combine, term, _ = found
    rows = _rows(over_rows)
    vectors = min(_PARTIAL, simd.accumulators // len(rows))
    if not vectors:
        return None

    def strip(first: Expr, width: int) -> _Stmt:
        """One strip, of some vectors of every row."""
        start, step, end = [], [], []
        for row in rows:
            at_row, of_row = (_replace_all(part, row) for part in (store, term))
            for offset in range(0, width, simd.lanes):
                lanes = min(simd.lanes, width - offset)
                vector = _Sums(at_row, of_row, inner, first + offset, lanes, combine)
                start += vector.start
                step += vector.step
                end += vector.end
        return _in_order(*start, _nested(reduced, _in_order(*step)), *end)

    def rest(first: Expr, extent: Expr) -> _Stmt:
        at = tirx.Var("rest", var.ty)
        return _for(at, extent, _nested(around, replace(store, var, first + at)))

    known = isinstance(inner.extent, tirx.IntImm)
    widths = [vectors * simd.lanes] if known else [vectors * simd.lanes, simd.lanes]
    return _strips(inner, widths, strip, rest)


class _Sums:
    """One vector of what a reduction adds up, in a register."""

    def __init__(
        self,
        store: tirx.BufferStore,
        term: Expr,
        loop: tirx.For,
        first: Expr,
        lanes: int,
        combine: Callable[[Expr, Expr], Expr],
    ) -> None:
        var = loop.loop_var
        sums = tirx.decl_buffer((lanes,), store.buffer.dtype, "sums")
        before, read = _loaded(term, var, first, lanes)

        def load(lane: Expr) -> _Stmt:
            indices = [replace(index, var, first + lane) for index in store.indices]
            return tirx.BufferStore(sums, tirx.BufferLoad(store.buffer, indices), [lane])

        def add(lane: Expr) -> _Stmt:
            return tirx.BufferStore(
                sums, combine(tirx.BufferLoad(sums, [lane]), read(lane)), [lane]
            )

        def save(lane: Expr) -> _Stmt:
            return _put(store, var, first + lane, tirx.BufferLoad(sums, [lane]))

        self.start = [tirx.AllocBuffer(sums), _lanes(var, lanes, load)]
        self.step = [*before, _lanes(var, lanes, add)]
        self.end = [_lanes(var, lanes, save)]


def _rows(loops: list[tirx.For]) -> list[dict[Any, Expr]]:
    """The values of the loops' variables in each iteration."""
    values = [range(int(loop.extent)) for loop in loops]
    return [
        {loop.loop_var: loop.min + number for loop, number in zip(loops, numbers, strict=True)}
        for numbers in product(*values)
    ]


def _replace_all(node: Any, values: dict[Any, Expr]) -> Any:
    for var, value in values.items():
        node = replace(node, var, value)
    return node


def _nested(loops: list[tirx.For], body: _Stmt) -> _Stmt:
    """A body within copies of loops that have variables of their own."""
    for loop in reversed(loops):
        var = tirx.Var(loop.loop_var.name, loop.loop_var.ty)
        body = tirx.For(var, loop.min, loop.extent, loop.kind, replace(body, loop.loop_var, var))
    return body


def _perfect(loop: Any) -> list[tirx.For]:
    """The loops of a perfect nest of serial loops, but those of one iteration."""
    if not isinstance(loop, tirx.For) or loop.kind != tirx.ForKind.SERIAL:
        return []
    body = loop.body
    while isinstance(body, tirx.For) and _once(body):
        body = replace(body.body, body.loop_var, body.min)
    return [tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body), *_perfect(body)]


def _on_stack(alloc: tirx.AllocBuffer) -> _Stmt:
    """Keep a small buffer on the stack: TVM asks the heap for all above a kilobyte."""
    sizes = [
        int(dim) if isinstance(dim, tirx.IntImm) else _STACK_BYTES for dim in alloc.buffer.shape
    ]
    if math.prod(sizes) * 8 > _STACK_BYTES:
        return alloc
    return tirx.AllocBuffer(alloc.buffer, {"disable_lower_builtin": tirx.const(1, "int32")})


def _strips(
    loop: tirx.For,
    widths: list[int],
    strip: Callable[[Expr, int], _Stmt],
    rest: Callable[[Expr, Expr], _Stmt] | None = None,
) -> _Stmt:
    """The loop as strips of each width in turn, then what is left: in one vector if static.

    ``strip`` gets its first element and its width; ``rest`` a symbolic number of elements, of which
    the loop's own body makes one after the other if it is not given.
    """
    dtype, extent = loop.loop_var.ty.dtype, loop.extent
    start: Expr = tirx.const(0, dtype)
    parts = []
    for width in widths:
        count = _ANALYZER.simplify(tirx.floordiv(extent - start, width))
        if _is(count, 1):
            parts.append(strip(loop.min + start, width))
        elif not _is(count, 0):
            index = tirx.Var("strip", loop.loop_var.ty)
            parts.append(_for(index, count, strip(loop.min + start + index * width, width)))
        start = _ANALYZER.simplify(start + count * width)
    left = _ANALYZER.simplify(extent - start)
    if not isinstance(left, tirx.IntImm):
        at = tirx.Var("rest", loop.loop_var.ty)
        first = loop.min + start
        one = replace(loop.body, loop.loop_var, first + at)
        parts.append(rest(first, left) if rest else _for(at, left, one))
    elif int(left):
        parts.append(strip(loop.min + start, int(left)))
    return _in_order(*parts)


def _lanes(like: Any, width: int, body: Callable[[Expr], _Stmt]) -> _Stmt:
    """A statement for each lane of a vector."""
    lane = tirx.Var("lane", like.ty)
    if width == 1:
        return body(tirx.const(0, like.ty.dtype))
    return _for(lane, tirx.const(width, like.ty.dtype), body(lane), tirx.ForKind.VECTORIZED)


def _for(var: Any, extent: Expr, body: _Stmt, kind: Any = tirx.ForKind.SERIAL) -> _Stmt:
    return tirx.For(var, tirx.const(0, var.ty.dtype), extent, kind, body)


def _in_order(*statements: _Stmt) -> _Stmt:
    return tirx.SeqStmt(statements) if len(statements) > 1 else statements[0]


def _put(store: Any, var: Any, at: Expr, value: Expr) -> _Stmt:
    """The store at another element, of another value."""
    indices = [replace(index, var, at) for index in store.indices]
    return tirx.BufferStore(store.buffer, value, indices)


def _loaded(
    value: Expr, var: Any, first: Expr, width: int
) -> tuple[list[_Stmt], Callable[[Expr], Expr]]:
    """A strip's reads of elements a few apart, into vectors; and the value of one lane."""
    before: list[_Stmt] = []

    def load(node: Any) -> Any:
        apart = stride(node.source, node.indices, var)
        if apart is None or apart < 2 or width == 1:
            return node
        vector = tirx.decl_buffer((width,), node.source.dtype, "apart")

        def some(offset: int) -> Expr:
            """As many consecutive elements, from this one on."""
            *outer, last = (replace(index, var, first) for index in node.indices)
            return tirx.BufferLoad(node.source, [*outer, tirx.Ramp(last + offset, 1, width)])

        starts = [i * width for i in range(apart - 1)] + [(apart - 1) * (width - 1)]
        picked = []
        for offset in range(0, apart * width, apart):
            which = min(offset // width, apart - 1)
            picked.append(which * width + offset - starts[which])
        together = tirx.Shuffle([some(start) for start in starts], picked)
        before.append(tirx.AllocBuffer(vector))
        before.append(tirx.BufferStore(vector, together, [tirx.Ramp(0, 1, width)]))
        return tirx.BufferLoad(vector, [var - first])

    changed = structural_map(value, (TensorLoad, load))

    def read(lane: Expr) -> Expr:
        return replace(changed, var, first + lane)

    return before, read


def _multiplying(value: Expr, var: Any) -> Expr:
    """Division by the same number in all lanes as multiplication, which is far faster.

    Not where something is rounded: a quotient's last bit tells halves from what is just below.
    """
    if _rounds(value):
        return value

    def multiply(node: Any) -> Any:
        if str(node.ty.dtype) != "float32" or uses(node.b, var):
            return node
        return node.a * (tirx.const(1.0, "float32") / node.b)

    return structural_map(value, (tirx.Div, multiply))


def _rounds(value: Expr) -> bool:
    found: list[Any] = []
    structural_walk(value, (tvm.ir.Call, lambda call: found.append(call.op)))
    return any(getattr(op, "name", "") == "tirx.nearbyint" for op in found)


def _is(value: Expr, number: int) -> bool:
    return isinstance(value, tirx.IntImm) and int(value) == number


def stride(buffer: Any, indices: Any, var: Any, extent: int | None = None) -> int | None:
    """How many elements apart accesses are for consecutive values of ``var``, if constant.

    ``extent`` tells that the variable stays below it.
    """
    (offset,) = buffer.offset_of(indices)
    if extent is not None:
        ranged = Analyzer()
        ranged.bind(var, tvm.ir.Range(*(tirx.const(n, var.ty.dtype) for n in (0, extent))))
        offset = ranged.simplify(offset)
    step = _ANALYZER.simplify(replace(offset, var, var + 1) - offset)
    return int(step) if isinstance(step, tirx.IntImm) else None


def _reads_vectors(value: Expr, var: Any) -> bool:
    """Whether everything ``value`` reads is the same along ``var``, consecutive or nearly so."""
    loads: list[Any] = []
    structural_walk(value, (TensorLoad, loads.append))
    steps = [stride(load.source, load.indices, var) for load in loads]
    most = (
        1 if comparisons(value) else _MAX_STRIDE
    )  # what a condition guards is read where it holds
    return all(step is not None and 0 <= step <= most for step in steps)


_COMBINATIONS: dict[Any, tuple[Callable[[Expr, Expr], Expr], float]] = {
    tirx.Add: (lambda a, b: a + b, 0.0),
    tirx.Mul: (lambda a, b: a * b, 1.0),
    tirx.Max: (tirx.max, -math.inf),
    tirx.Min: (tirx.min, math.inf),
}


def _combination(store: tirx.BufferStore) -> tuple[Any, Expr, float] | None:
    """Operator, term and identity of ``b[i] = op(b[i], term)``."""
    found = _COMBINATIONS.get(type(store.value))
    if found is None:
        return None
    combine, identity = found
    for kept, term in ((store.value.a, store.value.b), (store.value.b, store.value.a)):
        if isinstance(kept, TensorLoad) and kept.source.same_as(store.buffer):
            same = all(
                _is(_ANALYZER.simplify(i - j), 0)
                for i, j in zip(kept.indices, store.indices, strict=True)
            )
            if same:
                return combine, term, identity
    return None
