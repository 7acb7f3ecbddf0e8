"""Functions that are spelled out: trees of elementwise operators over one tensor and constants.

Exporters differ in association, operand order and constants, so a tree is recognised by its values:
it is evaluated at sample points in float64 and compared with each known function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tvm import relax

from sparse_tvm.passes.graph import Graph, is_number, op_name, same, scalar_value

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
    "clip": np.clip,
    "maximum": np.maximum,
    "minimum": np.minimum,
}

_KNOWN: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: 0.5 * x * (1 + _erf(x * math.sqrt(0.5))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
}
_VALUES = {name: function(_SAMPLES) for name, function in _KNOWN.items()}


class Tree(NamedTuple):
    """Elementwise operators that end in one variable.

    Attributes
    ----------
    variables : list[relax.Var]
        What they read, nearest first, the results of others among them included.
    operators : set[str]
        Their names.
    """

    variables: list[relax.Var]
    operators: set[str]


class SpelledOut:
    """Recognises functions in a graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def tree(self, root: relax.Var) -> Tree:
        """The elementwise operators that end in ``root``, and what they read."""
        queue: list[relax.Var] = [root]
        variables: list[relax.Var] = []
        operators: set[str] = set()
        while queue and len(operators) + len(variables) < _MAX_SIZE:
            call = self._graph.value(queue.pop(0))
            name = _name(call)
            if name not in _ELEMENTWISE:
                continue
            operators.add(name)
            for arg in call.args:
                if isinstance(arg, relax.Var) and not any(same(arg, v) for v in variables):
                    variables.append(arg)
                    queue.append(arg)
        return Tree(variables, operators)

    def function(self, root: relax.Var, x: relax.Var) -> str | None:
        """Which function of ``x`` the tree that ends in ``root`` computes, if it is a known one."""
        values = self._values(root, x)
        if values is None:
            return None
        close = (
            name
            for name, expected in _VALUES.items()
            if np.allclose(values, expected, rtol=1e-5, atol=1e-6)
        )
        return next(close, None)

    def all_between(self, root: relax.Var, x: relax.Var) -> bool:
        """Whether only the tree from ``x`` to ``root`` reads ``x`` and what is computed of it."""
        reads: dict[Any, int] = {}
        queue, seen = [root], {root}
        while queue:
            for arg in self._graph.value(queue.pop()).args:
                if not isinstance(arg, relax.Var):
                    continue
                reads[arg] = reads.get(arg, 0) + 1
                if not same(arg, x) and arg not in seen:
                    seen.add(arg)
                    queue.append(arg)
        return all(self._graph.uses(var) == count for var, count in reads.items())

    def _values(self, root: relax.Var, x: relax.Var) -> np.ndarray | None:
        """Values of ``root`` when ``x`` takes the sample values; None if it reads more than x."""
        known: dict[Any, Any] = {x: _SAMPLES}

        def visit(expr: Any, depth: int) -> Any:
            if not isinstance(expr, relax.Var):
                return compute(expr, depth)
            if expr not in known:
                known[expr] = compute(expr, depth)
            return known[expr]

        def compute(expr: Any, depth: int) -> Any:
            if is_number(expr):  # a bound of clip
                return np.float64(float(expr.value))
            number = scalar_value(expr)
            if number is not None:
                return np.float64(number)
            call = self._graph.value(expr)
            function = _ELEMENTWISE.get(_name(call))
            if function is None or depth > _MAX_SIZE:
                return None
            operands = [visit(arg, depth + 1) for arg in call.args]
            return None if any(o is None for o in operands) else function(*operands)

        with np.errstate(all="ignore"):
            values = visit(root, 0)
        return values if isinstance(values, np.ndarray) and np.isfinite(values).all() else None


def _name(value: Any) -> str:
    return (op_name(value) or "").removeprefix("relax.")
