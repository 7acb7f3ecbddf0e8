"""The choice of a weight's layout, and why.

For every weight, the layouts that the kernel families offer and the user allows are compared: by
what was measured of such a layer where there are records of it, else by what the families predict
for this weight's real count of stored blocks. Dense always takes part, so a layer is never made
sparse where that would make it slower. The user's rules win over both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log
from typing import TYPE_CHECKING, Any

from sparse_tvm.families import TYPICAL_TOKENS, WeightedFamily, Wish
from sparse_tvm.operators import Layout, WeightedOperator
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.tuning.evidence import Evidence, Measured
from sparse_tvm.tuning.records import Condition

if TYPE_CHECKING:
    from sparse_tvm.backends.base import Backend, BackendTarget

PREDICTED_MARGIN = 1.1
"""How much faster than what is simpler a form must be predicted to be: so it is on more threads
too, which share what their weights stream through."""

_MARGIN = {"predicted": PREDICTED_MARGIN, "measured": 1.03}
"""How much faster than dense a sparse form must be. A measurement errs less."""

_CERTAIN = 1.02
"""How much faster than what is chosen anyway a layout must have been measured, to be chosen: the
fastest of many owes some of that to chance."""

_WORTH = 1.6
"""How much faster in the mean a sparse form must be that is slower at some number of tokens."""

_SLOWEST = 1.5
"""How much slower than dense it may be there at most."""


@dataclass(frozen=True)
class Choice:
    """The layout chosen for one weight.

    Attributes
    ----------
    layout : Layout
        One of the candidates of a kernel family.
    reason : str
        For the layer's report.
    seconds, dense_seconds : float
        For the layout, and for the best dense one: measured, or predicted on one core.
    basis : str
        ``measured`` or ``predicted``: which of them these are.
    times : dict[str, Any]
        Both, where there are both, as the manifest has them.
    """

    layout: Layout
    reason: str
    seconds: float
    dense_seconds: float
    basis: str = "predicted"
    times: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Where layouts are compared: at a number of tokens, and as a share of all cases.

    ``measured`` is the condition that was measured, None where only predictions are to be had.
    """

    tokens: int
    share: float
    measured: Condition | None = None


@dataclass(frozen=True)
class Comparison:
    """Seconds of layouts in the same cases, the usual one first.

    Attributes
    ----------
    cases : Sequence[Case]
        Shares add up to one.
    seconds : Mapping[Layout, Sequence[float]]
        Of every layout, in each case.
    usual : Mapping[bool, Layout]
        The sparse layout (True), and the dense one, that are best by prediction; none where the
        comparison is by prediction.
    """

    cases: Sequence[Case]
    seconds: Mapping[Layout, Sequence[float]]
    usual: Mapping[bool, Layout] = field(default_factory=dict)

    @property
    def basis(self) -> str:
        """``measured``, at least in part, or ``predicted``."""
        return "predicted" if all(case.measured is None for case in self.cases) else "measured"

    @cached_property
    def fastest_dense(self) -> list[float]:
        """The least seconds of any dense layout, in each case."""
        dense = [column for layout, column in self.seconds.items() if not layout.sparse]
        return [min(column) for column in zip(*dense, strict=True)]

    def loss(self, layout: Layout) -> float:
        """Mean over the cases of how much slower than dense, as a logarithm."""
        ratios = zip(self.cases, self.seconds[layout], self.fastest_dense, strict=True)
        return sum(case.share * log(one / best) for case, one, best in ratios)

    def best(self, *, sparse: bool) -> Layout:
        """The sparse layout, or the dense one, of least loss: another than usual if certainly."""
        best = min((one for one in self.seconds if one.sparse == sparse), key=self.loss)
        usual = self.usual.get(sparse, best)
        certain = self.loss(best) + log(_CERTAIN) < self.loss(usual)
        return best if certain else usual

    @property
    def has_sparse(self) -> bool:
        """Whether there is a sparse layout to compare."""
        return any(layout.sparse for layout in self.seconds)

    def pays(self, layout: Layout) -> bool:
        """Whether a layout is faster than dense: by the margin in the mean and in usual cases.

        One that is slower at some number of tokens, a little, must make up for it elsewhere.
        """
        margin, usual = _MARGIN[self.basis], self.cases[0].tokens
        if self.slower(layout) and self.loss(layout) + log(_WORTH) > 0:
            return False
        triples = list(zip(self.cases, self.seconds[layout], self.fastest_dense, strict=True))
        if any(one > _SLOWEST * best for _, one, best in triples):
            return False
        return self.loss(layout) + log(margin) < 0 and all(
            one * margin < best for case, one, best in triples if case.tokens == usual
        )

    def slower(self, layout: Layout) -> list[int]:
        """At which numbers of tokens dense is faster, if it is not at the usual one."""
        triples = zip(self.cases, self.seconds[layout], self.fastest_dense, strict=True)
        counts = {case.tokens for case, one, best in triples if one > best}
        return [] if self.cases[0].tokens in counts else sorted(counts)


@dataclass(frozen=True)
class _Layer:
    """One layer, and what may be compared of it."""

    op: WeightedOperator
    weight: WeightStatistics
    families: Sequence[WeightedFamily[Any]]
    target: Any
    tokens: Sequence[int]
    measured: Measured | None

    def candidates(self, wish: Wish | None) -> list[Layout]:
        """What the families offer."""
        return [
            layout
            for family in self.families
            for layout in family.candidates(self.op, self.weight, self.target, wish)
        ]

    def predicted(self, layout: Layout, tokens: int) -> float:
        """Seconds on one core."""
        family = next(family for family in self.families if family.name == layout.family)
        return family.cost(self.op, layout, self.weight, tokens, self.target)

    def compare(self, wish: Wish | None) -> Comparison:
        """Dense layouts and those wished for: as measured where some of these were."""
        dense, wanted = self.candidates(Wish("dense")), self.candidates(wish)
        sparse = [layout for layout in wanted if layout.sparse]
        share = 1 / len(self.tokens)
        predicted = Comparison(
            [Case(tokens, share) for tokens in self.tokens],
            {one: [self.predicted(one, t) for t in self.tokens] for one in (*dense, *sparse)},
        )
        measured = self._measured(sparse if wish is not None else None)
        if measured is None or (sparse and not measured.has_sparse):
            return predicted
        usual = {kind: predicted.best(sparse=kind) for kind in (False, *[True] * bool(sparse))}
        known = {kind: one for kind, one in usual.items() if one in measured.seconds}
        return replace(measured, usual=known)

    def _measured(self, allowed: Sequence[Layout] | None) -> Comparison | None:
        """What was measured, of sparse layouts only those of the blocks allowed."""
        if self.measured is None:
            return None
        share, conditions = 1 / len(self.tokens), self.measured.conditions
        cases = [
            Case(tokens, share / len(found), condition)
            for tokens in self.tokens
            for found in [conditions.get(tokens, [None])]
            for condition in found
        ]
        names = {family.name for family in self.families}
        blocks = {(layout.format, layout.block) for layout in allowed or ()}

        def takes_part(layout: Layout) -> bool:
            fits = allowed is None or (layout.format, layout.block) in blocks
            return layout.family in names and (fits or not layout.sparse)

        return Comparison(
            cases,
            {
                layout: [
                    self.predicted(layout, case.tokens)
                    if case.measured is None
                    else seconds[case.measured]
                    for case in cases
                ]
                for layout, seconds in self.measured.seconds.items()
                if takes_part(layout)
            },
        )

    def choice(self, layout: Layout, comparison: Comparison, why: str) -> Choice:
        """The choice of a layout, with the figures it rests on."""
        cases = comparison.cases
        at = next((i for i, case in enumerate(cases) if case.measured is not None), 0)
        seconds, dense_seconds = comparison.seconds[layout][at], comparison.fastest_dense[at]
        tokens, condition = cases[at].tokens, cases[at].measured
        dense = (self.predicted(one, tokens) for one in self.candidates(Wish("dense")))
        predicted = {"seconds": self.predicted(layout, tokens), "dense_seconds": min(dense)}
        times: dict[str, Any] = {"tokens": tokens, "predicted": predicted}
        if condition is not None:
            times["tokens"], times["threads"] = condition.tokens, condition.threads
            times["measured"] = {"seconds": seconds, "dense_seconds": dense_seconds}
        return Choice(layout, why, seconds, dense_seconds, comparison.basis, times)

    def explained(self, layout: Layout, comparison: Comparison) -> str:
        """How a sparse layout compares with dense."""
        times = self.choice(layout, comparison, "").times
        text = _compared(**times.get("measured", times["predicted"]))
        predicted = "predicted"
        if "measured" in times:
            assert self.measured is not None
            measured = "measured by the package's records" if self.measured.shipped else "measured"
            predicted = f"{measured}; predicted: {_compared(**times['predicted'])}"
        text = f"{text} than dense ({predicted})"
        if slower := comparison.slower(layout):
            text += f"; slower at {', '.join(map(str, slower))} tokens"
        return text


def choose(
    op: WeightedOperator,
    weight: WeightStatistics,
    options: FormatOptions,
    backend: Backend,
    target: BackendTarget,
    tokens: Sequence[int] = TYPICAL_TOKENS[:1],
    evidence: Evidence | None = None,
) -> Choice:
    """Choose how the weight of one layer is stored, that is to see so many tokens at a time.

    Layouts are compared by how much faster than dense they are in the mean over these numbers, and
    over the numbers of threads that were measured; the report tells of the first, and of those at
    which dense would be faster.
    """
    families = [f for f in backend.accepting(op, target) if isinstance(f, WeightedFamily)]
    measured = evidence.of(op, weight, target.name, tokens) if evidence is not None else None
    layer = _Layer(op, weight, families, target, tokens, measured)

    def kept(reason: str) -> Choice:
        compared = layer.compare(Wish("dense"))
        return layer.choice(compared.best(sparse=False), compared, reason)

    def made(compared: Comparison, asked: Wish | None, why: str) -> Choice:
        layout = compared.best(sparse=True)
        reason = why + layer.explained(layout, compared)
        if asked is not None and asked.block is not None and asked.block != layout.block:
            reason += "; {}x{} stored as {}x{}".format(*asked.block, *layout.block)
        return layer.choice(layout, compared, reason)

    rule = options.rule_for(op.layer)
    asked = rule or (options if options.format != "auto" else None)
    if asked is not None:
        why = f"rule {rule.text}" if rule is not None else f"--format {options.format}"
        if asked.format == "dense":
            return kept(why)
    if rule is None and options.threshold is not None and weight.sparsity < options.threshold:
        return kept(f"sparsity {weight.sparsity:.1%} is below the threshold {options.threshold}")
    remarks = [remark for family in families if (remark := family.remark(op)) is not None]
    if len(remarks) == len(families):
        return kept("; ".join(remarks))
    if asked is not None:
        assert asked.format is not None
        named = Wish(asked.format, asked.block)
        compared = layer.compare(named)
        if not compared.has_sparse:
            return kept(f"{why}; {backend.name} has no kernels for it in {op.types.weight}")
        return made(compared, named, f"{why}; ")
    if weight.nonzeros == op.matrix[0] * op.matrix[1]:
        return kept("no zeros")
    wish = Wish("bsr", options.block) if options.block else None
    compared = layer.compare(wish)
    choice = made(compared, wish, "")
    if not compared.pays(choice.layout):
        where = " at every size" if compared.slower(choice.layout) else ""
        return kept(f"sparsity {weight.sparsity:.1%} does not pay{where}: {choice.reason}")
    return choice


def _compared(seconds: float, dense_seconds: float) -> str:
    if seconds <= dense_seconds:
        return f"{dense_seconds / seconds:.1f}x faster"
    return f"{seconds / dense_seconds:.1f}x slower"
