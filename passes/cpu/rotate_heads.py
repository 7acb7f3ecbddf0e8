"""Rotary positions turn heads where the layers leave them, in lane tiles.

Matches attention in float32 whose queries and keys are both

    x * cos + concat(-x[..., half:], x[..., :half]) * sin

of heads ``[batch, heads, rows, features]`` that were split from an activation in rows, with ``cos``
and ``sin`` the same for all heads; where only a head's first features turn, the others are put
behind them by ``concat``. Each becomes one ``sparse_tvm.rotate_heads`` on the activation in rows.
So do values, or what else a merged layer holds beside q and k, with nothing to turn. Keys may be
repeated afterwards for several heads of q. Leaves alone attention with only one of both turned, as
on a cache, whose keys lie by heads already; heads that something else reads; and pairs of
neighbouring features that turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx

from sparse_tvm.operators import FLOAT32, Attention
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, product, same, same_dim, same_shape, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.operators import RotateHeads


@graph_pass()
def rotate_heads(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _RotateHeads(program).run()


@dataclass(frozen=True)
class _Heads:
    """Heads that are features of an activation in rows, ``stride`` from one to the next."""

    source: Any
    heads: int
    first: int
    stride: int
    size: int

    def part(self, start: int, size: int) -> _Heads:
        """Some features of each head."""
        return _Heads(self.source, self.heads, self.first + start, self.stride, size)

    def follows(self, other: _Heads) -> bool:
        """Whether these features lie behind those of another part of the same heads."""
        there = (other.source, other.heads, other.first + other.size, other.stride)
        return same(self.source, there[0]) and (self.heads, self.first, self.stride) == there[1:]


@dataclass(frozen=True)
class _Turned:
    """Heads, and cosines and sines ``[batch or 1, rows, features]`` that turn the first ones."""

    heads: _Heads
    angles: tuple[Any, ...] = ()


class _RotateHeads(Rewrite):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._found: dict[Any, _Turned] = {}
        for binding in self.graph.bindings:
            attention = dialect.match(binding.value, Attention)
            if attention is not None and attention.op.types == FLOAT32:
                self._look_at(attention)

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = self._found.get(var)
        if found is None:
            return None
        heads = found.heads
        batch, rows = shape_of(var)[0], shape_of(var)[-2]
        turned = shape_of(found.angles[0])[-1] if found.angles else 0
        op = RotateHeads(
            heads=heads.heads,
            size=heads.size,
            first=heads.first,
            stride=heads.stride,
            turned=turned,
        )
        source = self.new(heads.source)
        width = shape_of(heads.source)[-1]
        if not same_shape(shape_of(heads.source), (batch, rows, width)):
            source = self.emit(relax.op.reshape(source, (batch, rows, width)))
        shape = (batch, rows, heads.heads * heads.size)
        merged = dialect.call(op, [source, *map(self.new, found.angles)], shape)
        if len(shape_of(var)) == 3:
            return merged
        merged = self.emit(merged)
        split = self.emit(relax.op.reshape(merged, (batch, rows, heads.heads, heads.size)))
        return relax.op.permute_dims(split, [0, 2, 1, 3])

    def _look_at(self, attention: dialect.OperatorCall[Attention]) -> None:
        """Find what is turned of q, k and v, if q and k are."""
        found: dict[Any, _Turned] = {}
        q, k, v = attention.args[:3]
        for expr in (q, k):
            var = self._own_heads(expr, attention.op.heads)
            turned = self._turned(var) if var is not None else None
            if turned is None:
                return
            found[var] = turned
        heads, var = self._values(v, attention.op.heads)
        if heads is not None and shape_of(heads.source)[-1] != heads.heads * heads.size:
            found[var] = _Turned(heads)
        self._found.update(found)

    def _values(self, merged: Any, count: int) -> tuple[_Heads | None, Any]:
        """Where the values of attention are, and what stands for them."""
        var = self._own_heads(merged, count)
        if var is not None:
            return self._heads(var), var
        outer = self.graph.op(merged, "reshape")
        if outer is None or len(shape_of(outer.args[0])) != 4 or len(shape_of(merged)) != 3:
            return None, None
        heads = self._split(outer.args[0])
        whole = heads is not None and same_dim(shape_of(merged)[-1], heads.heads * heads.size)
        return (heads, merged) if whole else (None, None)

    def _own_heads(self, merged: Any, heads: int) -> Any:
        """The heads ``[B, H, S, D]`` that an operand of attention reads, and nobody else."""
        expr = merged
        outer = self.graph.op(expr, "reshape")
        swapped = self._swapped(outer.args[0]) if outer is not None else None
        if outer is None or swapped is None or not self.graph.used_once(expr):
            return None
        if not self.graph.used_once(outer.args[0]) or len(shape_of(swapped)) != 4:
            return None
        if shape_of(swapped)[1] != heads:
            return None
        expr = swapped
        again = self.graph.op(expr, "reshape")
        repeated = self.graph.op(again.args[0], "broadcast_to") if again is not None else None
        if again is not None and repeated is not None:
            one = self.graph.op(repeated.args[0], "reshape", "expand_dims")
            between = (expr, again.args[0], repeated.args[0])
            if one is None or len(shape_of(one.args[0])) != 4:
                return None
            if not all(self.graph.used_once(each) for each in between):
                return None
            expr = one.args[0]
        return expr if self.graph.used_once(expr) else None

    def _turned(self, expr: Any) -> _Turned | None:
        """Heads by rotary positions, all of their features or the first ones."""
        joined = self.graph.op(expr, "concat")
        if joined is None:
            return self._all_turned(expr)
        parts = list(joined.args[0].fields)
        if len(parts) != 2 or int(joined.attrs.axis) not in (-1, 3):
            return None
        turned, rest = self._all_turned(parts[0]), self._heads(parts[1])
        if turned is None or rest is None or not rest.follows(turned.heads):
            return None
        whole = turned.heads.part(0, turned.heads.size + rest.size)
        return _Turned(whole, turned.angles)

    def _all_turned(self, expr: Any) -> _Turned | None:
        total = self.graph.op(expr, "add")
        if total is None:
            return None
        for kept, turned in (tuple(total.args), tuple(total.args)[::-1]):
            for x, cos in self._by_angle(kept):
                for other, sin in self._by_angle(turned):
                    heads = self._heads(x)
                    if heads is not None and self._is_half_turn(other, heads):
                        return _Turned(heads, (cos, sin))
        return None

    def _by_angle(self, expr: Any) -> list[tuple[Any, Any]]:
        """Heads, and a factor ``[B or 1, S, D]`` of all heads alike."""
        found = []
        call = self.graph.op(expr, "multiply")
        for x, factor in (tuple(call.args), tuple(call.args)[::-1]) if call is not None else ():
            spread = self.graph.op(factor, "expand_dims", "reshape")
            angle = spread.args[0] if spread is not None else None
            if angle is None or len(shape_of(angle)) != 3 or len(shape_of(x)) != 4:
                continue
            (batch, _, rows, size), (lead, *rest) = shape_of(x), shape_of(angle)
            fits = same_shape(shape_of(factor), (lead, 1, rows, size))
            if fits and same_shape(rest, (rows, size)) and (same_dim(lead, batch) or lead == 1):
                found.append((x, angle))
        return found

    def _is_half_turn(self, expr: Any, heads: _Heads) -> bool:
        """Whether it is ``concat(-x[..., half:], x[..., :half])`` of these heads."""
        joined = self.graph.op(expr, "concat")
        if joined is None or int(joined.attrs.axis) not in (-1, 3) or heads.size % 2:
            return False
        parts = list(joined.args[0].fields)
        negated = self.graph.op(parts[0], "negative") if len(parts) == 2 else None
        if negated is None:
            return False
        half = heads.size // 2
        found = [self._heads(negated.args[0]), self._heads(parts[1])]
        wanted = [heads.part(half, half), heads.part(0, half)]
        return all(
            one is not None and same(one.source, other.source) and _where(one) == _where(other)
            for one, other in zip(found, wanted, strict=True)
        )

    def _heads(self, expr: Any) -> _Heads | None:
        """Where the heads of ``[B, H, S, D]`` are features of an activation in rows."""
        swapped = self._swapped(expr)
        if swapped is not None:
            return self._split(swapped)
        part = self._part(expr, 3)
        if part is None:
            return None
        source, start, size = part
        heads = self._heads(source)
        return heads.part(start, size) if heads is not None else None

    def _split(self, expr: Any) -> _Heads | None:
        """The same of ``[B, S, H, D]``."""
        part = self._part(expr, 3)
        if part is not None:
            source, start, size = part
            heads = self._split(source)
            return heads.part(start, size) if heads is not None else None
        call = self.graph.op(expr, "reshape", "squeeze")
        if call is None:
            return None
        _, _, count, size = shape_of(expr)
        if not (isinstance(count, int) and isinstance(size, int)):
            return None
        first, source = 0, call.args[0]
        one = self._part(source, 2) if len(shape_of(source)) == 5 else None
        if one is not None:  # one of several such tensors, as q, k and v of a merged layer
            outer = self.graph.op(one[0], "reshape")
            if outer is None or one[2] != 1:
                return None
            first, source = one[1] * count * size, outer.args[0]
            if not same_shape(shape_of(one[0])[3:], (count, size)):
                return None
            width = shape_of(one[0])[2] * count * size
        else:
            width = count * size
        if len(shape_of(source)) < 2 or not same_dim(shape_of(source)[-1], width):
            return None
        rows = product(shape_of(expr)[:2])
        if not same_dim(product(shape_of(source)[:-1]), rows):
            return None
        return _Heads(source, count, first, size, size)

    def _part(self, expr: Any, axis: int) -> tuple[Any, int, int] | None:
        """Tensor, first index and length of a part along an axis."""
        value = self.graph.value(expr)
        if isinstance(value, relax.TupleGetItem):
            return self._split_part(value, axis)
        call = self.graph.op(expr, "strided_slice")
        if call is None:
            return None
        source, *numbers = call.args
        axes, starts, _, *steps = (list(numbers.fields) for numbers in numbers)
        length, ones = shape_of(expr)[axis], [step for given in steps for step in given]
        fixed = all(isinstance(n, tirx.IntImm) for n in (*axes, *starts, *ones))
        if not fixed or not isinstance(length, int) or [int(a) for a in axes] != [axis]:
            return None
        start = int(starts[0])
        return (source, start, length) if start >= 0 and all(int(s) == 1 for s in ones) else None

    def _split_part(self, value: relax.TupleGetItem, axis: int) -> tuple[Any, int, int] | None:
        split = self.graph.op(value.tuple_value, "split")
        if split is None or int(split.attrs.axis) % len(shape_of(split.args[0])) != axis:
            return None
        source, sections = split.args[0], split.attrs.indices_or_sections
        extent = shape_of(source)[axis]
        if not isinstance(extent, int):
            return None
        if isinstance(sections, tirx.IntImm | int):
            step = -(-extent // int(sections))
            bounds = [*range(0, extent, step), extent]
        else:
            bounds = [0, *(int(i) for i in sections), extent]
        start, stop = bounds[value.index : value.index + 2]
        return source, start, stop - start

    def _swapped(self, expr: Any) -> Any:
        """``t`` of ``permute_dims(t, [0, 2, 1, 3])``."""
        call = self.graph.op(expr, "permute_dims")
        axes = [int(axis) for axis in call.attrs.axes or ()] if call is not None else None
        return call.args[0] if call is not None and axes == [0, 2, 1, 3] else None


def _where(heads: _Heads) -> tuple[int, ...]:
    return heads.heads, heads.first, heads.stride, heads.size
