"""Recognise activation functions that an exporter spelled out.

Matches a multiply or divide at the end of any tree of elementwise operators over one tensor and
constants, such as ``0.5 * x * (1 + erf(x / sqrt(2)))``, and turns it into ``relax.nn.gelu``,
``gelu_tanh`` or ``silu``, which the epilogue of a layer can hold.
:mod:`sparse_tvm.passes.spelled_out` says how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax

from sparse_tvm.passes.graph import Rewrite, op_name, same_shape, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.passes.spelled_out import SpelledOut

_TRANSCENDENTAL = {"erf", "tanh", "exp", "sigmoid"}

_OPERATORS: dict[str, Callable[[Any], Any]] = {
    "gelu": relax.op.nn.gelu,
    "gelu_tanh": relax.op.nn.gelu_tanh,
    "silu": relax.op.nn.silu,
}


@graph_pass()
def fuse_activations(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FuseActivations(program).run()


class _FuseActivations(Rewrite):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._spelled_out = SpelledOut(self.graph)

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) not in ("relax.multiply", "relax.divide"):
            return None
        tree = self._spelled_out.tree(var)
        if not tree.operators & _TRANSCENDENTAL:
            return None
        for x in tree.variables:
            function = self._spelled_out.function(var, x)
            if function in _OPERATORS and same_shape(shape_of(x), shape_of(var)):
                return _OPERATORS[function](self.new(x))
        return None
