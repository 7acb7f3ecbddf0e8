"""Which precisions of a layer are worth their rounding: those predicted to make it faster.

Arithmetic in few bits takes 16 tokens at a time, so one token may take several times as long in
int8 as in float32, and so may sparse weights. A layer that only stores its weight in 16 bits is
faster where few tokens read that from memory, and no faster otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import geometric_mean

from sparse_tvm.frontends.importer.model import ImportedModel
from sparse_tvm.operators import FLOAT32, Dense
from sparse_tvm.passes.dense_to_sparse import typical_tokens, weights_of
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.layout_choice import PREDICTED_MARGIN, choose
from sparse_tvm.passes.program import Program
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.tuning.layers import layer_calls, until_layouts


def worthwhile(
    imported: ImportedModel, context: Context, ladder: Sequence[str]
) -> dict[str, list[str]]:
    """Find what each dense layer of float32 may compute in, and be the faster for it.

    Parameters
    ----------
    ladder : Sequence[str]
        Precisions, the lowest first; the last is ``fp32``.

    Returns
    -------
    dict[str, list[str]]
        By layer, those of the ladder that are faster than all after them: ``fp32`` always is one.
    """
    program = Program(imported.module, dict(imported.weights), dict(imported.layers))
    exact = replace(context, options=replace(context.options, precision=ladder[-1]))
    program = until_layouts(program, exact)
    everything = weights_of(program)
    found: dict[str, list[str]] = {}
    for op, array, output in layer_calls(program):
        if isinstance(op, Dense) and op.types == FLOAT32:
            weight = MeasuredWeight(array.reshape(op.matrix), everything / array.size)
            rungs = _faster(op, weight, typical_tokens(op, output), exact, ladder)
            found[op.layer] = [name for name in found.get(op.layer, ladder) if name in rungs]
    return found


def _faster(
    op: Dense,
    weight: MeasuredWeight,
    tokens: Sequence[int],
    context: Context,
    ladder: Sequence[str],
) -> list[str]:
    """The precisions of a ladder that make one layer faster than all after them do."""
    *lower, last = ladder
    rungs, best = [last], _seconds(op, weight, tokens, context)
    for name in reversed(lower):
        form, refusal = context.backend.in_precision(op, name, context.target)
        if refusal is None:
            seconds = _seconds(form, weight, tokens, context)
            if _pays(form, [b / s for b, s in zip(best, seconds, strict=True)]):
                rungs.insert(0, name)
                best = seconds
    return rungs


def _seconds(
    op: Dense, weight: MeasuredWeight, tokens: Sequence[int], context: Context
) -> list[float]:
    """What a layer takes at each number of tokens, predicted for the layout that it would get."""
    options, backend, target = context.options, context.backend, context.target
    layout = choose(op, weight, options, backend, target, tokens, context.evidence).layout
    family = backend.weighted_family(layout)
    return [family.cost(op, layout, weight, count, target) for count in tokens]


def _pays(op: Dense, gains: Sequence[float]) -> bool:
    """Whether a form is so many times as fast, by number of tokens, as to be worth its rounding.

    Arithmetic in few bits where it is faster at the usual number, the first: nobody wants it for
    single tokens alone. Weights in 16 bits where they are slower at none.
    """
    if op.types.input == FLOAT32.input:
        return min(gains) >= 1 and geometric_mean(gains) >= PREDICTED_MARGIN
    return gains[0] >= PREDICTED_MARGIN
