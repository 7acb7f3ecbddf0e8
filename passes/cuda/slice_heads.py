"""Slice heads: attention reads q, k and v where one layer wrote them all.

Matches ``sparse_tvm.attention`` whose q, k or v is a part of a tensor ``[batch, rows, features]``
that was split along its features, and lets the kernel begin at that part's first feature: nothing
is copied. Leaves alone parts that do not begin at a multiple of eight features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax, tirx

from sparse_tvm.operators import Attention
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program


@graph_pass()
def slice_heads(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _SliceHeads(program).run()


class _SliceHeads(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value, Attention)
        if found is None:
            return None
        parts = [self._part(arg) for arg in found.args[:3]]
        if not any(parts):
            return None
        (q, k, v), mask = found.args[:3], found.args[3:]
        (q, q_start), (k, k_start), (v, v_start) = (
            part or (arg, 0) for part, arg in zip(parts, (q, k, v), strict=True)
        )
        args = [self.new(arg) for arg in (q, k, v, *mask)]
        op = replace(found.op, starts=(q_start, k_start, v_start))
        return dialect.call(op, args, shape_of(var))

    def _part(self, expr: Any) -> tuple[Any, int] | None:
        """The tensor that ``expr`` is a part of, and the part's first feature."""
        item = self.graph.value(expr)
        if not isinstance(item, relax.TupleGetItem):
            return None
        split = self.graph.op(item.tuple_value, "split")
        if split is None:
            return None
        shape = shape_of(split.args[0])
        axis, features = int(split.attrs.axis) % len(shape), shape[-1]
        if axis != len(shape) - 1 or len(shape) != 3 or not isinstance(features, int):
            return None
        sections = split.attrs.indices_or_sections
        if isinstance(sections, tirx.IntImm | int):
            bounds = list(range(0, features, -(-features // int(sections))))
        else:
            bounds = [0, *(int(bound) for bound in sections)]
        start = bounds[item.index]
        return (split.args[0], start) if features % 8 == start % 8 == 0 else None
