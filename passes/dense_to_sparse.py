"""DenseToSparse: every layer's weight gets the form that serves it best.

Matches every operator with a weight of its own (``sparse_tvm.dense``, ``sparse_tvm.convolution``)
whose layout is not chosen yet, and stores the weight in the layout that
:func:`~sparse_tvm.passes.formats.choose` picks from what the kernel families offer: the family's
arrays take the weight's place among the operands. The layer's report says what was chosen and
why. A weight that several layers read is stored once; each of them has its own report. The
model's own array then has no reader left and leaves the program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import nlargest
from typing import Any

from tvm import relax

from sparse_tvm.families import TYPICAL_TOKENS
from sparse_tvm.operators import Convolution, Dense, Recurrent, WeightedOperator
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Rewrite, product, same, shape_of
from sparse_tvm.passes.infrastructure import Context, Property, graph_pass
from sparse_tvm.passes.layout_choice import Choice, choose
from sparse_tvm.passes.program import LayerReport, Program
from sparse_tvm.passes.typical_sizes import TypicalSizes
from sparse_tvm.sparsity.analysis import MIN_SPARSITY
from sparse_tvm.sparsity.statistics import MeasuredWeight

PICTURES = 8
"""Weights whose reports show where the zeros are."""


def _without_layout(program: Program) -> Iterable[str]:
    found = dialect.calls(program, WeightedOperator)
    return dialect.described(one for one in found if one.op.layout is None)


WEIGHTS_STORED = Property("every layer's weight has a layout", _without_layout)


@graph_pass(ensures=[WEIGHTS_STORED])
def dense_to_sparse(program: Program, context: Context) -> Program:
    """Apply the pass."""
    rewrite = _DenseToSparse(program, context)
    rewritten = rewrite.run()
    rewrite.picture_the_largest()
    return rewritten


def weights_of(program: Program) -> int:
    """How many values all layers' weights have: so many are read before one is read again."""
    return sum(product(call.op.matrix) for call in dialect.calls(program, WeightedOperator))


def typical_tokens(op: WeightedOperator, output: Sequence[Any]) -> Sequence[int]:
    """How many tokens the layer sees at a time, or pixels: their number, or typical ones.

    A recurrent layer sees one of each sequence. Of images or sequences whose number is not known
    there is one.
    """
    if isinstance(op, Dense):
        count = product(output[:-1])
        return (count,) if isinstance(count, int) else TYPICAL_TOKENS
    if isinstance(op, Recurrent):
        return (output[1] if isinstance(output[1], int) else 1,)
    batch, _, *size = output
    pixels = product(size)
    if not isinstance(pixels, int):
        return TYPICAL_TOKENS[:1]
    return (pixels * batch if isinstance(batch, int) else pixels,)


@dataclass
class _Stored:
    """A weight in its chosen form, and the layers that read it so far."""

    choice: Choice
    weight: MeasuredWeight
    params: list[relax.Var]
    nbytes: int
    layers: list[str] = field(default_factory=list)


class _DenseToSparse(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self._everything = weights_of(program)
        self._stored: dict[tuple[Any, WeightedOperator], _Stored] = {}
        self._sizes = TypicalSizes(self.graph.function.params[: program.num_input])

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = dialect.match(value, WeightedOperator)
        if found is None or found.op.layout is not None:
            return None
        x, w, *extras = found.args
        usual = self._sizes.of(shape_of(x)[2:]) if isinstance(found.op, Convolution) else ()
        stored = self._store(w, found.op, typical_tokens(found.op, shape_of(var)), usual)
        op = replace(found.op, layout=stored.choice.layout)
        op = replace(op, layer=self._report(op, stored))
        args = [self.new(x), *stored.params, *(self.new(extra) for extra in extras)]
        return dialect.call(op, args, shape_of(var))

    def _store(
        self,
        w: relax.Var,
        op: WeightedOperator,
        tokens: Sequence[int],
        usual: tuple[int | None, ...],
    ) -> _Stored:
        """The stored form of a weight, made once for all layers of one kind that share it."""
        key = self.graph.value(w), replace(op, epilogue=())
        if key not in self._stored:
            if isinstance(op, Convolution) and len(usual) == len(op.size):
                op = replace(op, usual=usual)
            self._stored[key] = self._pack(w, op, tokens)
        return self._stored[key]

    def _pack(self, w: relax.Var, op: WeightedOperator, tokens: Sequence[int]) -> _Stored:
        array = self.array(w)
        assert array is not None, f"{op.layer}: its weight is no constant"
        backend, target = self._context.backend, self._context.target
        matrix = array.reshape(op.matrix)
        weight = MeasuredWeight(matrix, self._everything / matrix.size)
        options, evidence = self._context.options, self._context.evidence
        choice = choose(op, weight, options, backend, target, tokens, evidence)
        family = backend.weighted_family(choice.layout)
        arrays = family.pack(op, matrix, choice.layout, target)
        if (second := family.second_form(choice.layout, arrays)) is not None:
            choice = replace(choice, reason=f"{choice.reason}; {second}")
        source = self.graph.value(w)
        name = source.name if isinstance(source, relax.Var) else op.layer
        forms = sum(same(known, source) for known, _ in self._stored)
        name += f".{forms}" if forms else ""
        params = [self.weight(f"{name}.{key}", value) for key, value in arrays.items()]
        return _Stored(choice, weight, params, sum(value.nbytes for value in arrays.values()))

    def picture_the_largest(self) -> None:
        """Add to the reports where the zeros of the largest sparse weights are."""
        sparse = [
            stored for stored in self._stored.values() if stored.weight.sparsity >= MIN_SPARSITY
        ]
        for stored in nlargest(PICTURES, sparse, key=lambda stored: product(stored.weight.shape)):
            rows = tuple(bytes(row).hex() for row in stored.weight.density)
            self.program.reports[stored.layers[0]].density = rows

    def _report(self, op: WeightedOperator, stored: _Stored) -> str:
        """Report on a layer, and return the name it has there: another for each use of a weight."""
        reports = self.program.reports
        layer = op.layer if op.layer not in reports else f"{op.layer} ({len(reports)})"
        choice, structure, layout = stored.choice, stored.weight.structure, stored.choice.layout
        reason, nbytes = choice.reason, stored.nbytes
        if stored.layers:
            reason, nbytes = f"{reason}; shares the weight of {stored.layers[0]}", 0
        stored.layers.append(layer)
        reports[layer] = LayerReport(
            name=layer,
            op=op.name,
            shape=op.matrix,
            sparsity=structure.sparsity,
            nnz=structure.nnz,
            structure=structure.label,
            format=layout.format,
            block=layout.block if layout.block != (1, 1) and layout.sparse else None,
            kernel="",
            epilogue=tuple(map(str, op.epilogue)),
            reason=reason,
            bytes=nbytes,
            precision=op.types.weight,
            basis=choice.basis,
            times=choice.times,
        )
        return layer
