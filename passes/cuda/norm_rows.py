"""Norm rows: layer norms over the last axis become an operator of ours.

Matches ``relax.nn.layer_norm`` with gamma and beta over rows that a warp can hold and read eight
elements at a time. Others are left to TVM. A residual that a layer would add to nothing but the
norm's input is the norm's to add: the layer writes 16 bits, and only the norm reads float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax

from sparse_tvm.operators import Dense, LayerNorm, Residual
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, dtype_of, is_tensor, op_name, same_shape, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cuda.families.row_norm import LARGEST_WIDTH
from sparse_tvm.schedules.cuda.storage import LARGEST


@graph_pass()
def norm_rows(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _NormRows(program).run()


class _NormRows(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) != "relax.nn.layer_norm" or not is_tensor(var):
            return None
        shape, axes = shape_of(var), [int(axis) % len(shape_of(var)) for axis in value.attrs.axes]
        width = shape[-1]
        whole = axes == [len(shape) - 1] and isinstance(width, int)
        if not whole or width % 8 or width > LARGEST_WIDTH or dtype_of(var) != "float32":
            return None
        x, gamma, beta = value.args
        op = LayerNorm(epsilon=float(value.attrs.epsilon))
        operands = [self.new(gamma), self.new(beta)]
        found = self._sum(x)
        if found is None:
            return dialect.call(op, [self.new(x), *operands], shape)
        layer, residual = found
        op = replace(op, residual=True)
        return dialect.call(op, [self.emit(layer), *operands, self.new(residual)], shape)

    def _sum(self, x: Any) -> tuple[Any, Any] | None:
        """The layer and the residual that ``x`` is the sum of, if nothing else reads it."""
        dense = dialect.match(self.graph.value(x), Dense)
        if dense is None or not self.graph.used_once(x) or dense.op.types.input not in LARGEST:
            return None
        *steps, last = dense.op.epilogue or (None,)
        *args, residual = dense.args
        if not isinstance(last, Residual) or not same_shape(shape_of(residual), shape_of(x)):
            return None
        op = replace(dense.op, epilogue=tuple(steps))
        return dialect.call(op, [self.new(arg) for arg in args], shape_of(x)), residual
