"""Round activations: layers in low precision read lines of words, made where it costs least.

Matches the layers and attentions on lane tiles that multiply int8 or bf16, and gives them their
activations rounded, in the lines of :mod:`sparse_tvm.schedules.cpu.low_precision`. Where nothing
reads an activation but such layers, its producer writes lines instead of float32, if its kernel
can; otherwise one :class:`LineRound` serves all readers of a precision.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from tvm import relax

from sparse_tvm.operators import Attention, Dense, LayerNorm, Operator, StepRound, Types
from sparse_tvm.passes import dialect
from sparse_tvm.passes.cpu.lane_layout import IN_LANE_TILES
from sparse_tvm.passes.graph import Rewrite, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.operators import LineRound
from sparse_tvm.schedules.cpu.precision import PRECISIONS
from sparse_tvm.schedules.cpu.simd import LANES

_WORDS = "int32"
"""Element type of lines."""

_ROUND_INT8 = LineRound(types=Types(output="int8"))


@graph_pass(requires=[IN_LANE_TILES], ensures=[IN_LANE_TILES])
def round_activations(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _RoundActivations(program).run()


def _rounded_operands(op: Operator) -> int:
    """How many of an operator's first operands are read in low precision."""
    if op.types.input not in PRECISIONS:
        return 0
    return {Dense: 1, Attention: 3}.get(type(op), 0)


class _RoundActivations(Rewrite):
    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._lines: dict[tuple[Any, str], Any] = {}
        self._readers: dict[Any, Counter[str]] = {}
        for binding in self.graph.bindings:
            found = dialect.match(binding.value, Operator)
            if found is not None:
                for arg in found.args[: _rounded_operands(found.op)]:
                    self._readers.setdefault(arg, Counter())[found.op.types.input] += 1

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value, Operator)
        if found is None:
            return None
        if isinstance(found.op, StepRound):
            lines = self._emit(_ROUND_INT8, [self.new(arg) for arg in found.args], var, "int8")
            self._lines[var, "int8"] = lines
            return lines
        count = _rounded_operands(found.op)
        args = [self._rounded(arg, found.op.types.input) for arg in found.args[:count]]
        args += [self.new(arg) for arg in found.args[count:]]
        dtype = self._only_reader(var)
        if dtype is not None and _can_round(found.op):
            op = replace(found.op, types=replace(found.op.types, output=dtype))
            lines = self._emit(op, args, var, dtype)
            self._lines[var, dtype] = lines
            return lines
        return dialect.call(found.op, args, shape_of(var)) if count else None

    def _only_reader(self, var: relax.Var) -> str | None:
        """The precision in which alone a variable is read, if there is one."""
        readers = self._readers.get(var, Counter())
        if len(readers) != 1:
            return None
        ((dtype, count),) = readers.items()
        return dtype if self.graph.uses(var) == count else None

    def _rounded(self, expr: Any, dtype: str) -> Any:
        """The lines of an activation, made once."""
        if (expr, dtype) not in self._lines:
            op = LineRound(types=Types(output=dtype))
            self._lines[expr, dtype] = self._emit(op, [self.new(expr)], expr, dtype)
        return self._lines[expr, dtype]

    def _emit(self, op: Operator, args: list[Any], like: Any, dtype: str) -> Any:
        lead, tiles, features, _ = shape_of(like)
        shape = (lead, tiles, PRECISIONS[dtype].lines(features), LANES)
        return self.emit(dialect.call(op, args, shape, _WORDS), op.name)


def _can_round(op: Operator) -> bool:
    """Whether the operator's kernel can write lines."""
    return isinstance(op, LayerNorm) or _rounded_operands(op) > 0
