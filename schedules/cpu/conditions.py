"""Conditions moved out of innermost loops.

Padding, concatenation and the like are expressions with conditions on the loop variable. A
condition that does not depend on it moves around the loop; one that holds from some element on, or
up to it, splits the loop there. What remains are plain loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm.sym import Analyzer
from tvm_ffi import WalkResult, structural_equal, structural_map, structural_walk

Expr = Any
_Stmt = Any
_ANALYZER = Analyzer()

_MOST = 6
"""Conditions that are moved out of one loop: each may double its code."""

_COMPARISONS = (tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE)


def hoist_conditions(
    loop: tirx.For, finish: Callable[[tirx.For], _Stmt], most: int = _MOST
) -> _Stmt:
    """Rewrite an innermost loop as loops without conditions, each of them finished.

    A loop with more than ``most`` conditions, or with others than comparisons of a linear
    expression, keeps them.
    """
    var = loop.loop_var
    for condition in comparisons(loop.body) if most else []:
        if not uses(condition, var):
            then, other = (_assume(loop.body, condition, holds) for holds in (True, False))
            bodies = [
                hoist_conditions(_with(loop, body), finish, most - 1) for body in (then, other)
            ]
            return tirx.IfThenElse(condition, *bodies)
        border = _border(condition, var)
        if border is None:
            continue
        first, below = border
        split = _ANALYZER.simplify(tirx.min(tirx.max(first - loop.min, 0), loop.extent))
        parts = []
        for start, extent, holds in (
            (loop.min, split, below),
            (loop.min + split, loop.extent - split, not below),
        ):
            extent = _ANALYZER.simplify(extent)
            if not (isinstance(extent, tirx.IntImm) and int(extent) <= 0):
                body = _assume(loop.body, condition, holds)
                body = replace(body, var, _ANALYZER.simplify(start + var))
                zero = tirx.const(0, var.ty.dtype)
                part = tirx.For(var, zero, extent, loop.kind, body)
                parts.append(hoist_conditions(_renamed(part), finish, most - 1))
        return tirx.SeqStmt(parts) if len(parts) > 1 else parts[0]
    return finish(loop)


def uses(node: Any, var: Any) -> bool:
    """Whether an expression or statement depends on a variable."""
    found: list[Any] = []
    structural_walk(node, (tirx.Var, lambda v: found.append(v) if v.same_as(var) else None))
    return bool(found)


def replace(node: Any, var: Any, value: Expr) -> Any:
    """An expression or statement with another value for a variable."""
    return structural_map(node, (tirx.Var, lambda v: value if v.same_as(var) else v))


def _with(loop: tirx.For, body: _Stmt) -> tirx.For:
    return _renamed(tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body))


def _renamed(loop: tirx.For) -> tirx.For:
    """The loop with a variable of its own: a variable must not be bound twice."""
    var = tirx.Var(loop.loop_var.name, loop.loop_var.ty)
    return tirx.For(var, loop.min, loop.extent, loop.kind, replace(loop.body, loop.loop_var, var))


def comparisons(body: _Stmt) -> list[Any]:
    """Each comparison that chooses between values or guards a statement, once."""
    found: list[Any] = []

    def known(condition: Any) -> bool:
        return any(structural_equal(condition, other) for other in found)

    def atoms(condition: Any) -> None:
        if isinstance(condition, (tirx.And, tirx.Or)):
            atoms(condition.a)
            atoms(condition.b)
        elif isinstance(condition, tirx.Not):
            atoms(condition.a)
        elif _is_call(condition, "likely"):
            atoms(condition.args[0])
        elif isinstance(condition, _COMPARISONS) and _pure(condition) and not known(condition):
            found.append(condition)

    structural_walk(
        body,
        (
            (tirx.For, lambda loop: WalkResult.SKIP),  # conditions in there depend on its variable
            (tirx.IfThenElse, lambda node: atoms(node.condition)),
            (tirx.Select, lambda node: atoms(node.condition)),
            (Call, lambda call: atoms(call.args[0]) if _is_call(call, "if_then_else") else None),
        ),
        order="pre",
    )
    return found


def _is_call(node: Any, name: str) -> bool:
    return isinstance(node, Call) and getattr(node.op, "name", "").split(".")[-1] == name


def _pure(condition: Any) -> bool:
    """Whether a condition can be evaluated anywhere: it reads no memory."""
    loads: list[Any] = []
    structural_walk(condition, (TensorLoad, loads.append))
    return not loads


def _border(condition: Any, var: Any) -> tuple[Expr, bool] | None:
    """First value of ``var`` at which a comparison changes, and whether it holds below that."""
    if not isinstance(condition, (tirx.LT, tirx.LE, tirx.GT, tirx.GE)):
        return None
    if isinstance(condition, (tirx.LT, tirx.LE)):
        less, more = condition.a, condition.b
    else:
        less, more = condition.b, condition.a
    strict = isinstance(condition, (tirx.LT, tirx.GT))
    # It holds where room >= 0.
    room = _ANALYZER.simplify(more - less - (1 if strict else 0))
    if "int" not in str(room.ty.dtype):
        return None
    step = _ANALYZER.simplify(replace(room, var, var + 1) - room)
    if not isinstance(step, tirx.IntImm) or int(step) == 0:
        return None
    at_zero = replace(room, var, tirx.const(0, var.ty.dtype))
    if int(step) < 0:  # at_zero - s v >= 0 up to at_zero // s
        return _ANALYZER.simplify(tirx.floordiv(at_zero, -int(step)) + 1), True
    return _ANALYZER.simplify(-tirx.floordiv(at_zero, int(step))), False


def _assume(body: _Stmt, condition: Any, holds: bool) -> _Stmt:
    """The body where a condition is known, without what can then not be reached."""
    known = tirx.const(holds, "bool")

    def compare(node: Any) -> Any:
        return known if structural_equal(node, condition) else node

    def choose(node: Any) -> Any:
        branch = _decided(node.condition)
        return node if branch is None else node.true_value if branch else node.false_value

    def choose_call(call: Any) -> Any:
        if not _is_call(call, "if_then_else"):
            return call
        test, *values = call.args
        branch = _decided(test)
        if branch is None:
            return tirx.if_then_else(_ANALYZER.simplify(test), *values)
        return values[0] if branch else values[1]

    def guard(node: Any) -> Any:
        branch = _decided(node.condition)
        if branch is None:
            return node
        return node.then_case if branch else node.else_case or tirx.Evaluate(0)

    return structural_map(
        body,
        (
            *((kind, compare) for kind in _COMPARISONS),
            (tirx.Select, choose),
            (Call, choose_call),
            (tirx.IfThenElse, guard),
        ),
    )


def _decided(condition: Any) -> bool | None:
    simple = _ANALYZER.simplify(condition.args[0] if _is_call(condition, "likely") else condition)
    return bool(int(simple)) if isinstance(simple, tirx.IntImm) else None
