"""What multiplies each feature that a dense layer makes is folded into its weight and bias.

Matches ``multiply(layer, s)``, in either operand order, where the layer is ``matmul(x,
permute_dims(w))``, perhaps with a bias added, and ``s`` has a known number for each feature, as the
layer scale of ConvNeXt (arXiv:2103.17239) has. It becomes a layer of ``w * s`` and ``b * s``: zeros
stay zeros, and a residual behind it is the layer's own. Leaves alone: weights, biases and results
that something else reads too, and numbers that an input brings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.passes.fc_transpose import WEIGHTS_TRANSPOSED
from sparse_tvm.passes.graph import Rewrite, is_tensor, op_name, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program


@graph_pass(requires=[WEIGHTS_TRANSPOSED])
def fold_scales(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FoldScales(program).run()


class _FoldScales(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) != "relax.multiply" or not all(map(is_tensor, value.args)):
            return None
        for layer, scale in (tuple(value.args), tuple(value.args)[::-1]):
            numbers = self._per_feature(scale, layer)
            if numbers is not None and self.graph.used_once(layer):
                return self._folded(layer, numbers)
        return None

    def _per_feature(self, expr: Any, layer: Any) -> np.ndarray | None:
        """A known number for each feature of a layer."""
        if not shape_of(layer) or shape_of(expr) != shape_of(layer)[-1:]:
            return None
        numbers = self.array(expr)
        return numbers if numbers is not None and numbers.dtype == np.float32 else None

    def _folded(self, layer: Any, scale: np.ndarray) -> Any:
        """The layer with its weight and bias multiplied; None if it is no such layer."""
        added, bias = self.graph.op(layer, "add"), None
        if added is not None:
            for product, other in (tuple(added.args), tuple(added.args)[::-1]):
                bias = self._per_feature(other, layer)
                if bias is not None and self.graph.used_once(product):
                    layer = product
                    break
            else:
                return None
        matmul = self.graph.op(layer, "matmul")
        turned = self.graph.op(matmul.args[1], "permute_dims") if matmul is not None else None
        if matmul is None or turned is None or not self.graph.used_once(matmul.args[1]):
            return None
        w = self.graph.value(turned.args[0])
        array = self.array(w)
        if array is None or not isinstance(w, relax.Var) or not self.graph.used_once(w):
            return None
        if array.dtype != np.float32 or array.ndim != 2 or w.name not in self.program.layers:
            return None
        scaled = self.weight(f"{w.name}_scaled", array * scale[:, None])
        self.program.layers[scaled.name] = self.program.layers[w.name]
        transposed = self.emit(relax.op.permute_dims(scaled))
        product = relax.op.matmul(self.new(matmul.args[0]), transposed)
        if bias is None:
            return product
        b = self.weight(f"{w.name}_bias_scaled", bias * scale)
        return relax.op.add(self.emit(product), b)
