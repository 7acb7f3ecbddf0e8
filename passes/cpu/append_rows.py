"""Append rows: what is new goes behind a cache by copies of whole rows.

Matches ``concat`` of float32 tensors of which one is an input of the model, along any axis but the
last, as decoders do with past keys and values: nothing could be fused into such a copy, and a loop
over its elements, which asks for each where it comes from, takes twice as long. Leaves alone
tensors whose rows behind that axis are no whole vectors.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, dtype_of, is_tensor, op_name, product, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.operators import AppendRows
from sparse_tvm.schedules.cpu.simd import LANES


@graph_pass()
def append_rows(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _AppendRows(program).run()


class _AppendRows(Rewrite):
    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if op_name(value) != "relax.concat" or not is_tensor(var) or dtype_of(var) != "float32":
            return None
        parts, shape = list(value.args[0].fields), shape_of(var)
        axis = int(value.attrs.axis) % len(shape)
        inputs = self.graph.function.params[: self.program.num_input]
        size = product(shape[axis + 1 :])
        if axis == len(shape) - 1 or not isinstance(size, int) or size % LANES:
            return None
        if not any(part.same_as(input_) for part in parts for input_ in inputs):
            return None
        lead = product(shape[:axis])
        args = [
            self.emit(relax.op.reshape(self.new(part), (lead, shape_of(part)[axis], size)))
            for part in parts
        ]
        joined = self.emit(dialect.call(AppendRows(), args, (lead, shape[axis], size)), "appended")
        return relax.op.reshape(joined, shape)
