"""Signals and images that are tokens turned round are turned back.

Matches ``relax.nn.conv1d`` of kernel 1, perhaps in groups, over ``permute_dims(t, [0, 2, 1])`` of
tokens ``t`` ``[batch, rows, features]``, where what it makes becomes tokens or heads again, as in
SqueezeBERT; it becomes a ``sparse_tvm.dense`` over ``t``. Permutations move behind elementwise
operators and behind reshapes that split or merge the features, and meet their inverses there:
what is left between such layers is how BERT's are spelled.

Permutations of tokens ``[batch, height, width, features]`` into images move in the same way, where
the image becomes tokens again: the residuals between the blocks of ConvNeXt are tokens, and only
convolutions read images. Leaves alone: convolutions of signals that stay signals, images that stay
images, and what no kernel family accepts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.operators import Dense
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import (
    Rewrite,
    dtype_of,
    is_tensor,
    op_name,
    same_dim,
    same_shape,
    scalar_value,
    shape_of,
)
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program

_UNARY = {
    f"relax.{name}"
    for name in ("nn.relu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "tanh", "sigmoid", "erf")
}
_BINARY = {f"relax.{name}" for name in ("add", "subtract", "multiply", "divide")}

_TURNED = {3: [0, 2, 1], 4: [0, 3, 1, 2]}
"""How signals, and images, lie beside tokens."""

_BACK = [0, 2, 3, 1]
"""How tokens lie beside images."""

_HEADS_LAST = [0, 2, 3, 1]
"""How ``[batch, heads, size, rows]`` lies beside tokens split into heads."""


@dataclass(frozen=True)
class _Turned:
    """A tensor that is ``permute_dims(expr, axes)``."""

    expr: Any
    axes: list[int]


@graph_pass()
def signals_to_tokens(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _SignalsToTokens(program, context).run()


class _SignalsToTokens(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self._turned: dict[Any, _Turned] = {}
        self._tokens_of: dict[Any, relax.Var] = {}
        self._returning: set[Any] = set()
        for binding in reversed(self.graph.bindings):
            self._returning |= self._sources_returning(binding.var, binding.value)

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        name = op_name(value)
        if name == "relax.permute_dims":
            return self._permuted(var, value)
        if name == "relax.nn.conv1d":
            return self._convolution(var, value)
        if name == "relax.reshape":
            return self._split(value)
        if name in _UNARY:
            return self._unary(var, value)
        return self._binary(var, value) if name in _BINARY else None

    def bind(self, var: relax.Var, value: Any) -> None:
        if isinstance(value, _Turned):
            self._turned[var] = value
        else:
            super().bind(var, value)

    def new(self, expr: Any) -> Any:
        """An expression as the model has it, turned if that was put off."""
        if isinstance(expr, relax.Var) and expr in self._turned and expr not in self._new:
            turned = self._turned[expr]
            self._new[expr] = self.emit(relax.op.permute_dims(turned.expr, turned.axes), expr.name)
        return super().new(expr)

    def _sources_returning(self, var: Any, value: Any) -> set[Any]:
        """What an operator reads as signals and makes tokens or heads of, there or later on."""
        name = op_name(value)
        if name == "relax.permute_dims":
            back = not _is_image(var) or _axes(value) == _BACK
            return {value.args[0]} if back else set()
        if name == "relax.reshape" and _splits(value):
            return {value.args[0]}
        passes_on = name in _UNARY | _BINARY or (
            name == "relax.nn.conv1d" and self._weight(value) is not None
        )
        if not passes_on or var not in self._returning:
            return set()
        operands = value.args[:1] if name == "relax.nn.conv1d" else value.args
        return {arg for arg in operands if isinstance(arg, relax.Var)}

    def _permuted(self, var: relax.Var, value: Any) -> Any:
        x, axes = value.args[0], _axes(value)
        if x not in self._turned:
            if axes == _BACK:
                self._tokens_of[x] = var
            return _Turned(self.new(x), axes)
        turned = self._turned[x]
        axes = [turned.axes[axis] for axis in axes]
        return turned.expr if axes == sorted(axes) else _Turned(turned.expr, axes)

    def _tokens(self, x: Any) -> Any:
        """The tokens that a signal or an image is made of; None if it is no such thing."""
        turned = self._turned.get(x) if isinstance(x, relax.Var) else None
        if turned is None or turned.axes != _TURNED.get(len(turned.axes)):
            return None
        return turned.expr

    def _unary(self, var: Any, value: Any) -> Any:
        tokens, rank = self._tokens(value.args[0]), len(shape_of(var))
        if tokens is None or (_is_image(var) and var not in self._returning):
            return None
        call = relax.Call(value.op, [tokens], value.attrs, value.ty_args)
        return _Turned(self.emit(call, var.name), _TURNED[rank])

    def _split(self, value: Any) -> Any:
        """The features of a signal split into heads: those of its tokens, turned."""
        tokens = self._tokens(value.args[0])
        if tokens is None or not _splits(value):
            return None
        batch, heads, size, rows = shape_of(value)
        split = self.emit(relax.op.reshape(tokens, (batch, rows, heads, size)))
        return _Turned(split, _HEADS_LAST)

    def _merged(self, x: Any) -> Any:
        """The tokens of a signal whose features are merged heads; None if it is no such signal."""
        merged = self.graph.op(x, "reshape")
        heads = self._turned.get(merged.args[0]) if merged is not None else None
        if merged is None or heads is None or len(heads.axes) != 4 or len(shape_of(x)) != 3:
            return None
        batch, features, rows = shape_of(x)
        first, *_, last = shape_of(merged.args[0])
        if not (same_dim(first, batch) and same_dim(last, rows)):
            return None
        axes = [heads.axes[axis] for axis in (0, 3, 1, 2)]
        split = self.emit(relax.op.permute_dims(heads.expr, axes))
        return self.emit(relax.op.reshape(split, (batch, rows, features)))

    def _convolution(self, var: Any, value: Any) -> Any:
        x, weight = value.args[0], self._weight(value)
        if weight is None or var not in self._returning:
            return None
        (n, k, _), groups = weight.shape, int(value.attrs.groups)
        source = self.graph.value(value.args[1])
        name = source.name if isinstance(source, relax.Var) else var.name
        layer = self.program.layers.get(name, name)
        op = Dense(layer=layer, matrix=(n, k), groups=groups)
        if self._context.backend.refuses(op, self._context.target) is not None:
            return None
        tokens = self._tokens(x)
        if tokens is None:
            tokens = self._merged(x)
        if tokens is None:
            return None
        matrix = self.weight(f"{name}_matrix", np.ascontiguousarray(weight[:, :, 0]))
        self.program.layers[matrix.name] = layer
        batch, features, rows = shape_of(var)
        call = dialect.call(op, [tokens, matrix], (batch, rows, features))
        return _Turned(self.emit(call, var.name), _TURNED[3])

    def _weight(self, value: Any) -> np.ndarray | None:
        """The constant weight of a convolution of kernel 1."""
        attrs, weight = value.attrs, self.array(value.args[1])
        plain = [int(n) for n in (*attrs.strides, *attrs.padding)] == [1, 0, 0]
        layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout)
        if weight is None or weight.dtype != np.float32 or weight.shape[2] != 1 or not plain:
            return None
        return weight if layouts == ("NCW", "OIW", "NCW") else None

    def _binary(self, var: Any, value: Any) -> Any:
        """Signals or images of one shape, or one and a number, perhaps for each feature."""
        if var not in self._returning:
            return None
        turned = [self._tokens(arg) for arg in value.args]
        if all(tokens is None for tokens in turned):
            return None
        operands: list[Any] = []
        for arg, tokens in zip(value.args, turned, strict=True):
            whole = is_tensor(arg) and same_shape(shape_of(arg), shape_of(var))
            if tokens is not None and whole:
                operands.append(tokens)
            elif scalar_value(arg) is not None:
                operands.append(arg)
            elif (vector := self._vector(arg, shape_of(var))) is not None:
                operands.append(vector)
            elif whole and _is_image(var) and tokens is None:
                operands.append(self._tokens_made_of(arg))
            else:
                return None
        rank = len(shape_of(var))
        if not any(len(shape_of(operand)) == rank for operand in operands):
            return None
        call = relax.Call(value.op, operands, value.attrs, value.ty_args)
        return _Turned(self.emit(call, var.name), _TURNED[rank])

    def _tokens_made_of(self, image: Any) -> Any:
        """An image that was none of tokens, as the model has turned it already or turned here."""
        if image in self._tokens_of:
            return self.new(self._tokens_of[image])
        return self.emit(relax.op.permute_dims(self.new(image), _BACK), "tokens")

    def _vector(self, expr: Any, shape: tuple[Any, ...]) -> Any:
        """A number for each feature, ``[features]``, of what is ``[1, features, 1, ...]``."""
        if not is_tensor(expr) or dtype_of(expr) != "float32":
            return None
        _, features, *size = shape
        column = (features, *[1] * len(size))
        if shape_of(expr) not in (column, (1, *column)):
            return None
        reshape = self.graph.op(expr, "reshape")
        if reshape is not None and shape_of(reshape.args[0]) == (features,):
            return self.new(reshape.args[0])
        numbers = self.array(expr)
        if numbers is not None and isinstance(expr, relax.Var):
            return self.weight(f"{expr.name}_of_tokens", numbers.reshape(-1))
        return self.emit(relax.op.reshape(self.new(expr), (features,)))


def _is_image(expr: Any) -> bool:
    return len(shape_of(expr)) == 4


def _splits(value: Any) -> bool:
    """Whether a reshape splits the features of a signal into heads."""
    before, after = shape_of(value.args[0]), shape_of(value)
    if len(before) != 3 or len(after) != 4:
        return False
    sizes = (before[1], *after[1:3])
    known = all(isinstance(size, int) for size in sizes)
    return known and same_dim(before[0], after[0]) and same_dim(before[2], after[3])


def _axes(call: Any) -> list[int]:
    rank = len(shape_of(call.args[0]))
    axes = call.attrs.axes
    return [int(a) for a in axes] if axes is not None else list(range(rank))[::-1]
