"""Set precision: which layers compute in fewer bits than float32, as the user wishes.

Matches every dense or recurrent layer in float32 whose weight is still the model's own, and gives
it the element types of the precision that the options name for it; its operands stay float32, and
the backend rounds them (per token) on the way in, as weights are (per output) when they are stored.
Where the target has no arithmetic in it, as none has for recurrent layers, but kernels that widen
such a weight, only the weight is of that type, if its values are within its range. Attention takes
bf16 wherever arithmetic in less than float32 is wished for and the backend has it. What no kernel
family of the target takes stays float32, with a note.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.errors import OptionError
from sparse_tvm.operators import FLOAT32, PRECISIONS, Attention, Dense, Recurrent, WeightedOperator
from sparse_tvm.passes import dialect
from sparse_tvm.passes.dense_to_sparse import typical_tokens
from sparse_tvm.passes.graph import Rewrite, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.layout_choice import choose
from sparse_tvm.passes.program import Program
from sparse_tvm.sparsity.statistics import MeasuredWeight


def check_precisions(context: Context) -> None:
    """Refuse a precision that the target has no kernels for.

    Raises
    ------
    OptionError
        It says which ones there are.
    """
    target, options = context.target, context.options
    refusals = {name: _refusal(context, name) for name in PRECISIONS}
    able = ", ".join(name for name, refusal in refusals.items() if refusal is None)
    for name in options.precisions:
        if refusals[name] is not None:
            raise OptionError(
                f"target {target.name} has no kernels for {name}: {refusals[name]}",
                hint=f"--precision {able.replace(', ', ' or ')}, or another --target",
            )


def has_kernels(context: Context, precision: str) -> bool:
    """Whether the target computes layers in a precision."""
    return _refusal(context, precision) is None


def _refusal(context: Context, precision: str) -> str | None:
    return _layer(context, precision)[1]


def _layer(context: Context, precision: str) -> tuple[Dense, str | None]:
    layer = Dense(layer="", matrix=(64, 64))
    return context.backend.in_precision(layer, precision, context.target)


def attention_form(
    op: Attention, sizes: tuple[int, int], context: Context
) -> tuple[Attention | None, str]:
    """The operator in a precision that there are kernels for, the wished one if possible.

    None if there is no such precision; the text says what refused those before the one found.
    """
    wished = context.options.precision
    low = dict.fromkeys((wished, "bf16")) if computes_in(context, wished) else ()
    refusals: list[str] = []
    for form in (*(replace(op, types=PRECISIONS[name], sizes=sizes) for name in low), op):
        refusal = context.backend.refuses(form, context.target)
        if refusal is None:
            return form, "; ".join(dict.fromkeys(refusals))
        refusals.append(refusal)
    return None, "; ".join(dict.fromkeys(refusals))


def computes_in(context: Context, precision: str) -> bool:
    """Whether the target's arithmetic is that of a precision below float32."""
    return _layer(context, precision)[0].types.input != "float32"


def in_range(weight: np.ndarray, dtype: str) -> bool:
    """Whether a type of 16 bits has numbers as large as those of a float32 weight."""
    if dtype != "float16":  # others have float32's range
        return True
    return bool(np.abs(weight).max(initial=0) <= np.finfo(dtype).max)


@graph_pass()
def set_precision(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _SetPrecision(program, context).run()


class _SetPrecision(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self._stored: Counter[str] = Counter()

    def run(self) -> Program:
        """Rewrite the program."""
        program = super().run()
        for dtype, layers in self._stored.items():
            some = "1 layer stores" if layers == 1 else f"{layers} layers store"
            program.notes.append(f"{some} weights in {dtype}, for kernels that compute in float32")
        return program

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        layer = dialect.match(value, WeightedOperator)
        if layer is not None and isinstance(layer.op, Dense | Recurrent):
            # A layer with other types multiplies the model's own integers.
            if layer.op.layout is None and layer.op.types == FLOAT32:
                return self._layer(layer, var)
            return None
        attention = dialect.match(value, Attention)
        if attention is not None and computes_in(self._context, self._context.options.precision):
            return self._attention(attention, var)
        return None

    def _layer(self, found: dialect.OperatorCall[WeightedOperator], var: relax.Var) -> Any:
        wished = self._context.options.precision_for(found.op.layer)
        if wished == "fp32":
            return None
        op, refusal = self._context.backend.in_precision(found.op, wished, self._context.target)
        if refusal is None and op.types.input == "float32":
            refusal = self._out_of_range(found.args[1], op.types.weight)
        if refusal is None and isinstance(op, Recurrent):
            refusal = self._slower(found, op, var)
        if refusal is not None:
            self.program.notes.append(f"{op.layer} stays float32: {refusal}")
            return None
        if op.types.input == "float32":
            self._stored[op.types.weight] += 1
        return dialect.call(op, [self.new(arg) for arg in found.args], shape_of(var))

    def _out_of_range(self, weight: Any, dtype: str) -> str | None:
        """What keeps a weight from being stored in a type."""
        array = self.array(weight)
        if array is None or in_range(array, dtype):
            return None
        return f"its largest weight, {np.abs(array).max():g}, is no {dtype}"

    def _slower(
        self, found: dialect.OperatorCall[Any], narrow: Recurrent, var: relax.Var
    ) -> str | None:
        """What keeps a weight that each step reads from being narrow: steps that take longer."""
        array = self.array(found.args[1])
        assert array is not None, f"{narrow.layer}: its weight is no constant"
        weight = MeasuredWeight(array.reshape(narrow.matrix))
        tokens = typical_tokens(narrow, shape_of(var))

        def seconds(op: Recurrent) -> float:
            known = self._context
            return choose(op, weight, known.options, known.backend, known.target, tokens).seconds

        if seconds(narrow) <= seconds(found.op):
            return None
        return f"its steps would take longer with weights in {narrow.types.weight}"

    def _attention(self, found: dialect.OperatorCall[Attention], var: relax.Var) -> Any:
        q, _, v, *_ = found.args
        heads = found.op.heads
        sizes = tuple(shape_of(x)[-1] // heads for x in (q, v))
        op, refusal = attention_form(found.op, sizes, self._context)
        if op is None or op.types == FLOAT32:
            self.program.notes.append(f"attention stays float32: {refusal}")
            return None
        return dialect.call(op, [self.new(arg) for arg in found.args], shape_of(var))
