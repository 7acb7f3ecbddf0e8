"""Which form activations are stored in: 16 bits, float32, or both, or 16 bits and their remainders.

Layers and attention read float16 or bfloat16. What the model returns, masks, and what residuals
carry from layer to layer stay float32: rounded at every layer, they make most of a deep model's
error, three quarters of it in BERT-base. A layer norm whose result is both a layer's input and a
residual stores both; where the residual is another norm's to add, it stores float16 and what
rounding left in eight bits, half as many bytes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tvm import relax

from sparse_tvm.operators import Attention, Dense, LayerNorm, Operator, Residual
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Graph, op_name
from sparse_tvm.schedules.cuda.storage import HALF, LARGEST

VIEWS = {"relax.reshape", "relax.memory.view"}

REMAINDER = "uint8"
"""The form of what rounding to float16 left."""

MASK = 3
"""Where an attention's mask is among its operands."""

_RESIDUAL = 3
"""Where a norm's residual is among its operands."""


def wanted_forms(op: Operator, operands: int) -> list[str | None]:
    """The form in which an operator reads each of its operands best; None where any will do."""
    if isinstance(op, Attention):
        return [op.types.input if index < MASK else "float32" for index in range(operands)]
    if isinstance(op, LayerNorm):
        # What is still to be added to the residual is small, and may have been rounded.
        return [None if op.residual else "float32", *["float32"] * (operands - 1)]
    if isinstance(op, Dense):
        reading = [step for step in op.epilogue if step.operand]
        extras = ["float32" if isinstance(step, Residual) else None for step in reading]
        x = op.types.input if op.types.input in LARGEST else None
        return [x, *[None] * (operands - 1 - len(extras)), *extras]
    return [None] * operands


class StoredForms:
    """The forms of the variables of ``main``.

    ``storage`` is the type of 16 bits.

    Attributes
    ----------
    returned : set
        Variables that ``main`` returns, by their own names.
    """

    def __init__(self, graph: Graph, storage: str) -> None:
        self._storage = storage
        self._bound = {binding.var: binding.value for binding in graph.bindings}
        self._reads: dict[Any, set[str]] = defaultdict(set)
        self._whole: set[Any] = set()  # what others than norms read, or norms otherwise
        for value in self._bound.values():
            ours = dialect.match(value, Operator)
            if ours is not None:
                self._note(ours)
        result = graph.result
        value = self._bound.get(result, result)
        fields = value.fields if isinstance(value, relax.Tuple) else [result]
        self.returned = {self.root(field) for field in fields}

    def root(self, expr: Any) -> Any:
        """The variable that ``expr`` is another name of, a view of, or a part of."""
        while (value := self._bound.get(expr)) is not None:
            if isinstance(value, relax.Var):
                expr = value
            elif isinstance(value, relax.TupleGetItem):
                expr = value.tuple_value
            elif op_name(value) in VIEWS:
                expr = value.args[0]
            else:
                break
        return expr

    def of(self, var: Any) -> list[str]:
        """The forms that a result of float32 is stored in, the one most read first.

        The first is of 16 bits where the second one is the remainder.
        """
        reads, kept = self._reads[var], var in self.returned or "mask" in self._reads[var]
        both = "residual" in reads and "layer" in reads
        ours = dialect.match(self._bound[var], LayerNorm)
        if ours is not None and (both or (kept and "layer" in reads)):
            if kept:
                return ["float32", self._storage]
            norms_alone = self._storage == HALF and var not in self._whole
            return [self._storage, REMAINDER if norms_alone else "float32"]
        if kept or ("residual" in reads and "layer" not in reads):
            return ["float32"]
        return [self._storage]

    def _note(self, call: dialect.OperatorCall[Any]) -> None:
        forms = wanted_forms(call.op, len(call.args))
        for index, (arg, form) in enumerate(zip(call.args, forms, strict=True)):
            if isinstance(arg, relax.Var) and form is not None:
                masked = isinstance(call.op, Attention) and index == MASK
                wide = "mask" if masked else "residual"
                root = self.root(arg)
                self._reads[root].add("layer" if form in LARGEST else wide)
                added = isinstance(call.op, LayerNorm) and call.op.residual and index == _RESIDUAL
                if form not in LARGEST and not added:
                    self._whole.add(root)
