"""Batch norms of known numbers become a product and a sum with one number for each channel.

Matches the first result of ``relax.nn.batch_norm`` at inference, with constant scale, shift, mean
and variance, and turns it into ``x * w + b``. Importers fold most batch norms into a convolution in
front; those behind a concatenation, as in DenseNet, are left. As elementwise operators they stay in
images' layout, and are fused with what is around them. Leaves alone: norms in training, those
without scale or shift, and those whose numbers an input brings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.passes.graph import Rewrite, op_name, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program


@graph_pass()
def fold_batch_norm(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FoldBatchNorm(program).run()


class _FoldBatchNorm(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if not isinstance(value, relax.TupleGetItem) or value.index != 0:
            return None
        norm = self.graph.value(value.tuple_value)
        if op_name(norm) != "relax.nn.batch_norm":
            return None
        attrs = norm.attrs
        if attrs.training or not (attrs.center and attrs.scale):
            return None
        x, *arrays = norm.args
        numbers = [array for array in map(self.array, arrays) if array is not None]
        if len(numbers) < len(arrays):
            return None
        gamma, beta, mean, variance = (array.astype(np.float64) for array in numbers)
        scale = gamma / np.sqrt(variance + attrs.epsilon)
        shift = beta - mean * scale
        rank, axis = len(shape_of(x)), int(attrs.axis)
        shape = [1] * rank
        shape[axis % rank] = len(scale)
        w, b = (
            self.weight(f"{var.name}_{name}", array.reshape(shape).astype(numbers[0].dtype))
            for name, array in (("scale", scale), ("shift", shift))
        )
        return relax.op.add(self.emit(relax.op.multiply(self.new(x), w)), b)
