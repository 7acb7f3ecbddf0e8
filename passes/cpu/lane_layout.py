"""Lane layout: activations stay with their tokens in SIMD lanes from end to end.

Matches ``sparse_tvm.dense`` and ``sparse_tvm.attention``, layer norms, and the elementwise
operators between them, and turns them into the same operations on lane tiles
``[lead, tiles, features, LANES]`` (see ``schedules.cpu.lane_tiles``), so that the layers need
neither gathers nor transposes. Every activation has two forms, logical and tiled; each is made
from the other (``pack``, ``unpack``) only when somebody asks for it, which in a transformer is
once at each end. Tokens that are an image in planes turned round, and images that are tokens,
change from one layout to the other at once. A reshape that keeps the feature axis costs nothing in
tiled form. All rows of one image, or whatever else has several axes of rows, share tiles: all but
the last are full.

Everything else keeps its logical form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax, tirx

from sparse_tvm.operators import Attention, Dense, Gate, LayerNorm, Operator, Residual, StepRound
from sparse_tvm.passes import dialect
from sparse_tvm.passes.dense_to_sparse import WEIGHTS_STORED
from sparse_tvm.passes.graph import (
    Rewrite,
    dtype_of,
    is_tensor,
    op_name,
    product,
    same_dim,
    same_shape,
    scalar_value,
    shape_of,
)
from sparse_tvm.passes.infrastructure import Context, Property, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.image_operators import ImagePack, ImageToTiles, TilesToImage
from sparse_tvm.schedules.cpu.image_pack import READ_BEYOND
from sparse_tvm.schedules.cpu.operators import LanePack, LaneUnpack, RotateHeads
from sparse_tvm.schedules.cpu.planes import IN_PLACE, Planes
from sparse_tvm.schedules.cpu.simd import LANES, tiles_of

_UNARY = {
    f"relax.{name}"
    for name in (
        *("nn.relu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "tanh", "sigmoid"),
        *("exp", "erf", "sqrt", "rsqrt", "square", "negative", "abs", "round"),
    )
}
_BINARY = {
    f"relax.{name}"
    for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power")
}
_NORMS = {"relax.nn.layer_norm": True, "relax.nn.rms_norm": False}
"""Whether they subtract the mean."""

_RESHAPES = {"relax.reshape", "relax.expand_dims", "relax.squeeze"}

_TOKENS_LAST, _FEATURES_FIRST = ([0, 2, 1], [0, 2, 3, 1]), ([0, 2, 1], [0, 3, 1, 2])
"""How tokens lie beside signals and images, and these beside tokens."""


def _not_in_tiles(program: Program) -> Iterable[str]:
    return dialect.described(
        found
        for found in dialect.calls(program, Operator)
        if isinstance(found.op, Dense | Attention) and not _is_tiled(found.args[0])
        if not (isinstance(found.op, Attention) and found.op.by_heads[0])
    )


def _is_tiled(expr: Any) -> bool:
    shape = shape_of(expr)
    return len(shape) == 4 and shape[-1] == LANES


def _axes(turned: Any) -> list[int]:
    axes = turned.attrs.axes
    return [int(axis) for axis in axes] if axes is not None else []


def _rows(leading: Sequence[Any]) -> tuple[Any, Any]:
    """Leading index and rows of what has these extents in front of its features."""
    if len(leading) == 1:
        return 1, leading[0]
    return leading[0], product(leading[1:])


IN_LANE_TILES = Property("dense layers and attention work on lane tiles", _not_in_tiles)


@dataclass(frozen=True)
class _Tiled:
    """The tiled form of an activation ``[lead, rows, features]``."""

    expr: Any
    lead: Any
    rows: Any
    features: Any

    def has_rows(self, lead: Any, rows: Any) -> bool:
        """Whether the tiles hold ``lead`` times ``rows`` rows, never two leads in one tile."""
        return same_dim(self.lead, lead) and same_dim(self.rows, rows)


@graph_pass(requires=[WEIGHTS_STORED], ensures=[IN_LANE_TILES])
def lane_layout(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _LaneLayout(program, context).run()


class _LaneLayout(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self._tiled: dict[Any, _Tiled] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        dense = dialect.match(value, Dense)
        if dense is not None:
            return self._dense(dense, var)
        attention = dialect.match(value, Attention)
        if attention is not None:
            return self._attention(attention, var)
        rotated = dialect.match(value, RotateHeads)
        if rotated is not None:
            return self._rotated(rotated, var)
        rounded = dialect.match(value, StepRound)
        if rounded is not None:
            x, *steps = rounded.args
            source = self._tiles_of(x)
            args = [source.expr, *(self.new(arg) for arg in steps)]
            return self._emit_tiled(rounded.op, args, source.lead, source.rows, source.features)
        if isinstance(value, relax.TupleGetItem):
            return self._part(value)
        packed = dialect.match(value, ImagePack)
        if packed is not None:
            return self._image_of_tokens(packed, var)
        name = op_name(value)
        if not is_tensor(var) or dtype_of(var) != "float32" or len(shape_of(var)) < 2:
            return None
        if name in _NORMS:
            return self._layer_norm(value, centred=_NORMS[name])
        if name in _UNARY and value.args[0] in self._tiled:
            return self._unary(value)
        if name in _BINARY and any(arg in self._tiled for arg in value.args):
            return self._binary(value, shape_of(var))
        if name in _RESHAPES and value.args[0] in self._tiled:
            source = self._tiled[value.args[0]]
            return source if same_dim(shape_of(var)[-1], source.features) else None
        return None

    def bind(self, var: relax.Var, value: Any) -> None:
        if isinstance(value, _Tiled):
            self._tiled[var] = value
        else:
            super().bind(var, value)

    def new(self, expr: Any) -> Any:
        """The logical form of an expression, unpacked from its tiles if that is all there is."""
        if isinstance(expr, relax.Var) and expr in self._tiled and expr not in self._new:
            source = self._tiled[expr]
            shape = (source.lead, source.rows, source.features)
            rows = self.emit(dialect.call(LaneUnpack(), [source.expr], shape), "rows")
            self._new[expr] = self._reshaped(rows, shape, shape_of(expr))
        return super().new(expr)

    def _reshaped(self, expr: Any, shape: tuple[Any, ...], wanted: tuple[Any, ...]) -> Any:
        return expr if same_shape(shape, wanted) else self.emit(relax.op.reshape(expr, wanted))

    def _tiles_of(self, expr: Any, like: tuple[Any, Any] | None = None) -> _Tiled:
        """The tiled form of an expression, packed if need be.

        ``like`` asks for tiles of so many leading indices and rows; else any will do.
        """
        known = self._tiled.get(expr)
        if known is not None and (like is None or known.has_rows(*like)):
            return known
        *leading, features = shape_of(expr)
        lead, rows = like or _rows(leading)
        tiled = self._tokens_of_image(expr, lead, rows)
        if tiled is not None:
            self._tiled.setdefault(expr, tiled)
            return tiled
        flat = self._reshaped(self.new(expr), shape_of(expr), (lead, rows, features))
        tiled = self._emit_tiled(LanePack(), [flat], lead, rows, features)
        if known is None:
            self._tiled[expr] = tiled
        return tiled

    def _tokens_of_image(self, expr: Any, lead: Any, rows: Any) -> _Tiled | None:
        """The tiled form of what is an image in planes turned round."""
        turned = self.graph.op(expr, "permute_dims")
        if turned is None or _axes(turned) not in _TOKENS_LAST:
            return None
        image = turned.args[0]
        reshaped = self.graph.op(image, "reshape")
        unpacked = dialect.match(
            self.graph.value(reshaped.args[0] if reshaped is not None else image), ImagePack
        )
        if unpacked is None or unpacked.op.target is not None or unpacked.op.source is None:
            return None
        batch, channels, *size = shape_of(image)
        if dtype_of(image) != "float32" or not isinstance(channels, int):
            return None
        if not (same_dim(batch, lead) and same_dim(product(size), rows)):
            return None
        op = ImageToTiles(size=unpacked.op.size, source=unpacked.op.source)
        return self._emit_tiled(op, list(map(self.new, unpacked.args)), lead, rows, channels)

    def _image_of_tokens(self, found: dialect.OperatorCall[ImagePack], var: relax.Var) -> Any:
        """An image in planes, made of tokens in tiles."""
        image, extents = found.args[:2]
        reshaped = self.graph.op(image, "reshape")
        image = reshaped.args[0] if reshaped is not None else image
        turned = self.graph.op(image, "permute_dims")
        if found.op.source is not None or turned is None or _axes(turned) not in _FEATURES_FIRST:
            return None
        tiled, (batch, channels, *size) = self._tiled.get(turned.args[0]), shape_of(image)
        if tiled is None or not isinstance(channels, int) or dtype_of(image) != "float32":
            return None
        if not tiled.has_rows(batch, product(size)):
            return None
        in_place = found.op.window == IN_PLACE
        border = found.op.target if in_place else READ_BEYOND
        assert border is not None, "an image is packed into planes"
        rows, columns = size if len(size) == 2 else (1, *size)
        shape = (batch, channels, Planes(rows, columns, border).size)
        op = TilesToImage(size=found.op.size, target=border)
        planes = dialect.call(op, [tiled.expr, extents], shape)
        if in_place:
            return planes
        phases = replace(found.op, source=border)
        return dialect.call(phases, [self.emit(planes, "planes"), extents], shape_of(var))

    def _emit_tiled(
        self, op: Operator, args: list[Any], lead: Any, rows: Any, features: Any
    ) -> _Tiled:
        call = dialect.call(op, args, (lead, tiles_of(rows), features, LANES))
        return _Tiled(self.emit(call, op.name), lead, rows, features)

    def _dense(self, found: dialect.OperatorCall[Dense], var: relax.Var) -> _Tiled:
        op = found.op
        count = len(found.args) - op.extras
        (x, *weight), extras = found.args[:count], found.args[count:]
        source = self._tiles_of(x)
        like = (source.lead, source.rows)
        steps = [step for step in op.epilogue if step.operand]
        operands = [
            self._tiles_of(extra, like).expr
            if isinstance(step, Residual | Gate)
            else self.new(extra)
            for step, extra in zip(steps, extras, strict=True)
        ]
        args = [source.expr, *(self.new(array) for array in weight), *operands]
        if self._context.backend.weighted_family(op.stored).counts_rows:
            args.append(relax.ShapeExpr([source.rows]))
        return self._emit_tiled(op, args, *like, shape_of(var)[-1])

    def _attention(self, found: dialect.OperatorCall[Attention], var: relax.Var) -> _Tiled:
        q, k, v, *mask = found.args
        batch, rows, features = shape_of(var)
        by_heads = found.op.by_heads
        key_rows = shape_of(k)[2 if by_heads[1] else 1]
        operands = [
            self.new(x) if as_is else self._tiles_of(x, (batch, count)).expr
            for x, count, as_is in zip((q, k, v), (rows, key_rows, key_rows), by_heads, strict=True)
        ]
        if found.op.mask is not None:
            lead, heads, *_ = shape_of(mask[0])
            _, _, has_queries, _ = found.op.mask
            operands.append(
                self._tiles_of(mask[0], (product((lead, heads)), rows)).expr
                if has_queries
                else self.new(mask[0])
            )
        few = [rows] if by_heads[1] and by_heads[2] else []
        operands.append(relax.ShapeExpr([key_rows, *few]))
        return self._emit_tiled(found.op, operands, batch, rows, features)

    def _rotated(self, found: dialect.OperatorCall[RotateHeads], var: relax.Var) -> _Tiled:
        x, *angles = found.args
        batch, rows, features = shape_of(var)
        operands = [self._tiles_of(x, (batch, rows))]
        operands += [self._tiles_of(angle, (shape_of(angle)[0], rows)) for angle in angles]
        args = [operand.expr for operand in operands]
        return self._emit_tiled(found.op, args, batch, rows, features)

    def _layer_norm(self, value: Any, centred: bool) -> _Tiled | None:
        x, *vectors = value.args
        rank = len(shape_of(x))
        if [int(axis) % rank for axis in value.attrs.axes] != [rank - 1]:
            return None
        source = self._tiles_of(x)
        return self._emit_tiled(
            LayerNorm(epsilon=float(value.attrs.epsilon), centred=centred),
            [source.expr, *map(self.new, vectors)],
            source.lead,
            source.rows,
            source.features,
        )

    def _part(self, value: relax.TupleGetItem) -> _Tiled | None:
        """One part of a tiled activation split along its features."""
        split = self.graph.op(value.tuple_value, "split")
        source = self._tiled.get(split.args[0]) if split is not None else None
        if split is None or source is None or not isinstance(source.features, int):
            return None
        if int(split.attrs.axis) % len(shape_of(split.args[0])) != len(shape_of(split.args[0])) - 1:
            return None
        sections = split.attrs.indices_or_sections
        if isinstance(sections, tirx.IntImm | int):
            step = -(-source.features // int(sections))
            bounds = [*range(0, source.features, step), source.features]
        else:
            bounds = [0, *(int(i) for i in sections), source.features]
        start, stop = bounds[value.index : value.index + 2]
        part = relax.op.strided_slice(source.expr, [2], [start], [stop])
        return _Tiled(self.emit(part), source.lead, source.rows, stop - start)

    def _unary(self, value: Any) -> _Tiled:
        source = self._tiled[value.args[0]]
        call = relax.Call(value.op, [source.expr], value.attrs, value.ty_args)
        return _Tiled(self.emit(call), source.lead, source.rows, source.features)

    def _binary(self, value: Any, shape: tuple[Any, ...]) -> _Tiled | None:
        """Operands of the full shape are tiled; constants and feature vectors broadcast."""
        source = next(self._tiled[arg] for arg in value.args if arg in self._tiled)
        operands = []
        for arg in value.args:
            if scalar_value(arg) is not None:
                operands.append(arg)
            elif not shape_of(arg):
                operands.append(self.new(arg))
            elif same_shape(shape_of(arg), shape):
                operands.append(self._tiles_of(arg, (source.lead, source.rows)).expr)
            elif same_shape(shape_of(arg), shape[-1:]):
                column = (1, 1, shape[-1], 1)
                operands.append(self.emit(relax.op.reshape(self.new(arg), column)))
            else:
                return None
        call = relax.Call(value.op, operands, value.attrs, value.ty_args)
        return _Tiled(self.emit(call), source.lead, source.rows, source.features)
