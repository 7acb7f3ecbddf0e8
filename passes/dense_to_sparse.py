"""DenseToSparse: dense layers whose weight pays in a sparse form become sparse layers.

Matches every ``sparse_tvm.dense`` and gives its weight the form that ``convert_weights`` chose:
``sparse_tvm.sparse_dense`` with ``data``, ``indices``, ``indptr``, ``rows`` and ``partition`` in
place of the weight, or ``sparse_tvm.dense`` with the weight in register blocks. Both record in
the layer's report what was chosen and why. The dense weight then has no reader left and leaves
the program.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.passes import dialect
from sparse_tvm.passes.convert_weights import Choice, FormatOptions, choose, split_arrays
from sparse_tvm.passes.graph import Rewrite, shape_of
from sparse_tvm.passes.program import LayerReport, Program
from sparse_tvm.sparsity.analysis import Structure, analyse
from sparse_tvm.targets import Target


def dense_to_sparse(program: Program, options: FormatOptions, target: Target) -> Program:
    """Apply the pass."""
    return _DenseToSparse(program, options, target).run()


class _DenseToSparse(Rewrite):
    def __init__(self, program: Program, options: FormatOptions, target: Target) -> None:
        super().__init__(program)
        self._options = options
        self._target = target
        self._chosen: dict[str, tuple[Choice, list[relax.Var]]] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value, "dense")
        if found is None:
            return None
        x, w, *extras = found.args
        attributes = found.attributes
        choice, stored = self._stored(w, attributes)
        n, k = shape_of(w)
        return dialect.call(
            "sparse_dense" if choice.layout.sparse else "dense",
            [self.new(x), *stored, *(self.new(extra) for extra in extras)],
            shape_of(var),
            **attributes,
            format=choice.layout.format,
            block=list(choice.layout.block),
            parts=choice.layout.parts,
            weight=[n, k],
        )

    def _stored(self, w: relax.Var, attributes: dict[str, Any]) -> tuple[Choice, list[relax.Var]]:
        """The stored form of a weight, made once however many layers share it."""
        if w.name not in self._chosen:
            array = self.program.weights[w.name]
            structure = analyse(array)
            choice = choose(attributes["layer"], array, structure, self._options, self._target)
            arrays = split_arrays(array, choice.layout)
            params = [self.weight(f"{w.name}.{key}", value) for key, value in arrays.items()]
            self._chosen[w.name] = choice, params
            self._report(attributes, array, structure, choice, arrays)
        return self._chosen[w.name]

    def _report(
        self,
        attributes: dict[str, Any],
        w: np.ndarray,
        structure: Structure,
        choice: Choice,
        arrays: dict[str, np.ndarray],
    ) -> None:
        layer, (rows, columns) = attributes["layer"], choice.layout.block
        reason = choice.reason
        if choice.asked_block not in (None, choice.layout.block) and choice.layout.sparse:
            asked_rows, asked_columns = choice.asked_block or (rows, columns)
            reason += f"; {asked_rows}x{asked_columns} stored as {rows}x{columns}"
        if layer in self.program.reports:
            layer = f"{layer} ({len(self.program.reports)})"
        self.program.reports[layer] = LayerReport(
            name=layer,
            op="dense",
            shape=(w.shape[0], w.shape[1]),
            sparsity=structure.sparsity,
            nnz=structure.nnz,
            structure=structure.label,
            format=choice.layout.format,
            block=choice.layout.block if choice.layout.format == "bsr" else None,
            kernel=f"{choice.layout.format} {rows}x{columns}",
            epilogue=tuple(attributes["epilogue"]),
            reason=reason,
            bytes=sum(a.nbytes for a in arrays.values()),
        )
