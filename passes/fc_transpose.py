"""fc-transpose: one spelling for every dense layer.

Matches a matmul with a weight on its right (``x W``, ``x W^T`` through ``permute_dims``) or left
(``W x``), and turns it into ``matmul(x, permute_dims(w))`` with ``w`` stored ``[out, in]``, as
TVM's linear layers and all sparse formats here have it. Transposing a weight costs nothing at
run time: the stored array is turned instead. A weight also read by something else (an embedding
tied to the head) keeps its own copy for that.

Relay's ``simplify_fc_transpose`` did the same for ``nn.dense``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.passes.graph import Rewrite, is_tensor, op_name, shape_of
from sparse_tvm.passes.program import Program


def fc_transpose(program: Program) -> Program:
    """Apply the pass."""
    return _FcTranspose(program).run()


class _FcTranspose(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) != "relax.matmul":
            return None
        x, w = value.args
        right = self._weight(w)
        if right is not None:
            return relax.op.matmul(self.new(x), self._canonical(*right, transpose=True))
        left = self._weight(x)
        if left is not None and is_tensor(w) and len(shape_of(w)) == 2:
            flipped = self.emit(relax.op.permute_dims(self.new(w)))
            product = relax.op.matmul(flipped, self._canonical(*left, transpose=False))
            return relax.op.permute_dims(self.emit(product))
        return None

    def _weight(self, expr: Any) -> tuple[str, np.ndarray] | None:
        """Name and values of a 2-D weight, seen through transposes."""
        transposed = False
        while (call := self.graph.op(expr, "permute_dims")) is not None:
            axes = call.attrs.axes
            if axes is not None and [int(a) for a in axes] == [0, 1]:
                pass
            elif len(shape_of(call.args[0])) == 2:
                transposed = not transposed
            else:
                return None
            expr = call.args[0]
        param = self.graph.value(expr)
        array = self.array(param)
        if array is None or array.ndim != 2 or array.dtype != np.float32:
            return None
        if not isinstance(param, relax.Var):
            return f"constant_{len(self.program.weights)}", array.T if transposed else array
        return str(param.name), array.T if transposed else array

    def _canonical(self, name: str, array: np.ndarray, transpose: bool) -> Any:
        """``permute_dims`` of the weight stored ``[out, in]``."""
        stored = array.T if transpose else array
        fresh = f"{name}_fc"
        self.program.layers[fresh] = self.program.layers.get(name, name)
        return self.emit(relax.op.permute_dims(self.weight(fresh, stored)))
