"""Read heads: attention reads q, k and v where they lie by heads, and shared heads once.

Matches ``sparse_tvm.attention`` in float32 whose q, k or v was merged from heads,
``reshape(permute_dims(t, [0, 2, 1, 3]))`` of ``[batch, heads, rows, features]``, as after rotary
positions or out of a cache, and lets the kernel read ``t``, or what ``t`` was split from, if that
is all of it. Keys and values of fewer heads, each repeated for several of q's
(``reshape(broadcast_to(...))``), are read unrepeated. Nothing is copied then. Leaves alone
attention in other precisions, whose operands are rounded anyway, and k and v that are repeated
differently.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm import relax

from sparse_tvm.operators import FLOAT32, Attention
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, product, same, same_dim, same_shape, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program


@graph_pass()
def read_heads(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _ReadHeads(program).run()


@dataclass(frozen=True)
class _Operand:
    """A tensor in rows, ``batch`` times ``rows`` of ``heads * size`` features, or by heads."""

    expr: Any
    by_heads: bool
    batch: Any
    rows: Any
    heads: int


class _ReadHeads(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value, Attention)
        if found is None or found.op.types != FLOAT32:
            return None
        heads = found.op.heads
        q, *plain = (self._operand(arg, heads) for arg in found.args[:3])
        k, v = map(self._unrepeated, plain)
        if k.heads != v.heads:
            k, v = plain
        if all(same(each.expr, arg) for each, arg in zip((q, k, v), found.args, strict=False)):
            return None
        op = replace(
            found.op,
            by_heads=(q.by_heads, k.by_heads, v.by_heads),
            key_heads=k.heads if k.heads != heads else None,
        )
        operands = [self._rows(each) for each in (q, k, v)]
        return dialect.call(op, [*operands, *map(self.new, found.args[3:])], shape_of(var))

    def _operand(self, expr: Any, heads: int) -> _Operand:
        """What an operand in rows was merged from."""
        batch, rows, features = shape_of(expr)
        merged = self.graph.op(expr, "reshape")
        source = self._swapped(merged.args[0]) if merged is not None else None
        by_heads = (batch, heads, rows, features // heads)
        if source is not None and same_shape(shape_of(source), by_heads):
            unsplit = self._unsplit(source, batch, rows, features)
            if unsplit is not None:
                return _Operand(unsplit, False, batch, rows, heads)
            return _Operand(source, True, batch, rows, heads)
        return _Operand(expr, False, batch, rows, heads)

    def _unrepeated(self, operand: _Operand) -> _Operand:
        """The heads that were repeated to make these, in rows if they were split from such."""
        outer = self.graph.op(operand.expr, "reshape") if operand.by_heads else None
        repeated = self.graph.op(outer.args[0], "broadcast_to") if outer is not None else None
        inner = None
        if repeated is not None:
            inner = self.graph.op(repeated.args[0], "reshape", "expand_dims")
        if inner is None or len(shape_of(inner.args[0])) != 4:
            return operand
        source = inner.args[0]
        batch, heads, rows, size = shape_of(source)
        shared = operand.heads // heads if isinstance(heads, int) else 0
        if not same_shape(shape_of(repeated), (batch, heads, shared, rows, size)):
            return operand
        unsplit = self._unsplit(source, batch, rows, heads * size)
        if unsplit is not None:
            return _Operand(unsplit, False, batch, rows, heads)
        return _Operand(source, True, batch, rows, heads)

    def _unsplit(self, heads: Any, batch: Any, rows: Any, features: int) -> Any:
        """The tensor in rows that heads were split from, if it has no other features."""
        split = self._swapped(heads)
        unsplit = self.graph.op(split, "reshape") if split is not None else None
        if unsplit is None:
            return None
        merged = shape_of(unsplit.args[0])
        whole = same_dim(merged[-1], features) and same_dim(product(merged[:-1]), batch * rows)
        return unsplit.args[0] if whole else None

    def _swapped(self, expr: Any) -> Any:
        """``t`` of ``permute_dims(t, [0, 2, 1, 3])``."""
        call = self.graph.op(expr, "permute_dims")
        axes = [int(axis) for axis in call.attrs.axes or ()] if call is not None else None
        return call.args[0] if call is not None and axes == [0, 2, 1, 3] else None

    def _rows(self, operand: _Operand) -> Any:
        """An operand of the new call; in rows it has three axes."""
        new, shape = self.new(operand.expr), shape_of(operand.expr)
        if operand.by_heads or len(shape) == 3:
            return new
        return self.emit(relax.op.reshape(new, (operand.batch, operand.rows, shape[-1])))
