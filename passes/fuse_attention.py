"""Recognise multi-head attention, however its heads are split and its scores are scaled.

Matches, around a soft-max over the last axis,

    merge(matmul(softmax(scale * matmul(split(q), split(k)^T) + mask), split(v)))

where ``split`` is ``permute_dims(reshape(t, [B, S, H, D]), [0, 2, 1, 3])`` (k transposed besides,
in one step or several) or any tensor of heads, as after rotary positions, ``merge`` the inverse of
a split, the scale a constant on the scores or on q and k, and the mask any sum of float tensors
that broadcast to ``[B, H, Sq, Sk]``, or ``where(condition, scores, very negative)``; a guard that
replaces NaN after the soft-max is looked through, since the kernel makes none. It becomes one
``sparse_tvm.attention`` over the unsplit q, k, v, which keeps the scores in cache. What does not
match is left to separate kernels, and a note says which part was not recognised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.operators import Attention
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import (
    Rewrite,
    dtype_of,
    op_name,
    product,
    same,
    same_dim,
    same_shape,
    scalar_value,
    shape_of,
)
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.passes.set_precision import attention_form


@graph_pass()
def fuse_attention(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FuseAttention(program, context).run()


class _NotAttention(Exception):
    """Raised with the part of the pattern that is missing."""


_VERY_NEGATIVE = -1e4


@dataclass(frozen=True)
class _Addend:
    """A term of the scores: ``expr``, or ``low`` wherever a condition drops a score."""

    expr: Any
    condition: Any = None
    low: float = 0.0
    keep_where: bool = True


@dataclass
class _Heads:
    """A tensor seen as ``[B, H, S, D]`` (or ``[B, H, D, S]``), and the tensor it was split from.

    Heads that were changed since, as by rotary positions, are their own source; if ``leading``, it
    has them before its rows.
    """

    source: Any
    batch: Any
    heads: int
    rows: Any
    size: int
    leading: bool = False


class _FuseAttention(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self._masks: dict[Any, Any] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) != "relax.reshape":
            return None
        merged = self.graph.op(value.args[0], "permute_dims")
        if merged is None or _axes(merged) != [0, 2, 1, 3]:
            return None
        weighted = self.graph.op(merged.args[0], "matmul")
        if weighted is None:
            return None
        softmax = self.graph.op(self._unguarded(weighted.args[0]), "nn.softmax")
        if softmax is None or softmax.attrs.axis not in (-1, 3):
            return None
        try:
            return self._attention(var, softmax, weighted)
        except _NotAttention as reason:
            self.program.notes.append(f"attention at {var.name} runs unfused: {reason}")
            return None

    def _attention(self, var: relax.Var, softmax: Any, weighted: Any) -> Any:
        scores, scale, masks = self._scores(softmax.args[0])
        q, q_scale = self._split(scores.args[0], transposed=False, what="q")
        k, k_scale = self._split(scores.args[1], transposed=True, what="k")
        v, v_scale = self._split(weighted.args[1], transposed=False, what="v")
        if v_scale != 1.0:
            raise _NotAttention("v is scaled")
        if (k.heads, v.heads) != (q.heads, q.heads) or not same_dim(k.rows, v.rows):
            raise _NotAttention("q, k and v have different heads or lengths")
        if not (same_dim(k.batch, q.batch) and same_dim(v.batch, q.batch)):
            raise _NotAttention("q, k and v have different batches")
        rows = product(shape_of(var)[:-1])
        if shape_of(var)[-1] != q.heads * v.size or not same_dim(rows, q.batch * q.rows):
            raise _NotAttention("heads are not merged back")
        args = [self._rows(t) for t in (q, k, v)]
        axes = None
        if masks:
            args.append(self._mask(masks))
            axes = _extended_axes(shape_of(args[-1]))
        op = Attention(heads=q.heads, scale=scale * q_scale * k_scale, mask=axes)
        form, refusal = attention_form(op, (q.size, v.size), self._context)
        if form is None:
            raise _NotAttention(refusal)
        shape = (q.batch, q.rows, q.heads * v.size)
        merged = self.emit(dialect.call(op, args, shape), "attention")
        return (
            merged if same_shape(shape, shape_of(var)) else relax.op.reshape(merged, shape_of(var))
        )

    def _rows(self, heads: _Heads) -> Any:
        """The unsplit tensor as ``[B, S, H * D]``."""
        shape = (heads.batch, heads.rows, heads.heads * heads.size)
        new = self.new(heads.source)
        if heads.leading:
            new = self.emit(relax.op.permute_dims(new, [0, 2, 1, 3]))
            return self.emit(relax.op.reshape(new, shape))
        return (
            new
            if same_shape(shape_of(heads.source), shape)
            else self.emit(relax.op.reshape(new, shape))
        )

    def _unguarded(self, expr: Any) -> Any:
        """``p`` of ``where(isnan(p), 0, p)``."""
        choice = self.graph.op(expr, "where")
        if choice is not None:
            condition, replacement, value = choice.args
            guard = self.graph.op(condition, "isnan")
            if guard is not None and scalar_value(replacement) == 0.0:
                return value if same(guard.args[0], value) else expr
        return expr

    def _scores(self, expr: Any) -> tuple[Any, float, list[_Addend]]:
        """The matmul, its scale, and what is added to it before the soft-max."""
        found = None
        masks: list[_Addend] = []
        for addend in self._addends(expr):
            if addend.condition is None and found is None:
                found = self._scaled_matmul(addend.expr)
                if found is not None:
                    continue
            masks.append(addend)
        if found is None:
            raise _NotAttention(f"the soft-max is over {op_name(self.graph.value(expr))}")
        for mask in masks:
            if mask.condition is None and dtype_of(mask.expr) != "float32":
                raise _NotAttention(f"the mask is {dtype_of(mask.expr)}")
        return *found, masks

    def _addends(self, expr: Any) -> list[_Addend]:
        """The terms of a sum; ``where(c, x, very negative)`` is x and a mask."""
        total = self.graph.op(expr, "add")
        if total is not None and not self._is_mask_sum(total):
            return [a for arg in total.args for a in self._addends(arg)]
        choice = self.graph.op(expr, "where")
        if choice is not None:
            condition, kept, dropped = choice.args
            low = scalar_value(dropped)
            if low is not None and low <= _VERY_NEGATIVE and len(shape_of(kept)) == 4:
                return [*self._addends(kept), _Addend(None, condition, low, keep_where=True)]
            low = scalar_value(kept)
            if low is not None and low <= _VERY_NEGATIVE and len(shape_of(dropped)) == 4:
                return [*self._addends(dropped), _Addend(None, condition, low, keep_where=False)]
        return [_Addend(expr)]

    def _is_mask_sum(self, total: Any) -> bool:
        """Whether a sum has no matmul in it, and is one mask to be computed as it stands."""
        return not any(self._has_matmul(arg) for arg in total.args)

    def _has_matmul(self, expr: Any) -> bool:
        base, _ = self._unscale(expr)
        call = self.graph.op(base, "add", "where")
        if call is not None:
            return any(self._has_matmul(arg) for arg in call.args)
        return self.graph.op(base, "matmul") is not None

    def _mask(self, masks: list[_Addend]) -> Any:
        """The sum of the masks as ``[B or 1, H or 1, Sq or 1, Sk]``, made once."""
        key = tuple((m.expr, m.condition, m.low, m.keep_where) for m in masks)
        if key not in self._masks:
            total = None
            for mask in masks:
                term = self._mask_term(mask)
                total = term if total is None else self.emit(relax.op.add(total, term))
            shape = (1,) * (4 - len(shape_of(total))) + shape_of(total)
            if len(shape_of(total)) != 4:
                total = self.emit(relax.op.reshape(total, shape))
            self._masks[key] = total
        return self._masks[key]

    def _mask_term(self, mask: _Addend) -> Any:
        if mask.condition is None:
            return self.new(self._unbroadcast(mask.expr))
        condition = self.new(self._unbroadcast(mask.condition))
        # A query without any key attends to all alike: no score may show beside the lowest value.
        low = mask.low if np.isneginf(mask.low) else float(np.finfo(np.float32).min)
        keep, drop = relax.const(0.0, "float32"), relax.const(low, "float32")
        values = (keep, drop) if mask.keep_where else (drop, keep)
        return self.emit(relax.op.where(condition, *values))

    def _unbroadcast(self, expr: Any) -> Any:
        """What was broadcast; the kernel broadcasts it again."""
        call = self.graph.op(expr, "broadcast_to")
        return call.args[0] if call is not None else expr

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
        while (step := self._permutation(expr)) is not None:
            source, axes = step
            order = [axes[i] for i in order]
            expr, factor = self._unscale(source)
            scale *= factor
        leading = order == ([0, 1, 3, 2] if transposed else [0, 1, 2, 3])
        if not leading and order != ([0, 2, 3, 1] if transposed else [0, 2, 1, 3]):
            raise _NotAttention(f"{what} is not split into heads (axes {order})")
        shape = shape_of(expr)
        batch, rows, heads, size = (shape[i] for i in ((0, 2, 1, 3) if leading else range(4)))
        if not (isinstance(heads, int) and isinstance(size, int)):
            raise _NotAttention(f"{what} has heads of unknown number or size")
        reshape = self.graph.op(expr, "reshape") if not leading else None
        source = expr
        if reshape is not None and shape_of(reshape.args[0])[-1] == heads * size:
            source = reshape.args[0]
        return _Heads(source, batch, heads, rows, size, leading), scale

    def _permutation(self, expr: Any) -> tuple[Any, list[int]] | None:
        """Source and axes of a permutation of a 4-D tensor, also one that merges B and H."""
        call = self.graph.op(expr, "permute_dims")
        if call is not None:
            return call.args[0], _axes(call)
        outer = self.graph.op(expr, "reshape")
        swap = self.graph.op(outer.args[0], "permute_dims") if outer is not None else None
        inner = self.graph.op(swap.args[0], "reshape") if swap is not None else None
        if inner is None or _axes(swap) != [0, 2, 1]:
            return None
        source = inner.args[0]
        shape = shape_of(source)
        if len(shape) != 4 or not same_shape(shape[2:], shape_of(inner)[1:]):
            return None
        swapped = (shape[0], shape[1], shape[3], shape[2])
        return (source, [0, 1, 3, 2]) if same_shape(swapped, shape_of(expr)) else None


def _extended_axes(mask: tuple[Any, ...]) -> tuple[bool, bool, bool, bool]:
    """Which axes of a mask are more than a broadcast."""
    lead, heads, queries, keys = (not (isinstance(n, int) and n == 1) for n in mask)
    return lead, heads, queries, keys


def _axes(call: Any) -> list[int]:
    rank = len(shape_of(call.args[0]))
    axes = call.attrs.axes
    return [int(a) for a in axes] if axes is not None else list(range(rank))[::-1]
