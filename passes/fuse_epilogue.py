"""Epilogue fusion: what follows a dense layer happens in its registers.

Matches ``matmul(x, permute_dims(w))`` (the form fc-transpose leaves) with, in either operand
order, a bias, an activation and a residual behind it, and turns the longest such chain into one
``sparse_tvm.dense``. A value that something else also reads ends the chain, since it must be
stored anyway. Leaves alone: x with fewer than two dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm import relax

from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import (
    Rewrite,
    dtype_of,
    is_tensor,
    op_name,
    same,
    same_shape,
    shape_of,
)
from sparse_tvm.passes.program import Program

ACTIVATIONS = {
    "relax.nn.relu": "relu",
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.silu": "silu",
    "relax.tanh": "tanh",
    "relax.sigmoid": "sigmoid",
}
"""Names in ``vector_math.ACTIVATIONS`` by operator."""


@dataclass
class _Chain:
    """A dense layer and the steps behind it so far."""

    x: Any
    w: Any
    epilogue: list[str] = field(default_factory=list)
    extras: list[Any] = field(default_factory=list)

    def then(self, step: str, *extra: Any) -> _Chain:
        return _Chain(self.x, self.w, [*self.epilogue, step], [*self.extras, *extra])


def fuse_epilogue(program: Program) -> Program:
    """Apply the pass."""
    return _FuseEpilogue(program).run()


class _FuseEpilogue(Rewrite):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._chains: dict[Any, _Chain] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        chain = self._start(value) or self._extend(value)
        if chain is None:
            return None
        self._chains[var] = chain
        operands = [self.new(e) for e in (chain.x, chain.w, *chain.extras)]
        layer = self.program.layers[chain.w.name]
        return dialect.call("dense", operands, shape_of(var), layer=layer, epilogue=chain.epilogue)

    def _start(self, value: Any) -> _Chain | None:
        if op_name(value) != "relax.matmul":
            return None
        x, transposed = value.args
        permuted = self.graph.op(transposed, "permute_dims")
        w = permuted.args[0] if permuted is not None else None
        known = isinstance(w, relax.Var) and w.name in self.program.layers
        if not known or len(shape_of(x)) < 2 or dtype_of(x) != "float32":
            return None
        return _Chain(x, w)

    def _extend(self, value: Any) -> _Chain | None:
        """The chain one step longer, when ``value`` applies a step to its end."""
        name = op_name(value)
        if name in ACTIVATIONS:
            chain = self._ending(value.args[0])
            return chain.then(ACTIVATIONS[name]) if chain else None
        if name == "relax.reshape":
            keeps_rows = same_shape(shape_of(value)[-1:], shape_of(value.args[0])[-1:])
            return self._ending(value.args[0]) if keeps_rows else None
        if name != "relax.add":
            return None
        for end, other in (tuple(value.args), tuple(value.args)[::-1]):
            chain = self._ending(end)
            if chain is None or not same_shape(shape_of(end), shape_of(value)):
                continue  # other broadcasts the chain's end
            if not is_tensor(other):
                continue
            if same_shape(shape_of(other), shape_of(end)[-1:]) and self.array(other) is not None:
                return chain.then("bias", other)
            if same_shape(shape_of(other), shape_of(value)) and not same(other, end):
                return chain.then("residual", other)
        return None

    def _ending(self, expr: Any) -> _Chain | None:
        """The chain that ends in ``expr``, if nothing else reads it."""
        return self._chains.get(expr) if self.graph.used_once(expr) else None
