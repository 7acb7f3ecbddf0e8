"""Lane layout: activations stay with their tokens in SIMD lanes from end to end.

Matches ``sparse_tvm.dense`` and ``sparse_tvm.attention``, layer norms, and the elementwise
operators between them, and turns them into the same operations on lane tiles
``[lead, tiles, features, lanes]`` (see ``schedules.common.lane_tiles``), so that the layers need
neither gathers nor transposes. Every activation has two forms, logical and tiled; each is made
from the other (``pack``, ``unpack``) only when somebody asks for it, which in a transformer is
once at each end. A reshape that keeps the feature axis costs nothing in tiled form.

Everything else keeps its logical form.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import relax

from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, dtype_of, is_tensor, op_name, scalar_value, shape_of
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.common.lane_tiles import LaneTiles, Simd, tiles_for
from sparse_tvm.targets import Target

_UNARY = {
    f"relax.{name}"
    for name in (
        *("nn.relu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "tanh", "sigmoid"),
        *("exp", "erf", "sqrt", "rsqrt", "square", "negative", "abs"),
    )
}
_BINARY = {
    f"relax.{name}"
    for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power")
}
_RESHAPES = {"relax.reshape", "relax.expand_dims", "relax.squeeze"}


@dataclass(frozen=True)
class _Tiled:
    """The tiled form of an activation."""

    expr: Any
    tiles: LaneTiles
    features: int


def lane_layout(program: Program, target: Target) -> Program:
    """Apply the pass."""
    return _LaneLayout(program, Simd(target.lanes, target.registers)).run()


class _LaneLayout(Rewrite):
    def __init__(self, program: Program, simd: Simd) -> None:
        super().__init__(program)
        self._simd = simd
        self._tiled: dict[Any, _Tiled] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value)
        if found is not None:
            return self._dense(found, var) if found.name == "dense" else self._attention(found, var)
        name = op_name(value)
        if not is_tensor(var) or dtype_of(var) != "float32" or len(shape_of(var)) < 2:
            return None
        if name == "relax.nn.layer_norm":
            return self._layer_norm(value)
        if name in _UNARY and value.args[0] in self._tiled:
            return self._unary(value)
        if name in _BINARY and any(arg in self._tiled for arg in value.args):
            return self._binary(value, shape_of(var))
        if name in _RESHAPES and value.args[0] in self._tiled:
            source = self._tiled[value.args[0]]
            return source if shape_of(var)[-1] == source.features else None
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
            tiles = source.tiles
            shape = (tiles.lead, tiles.rows, source.features)
            rows = self.emit(
                dialect.call("unpack", [source.expr], shape, tiles=_as_list(tiles)), "rows"
            )
            same = shape == shape_of(expr)
            self._new[expr] = rows if same else self.emit(relax.op.reshape(rows, shape_of(expr)))
        return super().new(expr)

    def _tiles_of(self, expr: Any, tiles: LaneTiles | None = None) -> _Tiled:
        """The tiled form of an expression, in these tiles if given, packed if need be."""
        known = self._tiled.get(expr)
        if known is not None and (tiles is None or known.tiles == tiles):
            return known
        *lead, rows, features = shape_of(expr)
        if tiles is None:
            tiles = tiles_for(prod(lead), rows, self._simd)
        flat = (tiles.lead, tiles.rows, features)
        logical = self.new(expr)
        if shape_of(expr) != flat:
            logical = self.emit(relax.op.reshape(logical, flat))
        packed = dialect.call("pack", [logical], tiles.shape(features), tiles=_as_list(tiles))
        tiled = _Tiled(self.emit(packed, "tiled"), tiles, features)
        if known is None:
            self._tiled[expr] = tiled
        return tiled

    def _dense(self, found: dialect.DialectCall, var: relax.Var) -> _Tiled:
        x, w, *extras = found.args
        source = self._tiles_of(x)
        steps = [s for s in found.attributes["epilogue"] if s in ("bias", "residual")]
        operands = [
            self.new(extra) if step == "bias" else self._tiles_of(extra, source.tiles).expr
            for step, extra in zip(steps, extras, strict=True)
        ]
        features = shape_of(var)[-1]
        return self._emit_tiled(
            "dense", [source.expr, self.new(w), *operands], source.tiles, features, found.attributes
        )

    def _attention(self, found: dialect.DialectCall, var: relax.Var) -> _Tiled:
        q, k, v, *mask = found.args
        batch, rows, features = shape_of(var)
        tiles = self._sequence_tiles(q, batch, rows)
        key_tiles = self._sequence_tiles(k, batch, shape_of(k)[-2])
        operands = [
            self._tiles_of(q, tiles).expr,
            self._tiles_of(k, key_tiles).expr,
            self._tiles_of(v, key_tiles).expr,
        ]
        attributes = {**found.attributes, "key_tiles": _as_list(key_tiles), "mask": None}
        if mask:
            lead, heads, queries, keys = shape_of(mask[0])
            attributes["mask"] = [lead, heads, keys, queries > 1]
            if queries > 1:
                mask_tiles = LaneTiles(lead * heads, rows, tiles.lanes)
                operands.append(self._tiles_of(mask[0], mask_tiles).expr)
            else:
                shape = (lead, heads, keys)
                operands.append(self.emit(relax.op.reshape(self.new(mask[0]), shape)))
        return self._emit_tiled("attention", operands, tiles, features, attributes)

    def _sequence_tiles(self, expr: Any, batch: int, rows: int) -> LaneTiles:
        """Tiles that never mix two sequences: those of ``expr`` if they do not."""
        known = self._tiled.get(expr)
        if known is not None and (known.tiles.lead, known.tiles.rows) == (batch, rows):
            return known.tiles
        return tiles_for(batch, rows, self._simd)

    def _layer_norm(self, value: Any) -> _Tiled | None:
        x, gamma, beta = value.args
        rank = len(shape_of(x))
        if [int(axis) % rank for axis in value.attrs.axes] != [rank - 1]:
            return None
        source = self._tiles_of(x)
        return self._emit_tiled(
            "layer_norm",
            [source.expr, self.new(gamma), self.new(beta)],
            source.tiles,
            source.features,
            {"epsilon": float(value.attrs.epsilon)},
        )

    def _emit_tiled(
        self,
        name: str,
        args: list[Any],
        tiles: LaneTiles,
        features: int,
        attributes: dict[str, Any],
    ) -> _Tiled:
        attributes = {**attributes, "tiles": _as_list(tiles)}
        call = dialect.call(name, args, tiles.shape(features), **attributes)
        return _Tiled(self.emit(call, name), tiles, features)

    def _unary(self, value: Any) -> _Tiled:
        source = self._tiled[value.args[0]]
        call = relax.Call(value.op, [source.expr], value.attrs, value.ty_args)
        return _Tiled(self.emit(call), source.tiles, source.features)

    def _binary(self, value: Any, shape: tuple[int, ...]) -> _Tiled | None:
        """Operands of the full shape are tiled; constants and feature vectors broadcast."""
        source = next(self._tiled[arg] for arg in value.args if arg in self._tiled)
        operands = []
        for arg in value.args:
            if scalar_value(arg) is not None:
                operands.append(arg)
            elif arg in self._tiled or shape_of(arg) == shape:
                if shape_of(arg) != shape:
                    return None
                operands.append(self._tiles_of(arg, source.tiles).expr)
            elif shape_of(arg) == shape[-1:]:
                column = (1, 1, shape[-1], 1)
                operands.append(self.emit(relax.op.reshape(self.new(arg), column)))
            else:
                return None
        call = relax.Call(value.op, operands, value.attrs, value.ty_args)
        return _Tiled(self.emit(call), source.tiles, source.features)


def _as_list(tiles: LaneTiles) -> list[int]:
    return [tiles.lead, tiles.rows, tiles.lanes]
