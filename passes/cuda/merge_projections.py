"""Merge projections: the layers that make q, k and v of one input become one layer.

Matches ``sparse_tvm.attention`` whose q, k and v come from three layers, read by nothing else, of
the same input, with weights in one layout and no more than a bias behind them. Their stored weights
are put one below the other, and attention reads its parts out of the one output: three kernels that
each fill little of a device become one. Layers keep their own reports.

Leaves alone families that cannot put packed weights together, biases of run time, outputs that are
not a multiple of 64, and layers of which one has a bias and another has none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.operators import Attention, Bias, Dense
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program

_ROWS = 64
"""Outputs of each layer come in so many, which families pack at most together."""


@graph_pass()
def merge_projections(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _MergeProjections(program, context).run()


class _MergeProjections(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value, Attention)
        if found is None or any(found.op.starts):
            return None
        layers = [dialect.match(self.graph.value(arg), Dense) for arg in found.args[:3]]
        merged = self._merged([layer for layer in layers if layer is not None], found.args[:3])
        if merged is None:
            return None
        q, k, _ = (layer.op.matrix[0] for layer in layers if layer is not None)
        op = replace(found.op, starts=(0, q, q + k))
        args = [merged] * 3 + [self.new(mask) for mask in found.args[3:]]
        return dialect.call(op, args, shape_of(var))

    def _merged(self, layers: list[dialect.OperatorCall[Dense]], outputs: Any) -> Any:
        """One layer in place of three; None where they do not fit."""
        if len(layers) < 3 or len({self.graph.value(layer.args[0]) for layer in layers}) > 1:
            return None
        if not all(map(self.graph.used_once, outputs)):
            return None
        first = layers[0].op
        alike = {
            (layer.op.stored, layer.op.matrix[1], layer.op.types, layer.op.epilogue)
            for layer in layers
        }
        whole = all(layer.op.matrix[0] % _ROWS == 0 for layer in layers)
        if len(alike) > 1 or not whole or any(not isinstance(s, Bias) for s in first.epilogue):
            return None
        count = len(layers[0].args) - 1 - len(first.epilogue)
        arrays = [
            [array for arg in layer.args[1:] if (array := self.array(arg)) is not None]
            for layer in layers
        ]
        if any(len(each) < len(layer.args) - 1 for each, layer in zip(arrays, layers, strict=True)):
            return None  # a bias that only run time brings
        family = self._context.backend.weighted_family(first.stored)
        weights = family.stacked([each[:count] for each in arrays], first.stored)
        if weights is None:
            return None
        names = tuple(layer.op.layer for layer in layers)
        name = " + ".join(names)
        self.program.merged[name] = names
        biases = [
            np.concatenate([each[count + i] for each in arrays])
            for i in range(len(arrays[0]) - count)
        ]
        params = [self.weight(f"{name}.{i}", array) for i, array in enumerate([*weights, *biases])]
        rows = sum(layer.op.matrix[0] for layer in layers)
        op = replace(first, layer=name, matrix=(rows, first.matrix[1]))
        shape = [*shape_of(outputs[0])[:-1], rows]
        return self.emit(dialect.call(op, [self.new(layers[0].args[0]), *params], shape))
