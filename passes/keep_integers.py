"""Keep integers: quantised layers multiply the integers that the model has, where that is exact.

Matches a dense layer of float32 whose input the model rounds to 8 bits by one scale and zero point,
fixed or of the values that there are, and whose weight's rows are multiples of a step, from -128 to
127 of them. It becomes a layer in int8 that reads :class:`~sparse_tvm.operators.StepRound`. Kernels
multiply bytes less 128; what the zero point differs from that by is a bias, for it counts each
weight once: ``scale * (128 - zero point) * sum of the row``. Where each token has a scale of its
own, that of its largest magnitude, the layer reads what was rounded, as any layer in int8 does.

Leaves float32, with a note: weights with larger steps (asymmetric ones), layers that the user gave
a precision, and targets without kernels. Convolutions are
:mod:`~sparse_tvm.passes.keep_integer_images`'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.operators import FLOAT32, PRECISIONS, Bias, Dense, StepRound
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.passes.roundings import MIDDLE, Rounding, Roundings
from sparse_tvm.sparsity.quantise import reach


@graph_pass()
def keep_integers(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _KeepIntegers(program, context).run() if context.options.integers else program


class _KeepIntegers(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self._roundings = Roundings(self.graph)
        self._rounded: dict[Any, Any] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value, Dense)
        if found is None or found.op.layout is not None or found.op.types != FLOAT32:
            return None
        if self._context.options.ruled_precision(found.op.layer) is not None:
            return None
        rounding = self._roundings.of(found.args[0])
        if rounding is None:
            return None
        w = self.array(found.args[1])
        assert w is not None
        steps = reach(w)
        op = replace(found.op, types=PRECISIONS["int8"], steps=steps or 0)
        refusal = self._context.backend.refuses(self._biased(op), self._context.target)
        if refusal is None and steps is None:
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
        rounding: Rounding,
        w: np.ndarray,
        var: relax.Var,
    ) -> Any:
        x, weight, *extras = found.args
        biased, extras = self._biased(op), [self.new(extra) for extra in extras]
        if rounding.of_tokens:  # as kernels round by themselves
            args = [self._source(x, rounding), self.new(weight), *extras]
            return dialect.call(op, args, shape_of(var))
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

    def _steps(self, x: Any, rounding: Rounding) -> Any:
        """The rounded input, made once for all layers that read it."""
        if x not in self._rounded:
            parameters = [self._vector(value) for value in (rounding.scale, rounding.zero)]
            op = StepRound()
            call = dialect.call(op, [self._source(x, rounding), *parameters], shape_of(x))
            self._rounded[x] = self.emit(call, op.name)
        return self._rounded[x]

    def _source(self, x: Any, rounding: Rounding) -> Any:
        """What was rounded, in the shape in which it is read."""
        source = self.new(rounding.source)
        if len(shape_of(x)) != len(shape_of(rounding.source)):
            source = self.emit(relax.op.reshape(source, shape_of(x)))
        return source

    def _vector(self, value: Any) -> Any:
        if isinstance(value, float):
            return relax.const(np.array([value], np.float32))
        return self.emit(relax.op.reshape(self.new(value), [1]))

    def _correction(self, rounding: Rounding, w: np.ndarray, name: str) -> Any:
        """What every token's sums lack, ``[N]``; None if nothing."""
        sums = w.sum(axis=1, dtype=np.float64).astype(np.float32)
        if isinstance(rounding.zero, float) and rounding.zero == MIDDLE:
            return None
        if isinstance(rounding.scale, float) and isinstance(rounding.zero, float):
            factor = np.float32(rounding.scale * (MIDDLE - rounding.zero))
            return self.weight(name, sums * factor)
        scale, zero = (
            relax.const(value, "float32") if isinstance(value, float) else self.new(value)
            for value in (rounding.scale, rounding.zero)
        )
        shift = relax.op.subtract(relax.const(float(MIDDLE), "float32"), zero)
        factor = self.emit(relax.op.multiply(scale, shift))
        return self.emit(relax.op.multiply(self.weight(name, sums), factor))
