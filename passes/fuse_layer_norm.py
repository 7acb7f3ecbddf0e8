"""Recognise layer and RMS normalisation that an exporter spelled out.

Matches ``(x - mean(x)) / sqrt(mean((x - mean(x))**2) + epsilon) * gamma + beta`` over the last
axis, in the spellings of the torch exporters (``power`` or ``multiply``, divide by the root or
multiply by its inverse, operands in either order), and turns it into ``relax.nn.layer_norm``:
one kernel instead of eight passes over the activation. ``x / sqrt(mean(x**2) + epsilon) * gamma``,
as decoders have, becomes ``relax.nn.rms_norm``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax

from sparse_tvm.passes.graph import Rewrite, op_name, same, same_shape, scalar_value, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program


@graph_pass()
def fuse_layer_norm(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FuseLayerNorm(program).run()


class _FuseLayerNorm(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) == "relax.multiply":
            return self._root_mean_square(value)
        if op_name(value) != "relax.add":
            return None
        for scaled, beta in self.graph.operands(value, self._is_vector):
            product = self.graph.op(scaled, "multiply")
            if product is None:
                continue
            for normalised, gamma in self.graph.operands(product, self._is_vector):
                found = self._normalised(normalised, self._centred)
                if found is None:
                    continue
                x, epsilon = found
                if all(same_shape(shape_of(x)[-1:], shape_of(e)) for e in (gamma, beta)):
                    return relax.op.nn.layer_norm(
                        self.new(x), self.new(gamma), self.new(beta), axes=[-1], epsilon=epsilon
                    )
        return None

    def _root_mean_square(self, value: Any) -> Any:
        for normalised, gamma in self.graph.operands(value, self._is_vector):
            found = self._normalised(normalised, lambda x: x)
            if found is None:
                continue
            x, epsilon = found
            if same_shape(shape_of(x)[-1:], shape_of(gamma)):
                new = self.new(x), self.new(gamma)
                return relax.op.nn.rms_norm(*new, axes=[-1], epsilon=epsilon)
        return None

    def _is_vector(self, expr: Any) -> bool:
        return self.array(expr) is not None and len(shape_of(expr)) == 1

    def _normalised(self, expr: Any, source: Callable[[Any], Any]) -> tuple[Any, float] | None:
        """``x`` and epsilon of ``y / sqrt(mean(y**2) + epsilon)``, ``x`` being the source of y."""
        if (quotient := self.graph.op(expr, "divide")) is not None:
            pairs = [(quotient.args[0], self._under_root(quotient.args[1]))]
        elif (product := self.graph.op(expr, "multiply")) is not None:
            a, b = product.args
            pairs = [(a, self._under_inverse_root(b)), (b, self._under_inverse_root(a))]
        else:
            return None
        for y, total in pairs:
            x = source(y) if total is not None else None
            epsilon = self._epsilon(total, x, source) if x is not None else None
            if epsilon is not None:
                return x, epsilon
        return None

    def _under_root(self, expr: Any) -> Any:
        """``a`` of ``sqrt(a)``, also as a power of one half."""
        call = self.graph.op(expr, "sqrt", "power")
        if call is None or (op_name(call) == "relax.power" and scalar_value(call.args[1]) != 0.5):
            return None
        return call.args[0]

    def _under_inverse_root(self, expr: Any) -> Any:
        """``a`` of ``rsqrt(a)`` or ``1 / sqrt(a)``."""
        call = self.graph.op(expr, "rsqrt", "divide")
        if call is None or op_name(call) == "relax.rsqrt":
            return call.args[0] if call is not None else None
        return self._under_root(call.args[1]) if scalar_value(call.args[0]) == 1.0 else None

    def _centred(self, expr: Any) -> Any:
        """``x`` of ``x - mean(x)``."""
        difference = self.graph.op(expr, "subtract")
        if difference is None:
            return None
        x, mean = difference.args
        return x if same(self._is_mean(mean), x) else None

    def _is_mean(self, expr: Any) -> Any:
        """``x`` of ``mean(x)`` over the last axis, which it keeps."""
        mean = self.graph.op(expr, "mean")
        if mean is None or not mean.attrs.keepdims or mean.attrs.axis is None:
            return None
        axes = [int(axis) for axis in mean.attrs.axis]
        return mean.args[0] if axes in ([-1], [len(shape_of(mean.args[0])) - 1]) else None

    def _epsilon(self, expr: Any, x: Any, source: Callable[[Any], Any]) -> float | None:
        """Epsilon of ``mean(y**2) + epsilon``, ``x`` being the source of y."""
        total = self.graph.op(expr, "add")
        if total is None:
            return None
        for variance, epsilon in self.graph.operands(total, lambda e: scalar_value(e) is not None):
            square = self._is_mean(variance)
            root = self._root(square) if square is not None else None
            if root is not None and same(source(root), x):
                return scalar_value(epsilon)
        return None

    def _root(self, expr: Any) -> Any:
        """``y`` of ``y**2``."""
        call = self.graph.op(expr, "power", "multiply", "square")
        if call is None:
            return None
        if op_name(call) == "relax.power" and scalar_value(call.args[1]) != 2.0:
            return None
        if op_name(call) == "relax.multiply" and not same(*call.args):
            return None
        return call.args[0]
