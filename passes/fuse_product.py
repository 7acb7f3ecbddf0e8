"""Products of two activations become one operator, transposes in front included.

Matches every ``relax.matmul`` that no layer and no attention took, of float32 operands with two
dimensions or more, and sees through ``permute_dims``: an operand may be stored with its axes in
any order. Leaves alone: vectors, and what no kernel family accepts.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from sparse_tvm.operators import Product
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, dtype_of, is_tensor, op_name, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program


@graph_pass()
def fuse_product(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FuseProduct(program, context).run()


class _FuseProduct(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) != "relax.matmul" or dtype_of(var) != "float32":
            return None
        if not all(is_tensor(arg) and len(shape_of(arg)) > 1 for arg in (*value.args, var)):
            return None
        (a, a_axes), (b, b_axes) = map(self._stored, value.args)
        rows = shape_of(var)[-2]
        op = Product(left=a_axes, right=b_axes, rows=rows if isinstance(rows, int) else None)
        if self._context.backend.refuses(op, self._context.target) is not None:
            return None
        return dialect.call(op, [self.new(a), self.new(b)], shape_of(var))

    def _stored(self, expr: Any) -> tuple[Any, tuple[int, ...]]:
        """What an operand is a transpose of, and the stored axis of each of its axes."""
        axes = list(range(len(shape_of(expr))))
        while (call := self.graph.op(expr, "permute_dims")) is not None:
            turned = call.attrs.axes
            turned = axes[::-1] if turned is None else [int(axis) for axis in turned]
            axes = [turned[axis] for axis in axes]
            expr = call.args[0]
        return expr, tuple(axes)
