"""Narrow tables: embeddings are stored in float16, where less than float32 is wished for.

Matches ``take`` of rows from a weight that nothing but such calls reads, and stores that weight as
float16; the rows become float32 when they are read. That is half of what is often a model's largest
weight, and the numbers of a float16 model as they are. Leaves alone models in float32, tables that
do something else too, small ones, those with numbers beyond float16's range, those that a rule
wants in float32, and targets whose code would call a function for each number.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.passes.graph import Rewrite, op_name
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.passes.set_precision import has_kernels

_LEAST_VALUES = 1 << 14
"""A table of fewer is not worth a conversion."""


@graph_pass()
def narrow_tables(program: Program, context: Context) -> Program:
    """Apply the pass."""
    if context.options.precision == "fp32" or not has_kernels(context, "fp16"):
        return program
    return _NarrowTables(program, context.options).run()


class _NarrowTables(Rewrite):
    def __init__(self, program: Program, options: FormatOptions) -> None:
        super().__init__(program)
        self._options = options
        self._takes = Counter(
            self.graph.value(binding.value.args[0])
            for binding in self.graph.bindings
            if _takes_rows(binding.value)
        )

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if not _takes_rows(value):
            return None
        table, rows = value.args
        name, array = self.graph.value(table), self.array(table)
        if array is None or array.dtype != np.float32 or array.size < _LEAST_VALUES:
            return None
        if not isinstance(name, relax.Var) or self.graph.uses(name) != self._takes[name]:
            return None
        layer = self.program.layers.get(name.name, name.name)
        if self._options.ruled_precision(layer) == "fp32":
            return None
        if np.abs(array).max() > np.finfo(np.float16).max:
            return None
        narrow = self.weight(f"{name.name}.float16", array.astype(np.float16))
        found = self.emit(relax.op.take(narrow, self.new(rows), 0, mode=value.attrs.mode))
        return relax.op.astype(found, "float32")


def _takes_rows(value: Any) -> bool:
    return op_name(value) == "relax.take" and value.attrs.axis == 0
