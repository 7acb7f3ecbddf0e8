"""Gates: the layer that is multiplied by another tensor of its shape does so in its registers.

Matches ``multiply(a, b)`` of tensors of one shape of which one is the output of a
``sparse_tvm.dense`` that nothing else reads, as ``silu(gate) * up`` in decoders, where the family
that its weight is stored for can. This comes after precisions are chosen: kernels in low precision
have no gates. Leaves alone a square of one tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax

from sparse_tvm.operators import Dense, Gate
from sparse_tvm.passes import dialect
from sparse_tvm.passes.dense_to_sparse import WEIGHTS_STORED
from sparse_tvm.passes.graph import Rewrite, is_tensor, op_name, same, same_shape, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program


@graph_pass(requires=[WEIGHTS_STORED], ensures=[WEIGHTS_STORED])
def fuse_gates(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FuseGates(program, context).run()


class _FuseGates(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) != "relax.multiply" or not all(map(is_tensor, value.args)):
            return None
        a, b = value.args
        if same(a, b) or not same_shape(shape_of(a), shape_of(b)):
            return None
        # The later layer, which has the other at hand.
        for layer, other in ((b, a), (a, b)):
            dense = dialect.match(self.graph.value(layer), Dense)
            if dense is None or not self.graph.used_once(layer):
                continue
            op = replace(dense.op, epilogue=(*dense.op.epilogue, Gate()))
            family = self._context.backend.weighted_family(op.stored)
            if family.refuses(op, self._context.target) is None:
                args = map(self.new, (*dense.args, other))
                return dialect.call(op, list(args), shape_of(var))
        return None
