"""Activations that a model rounds to 8 bits, as they stand in Relax: what was rounded, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.passes.graph import (
    Graph,
    constant_value,
    dtype_of,
    same,
    scalar_value,
    shape_of,
)
from sparse_tvm.sparsity.quantise import PEAK_STEPS

_LAST_STEP = 255
_LEAST_SCALE = 1e-5
"""Below which models may raise a token's scale, and kernels do not: all but zeros."""

MIDDLE = 128
"""The byte that stands for 0 where a scale is symmetric."""


@dataclass(frozen=True)
class Rounding:
    """A rounded activation: of what, and by which scale and zero point (numbers, or tensors).

    The zero point is that of bytes from 0 to 255. ``of_tokens`` tells that each token has a scale
    of its own, as kernels find it: `PEAK_STEPS` are its largest magnitude.
    """

    source: Any
    scale: Any
    zero: Any
    of_tokens: bool = False


class Roundings:
    """Finds them in a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def of(self, x: Any) -> Rounding | None:
        """Take ``round(min(max(x / scale, low), high)) * scale`` apart, or ``(q - zero) * scale``.

        What was scaled is rounded again in the latter: to the integers that it was.
        """
        while (moved := self.graph.op(x, "reshape", "expand_dims", "squeeze")) is not None:
            if not _keeps_features(moved):
                return None
            x = moved.args[0]
        return self.at(x)

    def at(self, x: Any) -> Rounding | None:
        """The same for what was not moved since."""
        product = self.graph.op(x, "multiply")
        if product is None or dtype_of(x) != "float32":
            return None
        steps, scale = product.args
        if (integers := self._stored_integers(steps)) is not None and scalar_value(scale):
            return Rounding(x, scalar_value(scale), integers)
        rounded = self.graph.op(steps, "round")
        high = self._operand(rounded, "minimum")
        low = self._operand(high, "maximum")
        quotient = self._operand(low, "divide")
        if low is None or high is None or quotient is None:
            return None
        if not _equal(quotient.args[1], scale):
            return None
        zero = self._zero_point(low.args[1], high.args[1])
        number = scalar_value(scale)
        symmetric = isinstance(zero, float) and zero == MIDDLE
        of_tokens = symmetric and self._is_of_tokens(scale, quotient.args[0])
        if zero is None or (number is None and shape_of(scale) and not of_tokens):
            return None
        return Rounding(quotient.args[0], scale if number is None else number, zero, of_tokens)

    def _is_of_tokens(self, scale: Any, x: Any) -> bool:
        """Whether it is ``max(max(abs(x)) / PEAK_STEPS, least)``, of each token."""
        while (moved := self.graph.op(scale, "reshape", "expand_dims")) is not None:
            scale = moved.args[0]
        raised = self.graph.op(scale, "maximum")
        quotient = self._operand(raised, "divide")
        peak = self._operand(quotient, "max")
        magnitude = self._operand(peak, "abs")
        if raised is None or quotient is None or peak is None or magnitude is None:
            return False
        last = len(shape_of(x)) - 1
        return (
            scalar_value(quotient.args[1]) == PEAK_STEPS
            and (scalar_value(raised.args[1]) or 1) <= _LEAST_SCALE
            and [axis % (last + 1) for axis in peak.attrs.axis or []] == [last]
            and same(magnitude.args[0], x)
        )

    def _operand(self, call: relax.Call | None, name: str) -> relax.Call | None:
        """The call that computes the first operand of another, if there are both."""
        return None if call is None else self.graph.op(call.args[0], name)

    def _stored_integers(self, steps: Any) -> float | None:
        """Return the zero point of integers of 8 bits, as of bytes, if these are some."""
        zero: float | None = 0.0
        shifted = self.graph.op(steps, "subtract")
        if shifted is not None:
            zero, steps = scalar_value(shifted.args[1]), shifted.args[0]
        cast = self.graph.op(steps, "astype")
        dtype = "" if cast is None else dtype_of(cast.args[0])
        middle = {"uint8": 0, "int8": MIDDLE}.get(dtype)
        return None if zero is None or middle is None else zero + middle

    def _zero_point(self, low: Any, high: Any) -> Any:
        """Return which step is 0, if there are 256: a number or a tensor."""
        bounds = _uniform(low), _uniform(high)
        if bounds[0] is not None and bounds[1] is not None:
            return -bounds[0] if bounds[1] - bounds[0] == _LAST_STEP else None
        below, above = (self.graph.op(bound, "subtract") for bound in (low, high))
        if below is None or above is None or not _equal(below.args[1], above.args[1]):
            return None
        ends = [scalar_value(call.args[0]) for call in (below, above)]
        zero = below.args[1]
        return zero if ends == [0, _LAST_STEP] and not shape_of(zero) else None


def _keeps_features(call: relax.Call) -> bool:
    before, after = shape_of(call.args[0]), shape_of(call)
    return bool(before) and bool(after) and before[-1] == after[-1]


def _uniform(expr: Any) -> float | None:
    """The number behind a constant whose elements, one of each token perhaps, are all equal."""
    values = constant_value(expr)
    if values is None or not values.size or (values != values.flat[0]).any():
        return None
    return float(values.flat[0])


def _equal(a: Any, b: Any) -> bool:
    one, other = constant_value(a), constant_value(b)
    if one is None or other is None:
        return same(a, b)
    return np.array_equal(one, other)
