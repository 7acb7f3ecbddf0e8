"""Loops cut where an index wraps around.

A reshape behind other operators reads elements by the remainder of its own index: of ``i % 8``
say. Cut every 8 elements, the remainder is the variable of the inner loop, along which everything
is consecutive. It also keeps remainders from LLVM, whose vectoriser takes ``c + i % 8`` to be
consecutive for all ``i``: where it proves that ``c + i`` does not overflow 32 bits, it believes the
same of the three bits that ``i % 8`` has. Loops around others are not cut, but kept from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import tirx
from tvm.sym import Analyzer
from tvm_ffi import structural_equal, structural_map, structural_walk

from sparse_tvm.schedules.cpu.conditions import replace, uses

_Expr = Any
_Stmt = Any
_ANALYZER = Analyzer()

_LEAST = 8
"""Elements that are worth a loop; fewer are written out."""


_MOST_CUTS = 3
"""Cuts, one in the other, where periods begin anywhere: each makes bounds three times as long."""


def split_wraps(loop: tirx.For, finish: Callable[[tirx.For], _Stmt], cuts: int = 0) -> _Stmt:
    """Rewrite an innermost loop as loops within which no index wraps, each of them finished.

    Where more indices wrap than there are to be ``cuts``, the loop stays as it is.
    """
    found = _wrap(loop, 1)
    if found is None:
        if _wrap(loop, -1) is None:
            return finish(loop)
        return split_wraps(_backwards(loop), finish, cuts)
    if cuts == _MOST_CUTS:
        return _element_by_element(loop)
    offset, size = found
    dtype = loop.loop_var.ty.dtype
    first = _ANALYZER.simplify(tirx.floormod(offset, size))  # of the first element, in its period
    end = first + loop.extent
    outer, inner = (tirx.Var(name, loop.loop_var.ty) for name in ("period", "element"))
    whole = all(_is_zero(part) for part in (first, tirx.floormod(loop.extent, size)))
    low = tirx.const(0, dtype) if whole else tirx.max(first - outer * size, 0)
    high = tirx.const(size, dtype) if whole else tirx.min(end - outer * size, size)
    extent = _ANALYZER.simplify(high - low)

    def body(element: _Expr) -> _Stmt:
        return _within(loop, offset, size, outer, element, loop.min + outer * size - first)

    zero = tirx.const(0, dtype)
    periods = _ANALYZER.simplify(tirx.floordiv(end + (size - 1), size))
    if whole and size < _LEAST and not _allocated(loop.body):
        listed = [body(tirx.const(element, dtype)) for element in range(size)]
        return split_wraps(
            tirx.For(outer, zero, periods, loop.kind, tirx.SeqStmt(listed)), lambda rest: rest
        )
    part = tirx.For(inner, zero, extent, loop.kind, body(_ANALYZER.simplify(low + inner)))
    rest = split_wraps(_bounded(part), finish, cuts + (not whole))
    return tirx.For(outer, zero, periods, loop.kind, rest)


def keep_apart(loop: tirx.For) -> tirx.For:
    """A loop around others, kept from becoming vectors where a remainder of its variable is read.

    LLVM unrolls the inner loops, where they are short, and takes this one to be the innermost.
    """
    found: list[Any] = []

    def look(node: Any) -> None:
        if isinstance(node.b, tirx.IntImm) and uses(node.a, loop.loop_var):
            found.append(node)

    structural_walk(loop.body, (tirx.FloorMod, look))
    return _element_by_element(loop) if found else loop


def _bounded(loop: tirx.For) -> tirx.For:
    """The loop with quotients and remainders simplified by what its variable stays below."""
    if not isinstance(loop.extent, tirx.IntImm):
        return loop
    ranged = Analyzer()
    ranged.bind(loop.loop_var, tvm.ir.Range.from_min_extent(loop.min, loop.extent))

    def simpler(node: Any) -> Any:
        return ranged.simplify(node) if uses(node, loop.loop_var) else node

    body = structural_map(loop.body, ((tirx.FloorMod, simpler), (tirx.FloorDiv, simpler)))
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body)


def _allocated(body: _Stmt) -> list[Any]:
    """Memory of a statement's own, which copies of it would share."""
    found: list[Any] = []
    structural_walk(body, (tirx.AllocBuffer, lambda node: found.append(node.buffer)))
    return found


def _element_by_element(loop: tirx.For) -> tirx.For:
    """The loop, out of which LLVM makes no vectors: it does not where something is prefetched."""
    stores: list[tirx.BufferStore] = []
    structural_walk(loop.body, (tirx.BufferStore, stores.append))
    own = _allocated(loop.body)
    outside = [store for store in stores if not any(store.buffer.same_as(one) for one in own)]
    if not outside:
        return loop
    target = tirx.address_of(outside[0].buffer[tuple(0 for _ in outside[0].indices)])
    write, all_levels, data = 1, 3, 1  # of LLVM's intrinsic
    numbers = [tirx.const(number, "int32") for number in (write, all_levels, data)]
    ask = tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", target, *numbers))
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, tirx.SeqStmt([ask, loop.body]))


def _backwards(loop: tirx.For) -> tirx.For:
    var = tirx.Var(loop.loop_var.name, loop.loop_var.ty)
    last = loop.min + loop.extent - 1
    body = replace(loop.body, loop.loop_var, _ANALYZER.simplify(last + loop.min - var))
    return tirx.For(var, loop.min, loop.extent, loop.kind, body)


def _wrap(loop: tirx.For, direction: int) -> tuple[_Expr, int] | None:
    """The shortest period of a remainder that grows, or falls, by 1 with each iteration.

    Also what is divided at the loop's start.
    """
    found: list[tuple[int, _Expr]] = []
    var = loop.loop_var

    def look(node: Any) -> None:
        size = node.b
        if not isinstance(size, tirx.IntImm) or int(size) < 2 or not uses(node.a, var):
            return
        step = _ANALYZER.simplify(replace(node.a, var, var + 1) - node.a)
        if isinstance(step, tirx.IntImm) and int(step) == direction:
            found.append((int(size), _ANALYZER.simplify(replace(node.a, var, loop.min))))

    structural_walk(loop.body, (tirx.FloorMod, look))
    if not found:
        return None
    size, offset = min(found, key=lambda wrap: wrap[0])
    return offset, size


def _within(
    loop: tirx.For, offset: _Expr, size: int, outer: _Expr, element: _Expr, value: _Expr
) -> _Stmt:
    """The body for one element of a period, whose quotients and remainders are then known."""
    var = loop.loop_var
    quotient = _ANALYZER.simplify(tirx.floordiv(offset, size) + outer)

    def same(node: Any) -> bool:
        if not isinstance(node.b, tirx.IntImm) or int(node.b) != size or not uses(node.a, var):
            return False
        start = _ANALYZER.simplify(replace(node.a, var, loop.min) - offset)
        step = _ANALYZER.simplify(replace(node.a, var, var + 1) - node.a)
        return _is_zero(start) and structural_equal(step, tirx.const(1, var.ty.dtype))

    known = structural_map(
        loop.body,
        (
            (tirx.FloorMod, lambda node: element if same(node) else node),
            (tirx.FloorDiv, lambda node: quotient if same(node) else node),
        ),
    )
    return replace(known, var, _ANALYZER.simplify(value + element))


def _is_zero(value: _Expr) -> bool:
    simple = _ANALYZER.simplify(value)
    return isinstance(simple, tirx.IntImm) and int(simple) == 0
