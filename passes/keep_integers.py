"""Keep integers: quantised layers multiply the integers that the model has, where that is exact.

Matches a dense layer of float32 whose input the model rounds to 8 bits by one scale and zero point,
fixed or of the values that there are, and whose weight's rows are multiples of a step, at most 127
of them. It becomes a layer in int8 that reads :class:`~sparse_tvm.operators.StepRound`. Kernels
multiply bytes less 128; what the zero point differs from that by is a bias, for it counts each
weight once: ``scale * (128 - zero point) * sum of the row``.

Leaves float32, with a note: weights with larger steps (asymmetric ones), layers that the user gave
a precision, targets without kernels, and convolutions, for which there are none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.operators import FLOAT32, PRECISIONS, Bias, Convolution, Dense, StepRound
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import (
    Rewrite,
    constant_value,
    dtype_of,
    same,
    scalar_value,
    shape_of,
)
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.sparsity.quantise import steps_of_rows

_LAST_STEP = 255
_MIDDLE = 128
"""What kernels take off a byte."""


@graph_pass()
def keep_integers(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _KeepIntegers(program, context).run() if context.options.integers else program


@dataclass(frozen=True)
class _Rounding:
    """A rounded activation: of what, and by which scale and zero point (numbers, or tensors).

    The zero point is that of bytes from 0 to 255.
    """

    source: Any
    scale: Any
    zero: Any


class _KeepIntegers(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self._rounded: dict[Any, Any] = {}
        self._convolutions = 0

    def run(self) -> Program:
        program = super().run()
        if self._convolutions:
            program.notes.append(
                f"{self._convolutions} quantised convolutions compute in float32: there are no "
                "kernels of int8 for them"
            )
        return program

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        convolution = dialect.match(value, Convolution)
        if convolution is not None:
            self._convolutions += self._rounding(convolution.args[0]) is not None
            return None
        found = dialect.match(value, Dense)
        if found is None or found.op.layout is not None or found.op.types != FLOAT32:
            return None
        if self._context.options.ruled_precision(found.op.layer) is not None:
            return None
        rounding = self._rounding(found.args[0])
        if rounding is None:
            return None
        w = self.array(found.args[1])
        assert w is not None
        op = replace(found.op, types=PRECISIONS["int8"], exact=True)
        refusal = self._context.backend.refuses(self._biased(op), self._context.target)
        if refusal is None and not (steps_of_rows(w) > 0)[w.any(axis=1)].all():
            refusal = "its weights are more than 127 steps from 0"
        if refusal is not None:
            self.program.notes.append(f"{op.layer} is quantised but stays float32: {refusal}")
            return None
        return self._in_integers(op, found, rounding, w, var)

    def _biased(self, op: Dense) -> Dense:
        starts_so = op.epilogue[:1] == (Bias(),)
        return op if starts_so else replace(op, epilogue=(Bias(), *op.epilogue))

    def _in_integers(
        self,
        op: Dense,
        found: dialect.OperatorCall[Dense],
        rounding: _Rounding,
        w: np.ndarray,
        var: relax.Var,
    ) -> Any:
        x, weight, *extras = found.args
        biased, extras = self._biased(op), [self.new(extra) for extra in extras]
        correction = self._correction(rounding, w, f"{op.layer}.zero_point")
        if correction is None:
            biased = op
        elif biased is op:
            extras[0] = self.emit(relax.op.add(extras[0], correction))
        else:
            extras = [correction, *extras]
        return dialect.call(
            biased, [self._steps(x, rounding), self.new(weight), *extras], shape_of(var)
        )

    def _steps(self, x: Any, rounding: _Rounding) -> Any:
        """The rounded input, made once for all layers that read it."""
        if x not in self._rounded:
            parameters = [self._vector(value) for value in (rounding.scale, rounding.zero)]
            source = self.new(rounding.source)
            if len(shape_of(x)) != len(shape_of(rounding.source)):
                source = self.emit(relax.op.reshape(source, shape_of(x)))
            op = StepRound()
            call = dialect.call(op, [source, *parameters], shape_of(x))
            self._rounded[x] = self.emit(call, op.name)
        return self._rounded[x]

    def _vector(self, value: Any) -> Any:
        if isinstance(value, float):
            return relax.const(np.array([value], np.float32))
        return self.emit(relax.op.reshape(self.new(value), [1]))

    def _correction(self, rounding: _Rounding, w: np.ndarray, name: str) -> Any:
        """What every token's sums lack, ``[N]``; None if nothing."""
        sums = w.sum(axis=1, dtype=np.float64).astype(np.float32)
        if isinstance(rounding.zero, float) and rounding.zero == _MIDDLE:
            return None
        if isinstance(rounding.scale, float) and isinstance(rounding.zero, float):
            factor = np.float32(rounding.scale * (_MIDDLE - rounding.zero))
            return self.weight(name, sums * factor)
        scale, zero = (
            relax.const(value, "float32") if isinstance(value, float) else self.new(value)
            for value in (rounding.scale, rounding.zero)
        )
        shift = relax.op.subtract(relax.const(float(_MIDDLE), "float32"), zero)
        factor = self.emit(relax.op.multiply(scale, shift))
        return self.emit(relax.op.multiply(self.weight(name, sums), factor))

    def _rounding(self, x: Any) -> _Rounding | None:
        """Take ``round(min(max(x / scale, low), high)) * scale`` apart, or ``(q - zero) * scale``.

        What was scaled is rounded again in the latter: to the integers that it was.
        """
        while (moved := self.graph.op(x, "reshape", "expand_dims", "squeeze")) is not None:
            if not _keeps_features(moved):
                return None
            x = moved.args[0]
        product = self.graph.op(x, "multiply")
        if product is None or dtype_of(x) != "float32":
            return None
        steps, scale = product.args
        if (integers := self._stored_integers(steps)) is not None and scalar_value(scale):
            return _Rounding(x, scalar_value(scale), integers)
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
        if zero is None or (number is None and shape_of(scale)):
            return None
        return _Rounding(quotient.args[0], scale if number is None else number, zero)

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
        middle = {"uint8": 0, "int8": _MIDDLE}.get(dtype)
        return None if zero is None or middle is None else zero + middle

    def _zero_point(self, low: Any, high: Any) -> Any:
        """Return which step is 0, if there are 256: a number or a tensor."""
        bounds = scalar_value(low), scalar_value(high)
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


def _equal(a: Any, b: Any) -> bool:
    one, other = constant_value(a), constant_value(b)
    if one is None or other is None:
        return same(a, b)
    return np.array_equal(one, other)
