"""One kernel of a model to be tuned: its candidates, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log
from statistics import mean

from sparse_tvm.families import WeightedFamily, Wish
from sparse_tvm.operators import Layout
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.layout_choice import choose
from sparse_tvm.tuning.layers import TunedLayer
from sparse_tvm.tuning.records import Condition, Records

_HOPELESS = 1.5
"""How much slower than the best a candidate may be predicted, corrected, and still be tried."""

_FINALISTS, _CLOSE = 3, 1.1
"""How many of the best are confirmed, and how near the best they are."""


@dataclass
class Kernel:
    """One kernel's candidates, and what is known of them.

    Attributes
    ----------
    layer : TunedLayer
        What is computed.
    untuned : Layout
        The candidate that is chosen without measuring.
    compared : Sequence[Layout]
        The candidates among which the compiler would choose.
    predicted : dict[Layout, list[float]]
        Seconds of every candidate at each number of tokens, on one core.
    measured : dict[Layout, dict[Condition, float]]
        Seconds of those that were measured.
    failed : set[Layout]
        Those that could not be.
    exhaustive : bool
        Whether no candidate is left alone for its prediction.
    fresh : bool
        Whether one of its candidates was measured just now.
    confirmed : set[Layout]
        Those that were measured once more, for longer.
    """

    layer: TunedLayer
    untuned: Layout
    compared: Sequence[Layout]
    predicted: dict[Layout, list[float]]
    measured: dict[Layout, dict[Condition, float]] = field(default_factory=dict)
    failed: set[Layout] = field(default_factory=set)
    exhaustive: bool = False
    fresh: bool = False
    confirmed: set[Layout] = field(default_factory=set)

    @property
    def tried(self) -> int:
        """How many candidates are done with."""
        return len(self.measured) + len(self.failed)

    @property
    def best(self) -> Layout | None:
        """The fastest candidate so far, in the mean over all conditions."""
        return min(self.measured, key=self._measured_loss, default=None)

    def gain(self) -> float | None:
        """How much faster the best is than what would have been chosen; None if not known."""
        if self.best is None or self.untuned not in self.measured:
            return None
        return self.slower(self.untuned)

    def slower(self, layout: Layout) -> float:
        """How many times as long as the best a measured candidate takes."""
        assert self.best is not None
        return exp(self._measured_loss(layout) - self._measured_loss(self.best))

    def finalist(self) -> Layout | None:
        """The fastest candidate that was not confirmed yet; None once the fastest few are.

        Which are fastest may change with each that is. The one that the others are measured beside
        needs none.
        """
        if self.best is None or self.untuned not in self.measured:
            return None
        limit = self._measured_loss(self.best) + log(_CLOSE)
        others = sorted(self.measured.keys() - {self.untuned}, key=self._measured_loss)
        close = [one for one in others if self._measured_loss(one) < limit][:_FINALISTS]
        return next((one for one in close if one not in self.confirmed), None)

    def next(self) -> Layout | None:
        """The candidate to measure now; None if no other one is worth it."""
        open_ones = [one for one in self.predicted if one not in self.measured.keys() | self.failed]
        if self.untuned in open_ones:
            return self.untuned
        for sparse in (False, True):
            if not any(layout.sparse == sparse for layout in self.measured):
                usual = [layout for layout in self.compared if layout in open_ones]
                offers = [layout for layout in usual if layout.sparse == sparse]
                if offers:
                    return min(offers, key=self._corrected_loss)
        best = min(open_ones, key=self._corrected_loss, default=None)
        if best is None or self.best is None or self.exhaustive:
            return best
        hopeless = self._corrected_loss(best) > self._measured_loss(self.best) + log(_HOPELESS)
        return None if hopeless else best

    def _measured_loss(self, layout: Layout) -> float:
        return mean(log(seconds) for seconds in self.measured[layout].values())

    def _predicted_loss(self, layout: Layout) -> float:
        return mean(log(seconds) for seconds in self.predicted[layout])

    def _corrected_loss(self, layout: Layout) -> float:
        """Predicted, and corrected by what was measured of the layouts most like it."""
        errors: dict[int, list[float]] = {}
        for known in self.measured:
            alike = (known.format == layout.format) + (known.block == layout.block)
            alike += known.sparse == layout.sparse
            error = self._measured_loss(known) - self._predicted_loss(known)
            errors.setdefault(alike, []).append(error)
        correction = mean(errors[max(errors)]) if errors else 0.0
        return self._predicted_loss(layout) + correction


def kernel_of(
    layer: TunedLayer,
    context: Context,
    known: Records,
    threads: Sequence[int],
    exhaustive: bool,
) -> Kernel:
    """A kernel with its candidates, and what the records know of them."""
    op, weight, target = layer.call.op, layer.weight, context.target
    families = [f for f in context.backend.accepting(op, target) if isinstance(f, WeightedFamily)]
    wish = Wish("dense") if weight.nonzeros == op.matrix[0] * op.matrix[1] else None
    compared = [one for family in families for one in family.candidates(op, weight, target, wish)]
    variants = [one for family in families for one in family.variants(op, weight, target, wish)]
    predicted = {
        layout: [family.cost(op, layout, weight, count, target) for count in layer.tokens]
        for layout in (*compared, *variants)
        for family in [context.backend.weighted_family(layout)]
    }
    needed = {Condition(count, each) for count in layer.tokens for each in threads}
    measured = {
        layout: {condition: seconds[condition] for condition in needed}
        for layout, seconds in known.seconds(op, weight, target.name).items()
        if needed <= seconds.keys()
    }
    failed = known.failures(op, weight, target.name) & predicted.keys()
    untuned = choose(op, weight, context.options, context.backend, target, layer.tokens).layout
    return Kernel(layer, untuned, compared, predicted, measured, failed, exhaustive)
