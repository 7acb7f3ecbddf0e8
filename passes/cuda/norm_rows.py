"""Norm rows: layer norms over the last axis become an operator of ours.

Matches ``relax.nn.layer_norm`` with gamma and beta over rows that a warp can hold and read eight
elements at a time. Others are left to TVM.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from sparse_tvm.operators import LayerNorm
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, dtype_of, is_tensor, op_name, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cuda.families.row_norm import LARGEST_WIDTH


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
        op = LayerNorm(epsilon=float(value.attrs.epsilon))
        return dialect.call(op, [self.new(arg) for arg in value.args], shape)
