"""Batch matmul: products of two activations become our kernel, transposes in front included.

Matches every ``relax.matmul`` that no layer and no attention took, of float32 operands with two
dimensions or more, and sees through ``permute_dims``: the kernel reads an operand in any order of
its axes. Leaves alone: vectors, and a few rows times a transposed matrix, which are dot products.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, dtype_of, is_tensor, op_name, shape_of
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.batch_matmul import Operand, worthwhile


def batch_matmul(program: Program) -> Program:
    """Apply the pass."""
    return _BatchMatmul(program).run()


class _BatchMatmul(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) != "relax.matmul" or dtype_of(var) != "float32":
            return None
        if not all(is_tensor(arg) and len(shape_of(arg)) > 1 for arg in (*value.args, var)):
            return None
        (a, a_axes), (b, b_axes) = map(self._stored, value.args)
        if not worthwhile(Operand(shape_of(a), a_axes), Operand(shape_of(b), b_axes)):
            return None
        return dialect.call(
            "matmul",
            [self.new(a), self.new(b)],
            shape_of(var),
            axes=[a_axes, b_axes],
            right=[dim if isinstance(dim, int) else None for dim in shape_of(b)],
        )

    def _stored(self, expr: Any) -> tuple[Any, list[int]]:
        """What an operand is a transpose of, and the stored axis of each of its axes."""
        axes = list(range(len(shape_of(expr))))
        while (call := self.graph.op(expr, "permute_dims")) is not None:
            turned = call.attrs.axes
            turned = axes[::-1] if turned is None else [int(axis) for axis in turned]
            axes = [turned[axis] for axis in axes]
            expr = call.args[0]
        return expr, axes
