"""Epilogue fusion: what follows a dense layer happens in its registers.

Matches ``matmul(x, permute_dims(w))`` (the form fc-transpose leaves), or a bare
``sparse_tvm.dense``, with, in either operand
order, a bias, an activation and a residual behind it, and turns the longest such chain into one
``sparse_tvm.dense``. A value that something else also reads ends the chain, since it must be
stored anyway. Leaves alone: x with fewer than two dimensions, and what no kernel family accepts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm import relax

from sparse_tvm.operators import Activation, Bias, Dense, Residual, Step, WeightedOperator
from sparse_tvm.passes import dialect
from sparse_tvm.passes.fc_transpose import WEIGHTS_TRANSPOSED
from sparse_tvm.passes.graph import (
    Rewrite,
    dtype_of,
    is_tensor,
    op_name,
    same,
    same_shape,
    shape_of,
)
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.passes.spelled_out import SpelledOut

ACTIVATIONS = {
    "relax.nn.relu": "relu",
    "relax.nn.gelu": "gelu",
    "relax.nn.gelu_tanh": "gelu_tanh",
    "relax.nn.silu": "silu",
    "relax.tanh": "tanh",
    "relax.sigmoid": "sigmoid",
}
"""Functions of :class:`~sparse_tvm.operators.Activation` by Relax operator."""

SPELLED_OUT = {"hard_sigmoid", "hard_swish"}
"""Those that Relax has no operator for."""


@dataclass(frozen=True)
class Chain:
    """A layer and the steps behind it so far; its operands are those of the original graph."""

    op: WeightedOperator
    x: Any
    w: Any
    extras: tuple[Any, ...] = ()

    def then(self, *steps: Step, extra: Any = None) -> Chain:
        """The chain with more steps, of which one may read a tensor."""
        extras = self.extras if extra is None else (*self.extras, extra)
        return replace(self, op=self.op.then(*steps), extras=extras)


class FuseEpilogue(Rewrite):
    """Base of the passes that move what follows a layer into it.

    A pass says what a layer is (:meth:`start`) and which steps may follow (:meth:`extended`); the
    backend's families have the last word on each.
    """

    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self._chains: dict[Any, Chain] = {}
        self._spelled_out = SpelledOut(self.graph)

    def start(self, var: relax.Var, value: Any) -> Chain | None:
        """The layer that a binding is."""
        raise NotImplementedError

    def extended(self, value: Any) -> Chain | None:
        """The chain one step longer, when ``value`` applies a step to its end."""
        raise NotImplementedError

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        """The layer with the steps so far, at each of them; the last is the one that stays."""
        chain = self.start(var, value)
        if chain is not None:
            refusal = self._refusal(chain)
            if refusal is not None:
                self.program.notes.append(f"{chain.op.layer} runs without a kernel: {refusal}")
                return None
        else:
            chain = self.extended(value) or self._written_out(var, value)
            if chain is None or self._refusal(chain) is not None:
                return None
        self._chains[var] = chain
        return self.call(chain, var)

    def call(self, chain: Chain, var: relax.Var) -> Any:
        """The call of a layer with its steps, which gives what ``var`` was."""
        return dialect.call(
            chain.op,
            [self.new(chain.x), self.new(chain.w), *self.operands(chain)],
            shape_of(var),
        )

    def operands(self, chain: Chain) -> list[Any]:
        """What the steps of a chain read, in the new graph."""
        steps = [step for step in chain.op.epilogue if step.operand]
        return [self.operand(chain, *pair) for pair in zip(steps, chain.extras, strict=True)]

    def operand(self, chain: Chain, step: Step, extra: Any) -> Any:
        """The tensor that a step reads, in the new graph."""
        return self.new(extra)

    def ending(self, expr: Any) -> Chain | None:
        """The chain that ends in ``expr``, if nothing else reads it."""
        return self._chains.get(expr) if self.graph.used_once(expr) else None

    def activated(self, value: Any) -> Chain | None:
        """The chain with an activation function behind it, if ``value`` applies one."""
        name = op_name(value)
        if name not in ACTIVATIONS:
            return None
        chain = self.ending(value.args[0])
        return chain.then(Activation(ACTIVATIONS[name])) if chain else None

    def _written_out(self, var: relax.Var, value: Any) -> Chain | None:
        """The chain with a function behind it that Relax has no operator for."""
        if op_name(value) not in ("relax.multiply", "relax.divide", "relax.clip"):
            return None
        for x in self._spelled_out.tree(var).variables:
            chain = self._chains.get(x)
            if chain is None or not same_shape(shape_of(x), shape_of(var)):
                continue
            function = self._spelled_out.function(var, x)
            if function in SPELLED_OUT and self._spelled_out.all_between(var, x):
                return chain.then(Activation(function))
        return None

    def _refusal(self, chain: Chain) -> str | None:
        return self._context.backend.refuses(chain.op, self._context.target)


@graph_pass(requires=[WEIGHTS_TRANSPOSED])
def fuse_epilogue(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FuseDense(program, context).run()


class _FuseDense(FuseEpilogue):
    def start(self, var: relax.Var, value: Any) -> Chain | None:
        found = dialect.match(value, Dense)
        if found is not None:
            return Chain(found.op, *found.args)
        if op_name(value) != "relax.matmul":
            return None
        x, transposed = value.args
        permuted = self.graph.op(transposed, "permute_dims")
        w = permuted.args[0] if permuted is not None else None
        if not isinstance(w, relax.Var) or w.name not in self.program.layers:
            return None
        if len(shape_of(x)) < 2 or dtype_of(x) != "float32":
            return None
        n, k = shape_of(w)
        return Chain(Dense(layer=self.program.layers[w.name], matrix=(n, k)), x, w)

    def extended(self, value: Any) -> Chain | None:
        name = op_name(value)
        if name == "relax.reshape":
            keeps_rows = same_shape(shape_of(value)[-1:], shape_of(value.args[0])[-1:])
            return self.ending(value.args[0]) if keeps_rows else None
        if name != "relax.add":
            return self.activated(value)
        for end, other in (tuple(value.args), tuple(value.args)[::-1]):
            chain = self.ending(end)
            if chain is None or not same_shape(shape_of(end), shape_of(value)):
                continue  # other broadcasts the chain's end
            if not is_tensor(other):
                continue
            if same_shape(shape_of(other), shape_of(end)[-1:]) and self.array(other) is not None:
                return chain.then(Bias(), extra=other)
            if same_shape(shape_of(other), shape_of(value)) and not same(other, end):
                return chain.then(Residual(), extra=other)
        return None
