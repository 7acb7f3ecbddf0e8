"""Recognise multi-head attention, however its heads are split and its scores are scaled.

Matches, around a soft-max over the last axis,

    merge(matmul(softmax(scale * matmul(split(q), split(k)^T) + mask), split(v)))

where ``split`` is ``permute_dims(reshape(t, [B, S, H, D]), [0, 2, 1, 3])`` (for k also with the
last two axes already swapped), ``merge`` its inverse, the scale a constant on the scores or on q
and k, and the mask any float tensor that broadcasts to ``[B, H, Sq, Sk]``; and turns it into one
``sparse_tvm.attention`` over the unsplit q, k, v, which keeps the scores in cache. What does not
match is left to separate kernels, and a note says which part was not recognised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax

from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import (
    Rewrite,
    dtype_of,
    op_name,
    product,
    same_dim,
    same_shape,
    scalar_value,
    shape_of,
)
from sparse_tvm.passes.program import Program


def fuse_attention(program: Program) -> Program:
    """Apply the pass."""
    return _FuseAttention(program).run()


class _NotAttention(Exception):
    """Raised with the part of the pattern that is missing."""


@dataclass
class _Heads:
    """A tensor seen as ``[B, H, S, D]`` (or ``[B, H, D, S]``), and the tensor it was split from."""

    source: Any
    batch: Any
    heads: int
    rows: Any
    size: int


class _FuseAttention(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) != "relax.reshape":
            return None
        merged = self.graph.op(value.args[0], "permute_dims")
        if merged is None or _axes(merged) != [0, 2, 1, 3]:
            return None
        weighted = self.graph.op(merged.args[0], "matmul")
        if weighted is None:
            return None
        softmax = self.graph.op(weighted.args[0], "nn.softmax")
        if softmax is None or softmax.attrs.axis not in (-1, 3):
            return None
        try:
            return self._attention(var, softmax, weighted)
        except _NotAttention as reason:
            self.program.notes.append(f"attention at {var.name} runs unfused: {reason}")
            return None

    def _attention(self, var: relax.Var, softmax: Any, weighted: Any) -> Any:
        scores, scale, mask = self._scores(softmax.args[0])
        q, q_scale = self._split(scores.args[0], transposed=False, what="q")
        k, k_scale = self._split(scores.args[1], transposed=True, what="k")
        v, v_scale = self._split(weighted.args[1], transposed=False, what="v")
        if v_scale != 1.0:
            raise _NotAttention("v is scaled")
        if (k.heads, v.heads) != (q.heads, q.heads) or not same_dim(k.rows, v.rows):
            raise _NotAttention("q, k and v have different heads or lengths")
        rows = product(shape_of(var)[:-1])
        if shape_of(var)[-1] != q.heads * v.size or not same_dim(rows, q.batch * q.rows):
            raise _NotAttention("heads are not merged back")
        args = [self._rows(t) for t in (q, k, v)]
        if mask is not None:
            mask_shape = (1,) * (4 - len(shape_of(mask))) + shape_of(mask)
            args.append(self.emit(relax.op.reshape(self.new(mask), mask_shape)))
        merged = dialect.call(
            "attention",
            args,
            (q.batch, q.rows, q.heads * v.size),
            heads=q.heads,
            scale=scale * q_scale * k_scale,
            masked=mask is not None,
        )
        return relax.op.reshape(self.emit(merged, "attention"), shape_of(var))

    def _rows(self, heads: _Heads) -> Any:
        """The unsplit tensor as ``[B, S, H * D]``."""
        shape = (heads.batch, heads.rows, heads.heads * heads.size)
        new = self.new(heads.source)
        return new if same_shape(shape_of(heads.source), shape) else self.emit(relax.op.reshape(new, shape))

    def _scores(self, expr: Any) -> tuple[Any, float, Any]:
        """The matmul, scale and mask of ``scale * matmul + mask``."""
        mask = None
        total = self.graph.op(expr, "add")
        if total is not None:
            for scores, other in (tuple(total.args), tuple(total.args)[::-1]):
                if self._scaled_matmul(scores) is not None:
                    expr, mask = scores, other
                    break
            else:
                raise _NotAttention("the soft-max is over a sum without a matmul")
        found = self._scaled_matmul(expr)
        if found is None:
            raise _NotAttention(f"the soft-max is over {op_name(self.graph.value(expr))}")
        if mask is not None and (dtype_of(mask) != "float32" or len(shape_of(mask)) > 4):
            raise _NotAttention(f"the mask is {dtype_of(mask)} {shape_of(mask)}")
        return *found, mask

    def _scaled_matmul(self, expr: Any) -> tuple[Any, float] | None:
        base, scale = self._unscale(expr)
        product = self.graph.op(base, "matmul")
        return (product, scale) if product is not None else None

    def _unscale(self, expr: Any) -> tuple[Any, float]:
        """Take constant factors off ``expr``."""
        scale = 1.0
        while (call := self.graph.op(expr, "multiply", "divide")) is not None:
            a, b = call.args
            divide = op_name(call) == "relax.divide"
            if (number := scalar_value(b)) is not None:
                expr, scale = a, scale / number if divide else scale * number
            elif not divide and (number := scalar_value(a)) is not None:
                expr, scale = b, scale * number
            else:
                break
        return expr, scale

    def _split(self, expr: Any, transposed: bool, what: str) -> tuple[_Heads, float]:
        """Look through ``permute_dims(reshape(t))`` and constant factors."""
        expr, scale = self._unscale(expr)
        order = [0, 1, 2, 3]
        while (call := self.graph.op(expr, "permute_dims")) is not None:
            axes = _axes(call)
            order = [axes[i] for i in order]
            expr, factor = self._unscale(call.args[0])
            scale *= factor
        if order != ([0, 2, 3, 1] if transposed else [0, 2, 1, 3]):
            raise _NotAttention(f"{what} is not split into heads (axes {order})")
        reshape = self.graph.op(expr, "reshape")
        batch, rows, heads, size = shape_of(expr)
        source = reshape.args[0] if reshape is not None else None
        known = isinstance(heads, int) and isinstance(size, int)
        if source is None or not known or shape_of(source)[-1] != heads * size:
            raise _NotAttention(f"{what} is not a split of its last axis")
        return _Heads(source, batch, heads, rows, size), scale


def _axes(call: Any) -> list[int]:
    rank = len(shape_of(call.args[0]))
    axes = call.attrs.axes
    return [int(a) for a in axes] if axes is not None else list(range(rank))[::-1]
