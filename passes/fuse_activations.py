"""Recognise activation functions that an exporter spelled out.

Matches a multiply or divide at the end of any tree of elementwise operators over one tensor and
constants, such as ``0.5 * x * (1 + erf(x / sqrt(2)))``, and turns it into ``relax.nn.gelu``,
``gelu_tanh`` or ``silu``, which the epilogue of a dense layer can hold. Exporters differ in
association, operand order and constants, so the tree is recognised by its values: it is evaluated
at sample points in float64 and compared with each known function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.passes.graph import Rewrite, op_name, same, same_shape, scalar_value, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program

_SAMPLES = np.concatenate([np.linspace(-12, 12, 193), np.linspace(-0.1, 0.1, 21)])
_MAX_SIZE = 16

_erf = np.vectorize(math.erf)

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "power": np.power,
    "negative": np.negative,
    "exp": np.exp,
    "erf": _erf,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sqrt": np.sqrt,
    "square": np.square,
}
_TRANSCENDENTAL = {"erf", "tanh", "exp", "sigmoid"}

_KNOWN: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "gelu": (lambda x: 0.5 * x * (1 + _erf(x * math.sqrt(0.5))), relax.op.nn.gelu),
    "gelu_tanh": (
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        relax.op.nn.gelu_tanh,
    ),
    "silu": (lambda x: x / (1 + np.exp(-x)), relax.op.nn.silu),
}


@graph_pass()
def fuse_activations(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FuseActivations(program).run()


class _FuseActivations(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) not in ("relax.multiply", "relax.divide"):
            return None
        variables, operators = self._tree(var)
        if not operators & _TRANSCENDENTAL:
            return None
        for x in variables:
            values = self._evaluate(var, x)
            if values is None or not same_shape(shape_of(x), shape_of(var)):
                continue
            for reference, build in _KNOWN.values():
                if np.allclose(values, reference(_SAMPLES), rtol=1e-5, atol=1e-6):
                    return build(self.new(x))
        return None

    def _tree(self, root: relax.Var) -> tuple[list[relax.Var], set[str]]:
        """Variables under ``root``, nearest first, and the elementwise operators between."""
        queue: list[relax.Var] = [root]
        variables: list[relax.Var] = []
        operators: set[str] = set()
        while queue and len(operators) + len(variables) < _MAX_SIZE:
            call = self.graph.value(queue.pop(0))
            name = (op_name(call) or "").removeprefix("relax.")
            if name not in _ELEMENTWISE:
                continue
            operators.add(name)
            for arg in call.args:
                if isinstance(arg, relax.Var) and not any(same(arg, v) for v in variables):
                    variables.append(arg)
                    queue.append(arg)
        return variables, operators

    def _evaluate(self, root: relax.Var, x: relax.Var) -> np.ndarray | None:
        """Values of ``root`` when ``x`` takes the sample values; None if it reads more than x."""
        known: dict[Any, Any] = {x: _SAMPLES}

        def visit(expr: Any, depth: int) -> Any:
            if not isinstance(expr, relax.Var):
                return compute(expr, depth)
            if expr not in known:
                known[expr] = compute(expr, depth)
            return known[expr]

        def compute(expr: Any, depth: int) -> Any:
            number = scalar_value(expr)
            if number is not None:
                return np.float64(number)
            call = self.graph.value(expr)
            function = _ELEMENTWISE.get((op_name(call) or "").removeprefix("relax."))
            if function is None or depth > _MAX_SIZE:
                return None
            operands = [visit(arg, depth + 1) for arg in call.args]
            return None if any(o is None for o in operands) else function(*operands)

        with np.errstate(all="ignore"):
            values = visit(root, 0)
        return values if isinstance(values, np.ndarray) and np.isfinite(values).all() else None
