"""fc-transpose: one spelling for every dense layer.

Matches a matmul with a weight on its right (``x W``, ``x W^T`` through ``permute_dims``) or left
(``W x``), and turns it into ``matmul(x, permute_dims(w))`` with ``w`` stored ``[out, in]``, as
TVM's linear layers and all sparse formats here have it. Transposing a weight costs nothing at
run time: the stored array is turned instead. A weight also read by something else (an embedding
tied to the head) keeps its own copy for that.

Relay's ``simplify_fc_transpose`` did the same for ``nn.dense``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.passes.graph import Graph, Rewrite, is_tensor, op_name, shape_of
from sparse_tvm.passes.infrastructure import Context, Property, graph_pass
from sparse_tvm.passes.program import Program


def _untransposed(program: Program) -> Iterable[str]:
    for binding in Graph(program.module["main"]).bindings:
        if op_name(binding.value) != "relax.matmul":
            continue
        for operand in binding.value.args:
            array = program.weights.get(getattr(operand, "name", ""))
            if array is not None and array.ndim == 2 and array.dtype == np.float32:
                yield f"{binding.var.name} reads {operand.name} as it is"


WEIGHTS_TRANSPOSED = Property(
    "every matmul reads a weight [out, in] through permute_dims", _untransposed
)


@graph_pass(ensures=[WEIGHTS_TRANSPOSED])
def fc_transpose(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FcTranspose(program).run()


class _FcTranspose(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) != "relax.matmul":
            return None
        x, w = value.args
        right = self._canonical(w, transpose=True)
        if right is not None:
            return relax.op.matmul(self.new(x), right)
        left = self._canonical(x, transpose=False)
        if left is not None and is_tensor(w) and (rank := len(shape_of(w))) >= 2:
            flip = [*range(rank - 2), rank - 1, rank - 2]
            flipped = self.emit(relax.op.permute_dims(self.new(w), flip))
            return relax.op.permute_dims(self.emit(relax.op.matmul(flipped, left)), flip)
        return None

    def _canonical(self, expr: Any, transpose: bool) -> Any:
        """``permute_dims`` of the weight stored ``[out, in]``, or None if this is no weight."""
        found = self._weight(expr)
        if found is None:
            return None
        name, array, turned = found
        turned ^= transpose
        # One weight may be used both ways.
        fresh = f"{name}_fc" if turned else f"{name}_fc_as_is"
        weight = self.weight(fresh, array.T if turned else array)
        self.program.layers[weight.name] = self.program.layers.get(name, name)
        return self.emit(relax.op.permute_dims(weight))

    def _weight(self, expr: Any) -> tuple[str, np.ndarray, bool] | None:
        """Name and values of a 2-D weight, and whether it is read through a transpose."""
        turned = False
        while (call := self.graph.op(expr, "permute_dims")) is not None:
            axes = call.attrs.axes
            if axes is not None and [int(a) for a in axes] == [0, 1]:
                pass
            elif len(shape_of(call.args[0])) == 2:
                turned = not turned
            else:
                return None
            expr = call.args[0]
        param = self.graph.value(expr)
        array = self.array(param)
        if array is None or array.ndim != 2 or array.dtype != np.float32:
            return None
        is_param = isinstance(param, relax.Var)
        name = param.name if is_param else f"constant_{len(self.program.weights)}"
        return str(name), array, turned
