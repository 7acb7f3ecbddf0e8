"""Which precisions of a layer are worth their rounding: those predicted to make it faster.

Arithmetic in few bits takes 16 tokens at a time, so one token may take several times as long in
int8 as in float32, and so may sparse weights. A layer that only stores its weight in 16 bits is
faster where few tokens read that from memory, and no faster otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import geometric_mean

from sparse_tvm.frontends.importer.model import ImportedModel
from sparse_tvm.operators import FLOAT32, Dense
from sparse_tvm.passes.dense_to_sparse import typical_tokens, weights_of
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.layout_choice import PREDICTED_MARGIN, choose
from sparse_tvm.passes.program import Program
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.tuning.layers import layer_calls, until_layouts


@dataclass(frozen=True)
class Worth:
    """What each dense layer of float32 may compute in, and how fast that is predicted to be.

    Attributes
    ----------
    rungs : dict[str, list[str]]
        By layer, those of the ladder that are faster than all after them: ``fp32`` always is one.
    seconds : dict[str, dict[str, Counter[int]]]
        By layer and precision, what all its uses take, by number of tokens: several where the
        model leaves that open.
    """

    rungs: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, dict[str, Counter[int]]] = field(default_factory=dict)

    def add(self, layer: str, found: Mapping[str, Mapping[int, float]], rungs: list[str]) -> None:
        """Add a use of a layer, which is to be the faster for all of them."""
        self.rungs[layer] = [name for name in self.rungs.get(layer, rungs) if name in rungs]
        known = self.seconds.setdefault(layer, {})
        for name, seconds in found.items():
            known.setdefault(name, Counter()).update(seconds)

    def slower(self, precisions: Mapping[str, str]) -> list[int]:
        """At how many tokens, of those it is open among, these take longer than float32."""
        gained: Counter[int] = Counter()
        for layer, known in self.seconds.items():
            chosen, exact = known[precisions.get(layer, "fp32")], known["fp32"]
            if len(exact) > 1:
                gained.update({count: exact[count] - chosen[count] for count in exact})
        return sorted(count for count, seconds in gained.items() if seconds < 0)


def worthwhile(imported: ImportedModel, context: Context, ladder: Sequence[str]) -> Worth:
    """Find what each dense layer of float32 may compute in, and be the faster for it.

    Parameters
    ----------
    ladder : Sequence[str]
        Precisions, the lowest first; the last is ``fp32``.
    """
    program = Program(imported.module, dict(imported.weights), dict(imported.layers))
    exact = replace(context, options=replace(context.options, precision=ladder[-1]))
    program = until_layouts(program, exact)
    everything = weights_of(program)
    found = Worth()
    for op, array, output in layer_calls(program):
        if isinstance(op, Dense) and op.types == FLOAT32:
            weight = MeasuredWeight(array.reshape(op.matrix), everything / array.size)
            forms = _forms(op, context, ladder)
            tokens = typical_tokens(op, output)
            seconds = {n: _seconds(form, weight, tokens, exact) for n, form in forms.items()}
            found.add(op.layer, seconds, _faster(forms, seconds))
    return found


def _forms(op: Dense, context: Context, ladder: Sequence[str]) -> dict[str, Dense]:
    """The operator in each precision of a ladder that there are kernels for."""
    forms = {}
    for name in ladder[:-1]:
        form, refusal = context.backend.in_precision(op, name, context.target)
        if refusal is None:
            forms[name] = form
    return {**forms, ladder[-1]: op}


def _faster(forms: Mapping[str, Dense], seconds: Mapping[str, Mapping[int, float]]) -> list[str]:
    """The precisions, the lowest first, that make one layer faster than all after them do."""
    *lower, last = forms
    rungs, best = [last], seconds[last]
    for name in reversed(lower):
        if _pays(forms[name], [best[count] / seconds[name][count] for count in best]):
            rungs.insert(0, name)
            best = seconds[name]
    return rungs


def _seconds(
    op: Dense, weight: MeasuredWeight, tokens: Sequence[int], context: Context
) -> dict[int, float]:
    """What a layer takes at each number of tokens, predicted for the layout that it would get."""
    options, backend, target = context.options, context.backend, context.target
    layout = choose(op, weight, options, backend, target, tokens, context.evidence).layout
    family = backend.weighted_family(layout)
    return {count: family.cost(op, layout, weight, count, target) for count in tokens}


def _pays(op: Dense, gains: Sequence[float]) -> bool:
    """Whether a form is so many times as fast, by number of tokens, as to be worth its rounding.

    Arithmetic in few bits where it is faster at the usual number, the first: nobody wants it for
    single tokens alone. Weights in 16 bits where they are slower at none.
    """
    if op.types.input == FLOAT32.input:
        return min(gains) >= 1 and geometric_mean(gains) >= PREDICTED_MARGIN
    return gains[0] >= PREDICTED_MARGIN
