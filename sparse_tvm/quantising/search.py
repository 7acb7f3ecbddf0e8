"""Which layers stay in higher precision, for outputs to be as near to float32's as is asked for.

Each layer is rounded alone, on data, and what that takes from the outputs' cosine is how much the
layer hurts. Those that hurt most are raised first: one after the other from the lowest precision
to the next that makes the layer faster than those above do, and when all are there, to the one
above. How many it takes is found by bisection, with all layers rounded as they would be. The model
runs once per layer for that, and a few times more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from sparse_tvm.passes.formats import FormatOptions, LayerRule
from sparse_tvm.quantising.rehearsal import Rehearsal

_STEPS = 8
"""How often layers are raised, at most, before all compute in the next precision."""


class PrecisionSearch:
    """The layers of a model, from the most to the least sensitive, and how many are raised.

    Parameters
    ----------
    rehearsal : Rehearsal
        Of the layers that may be lowered.
    ladder : Sequence[str]
        Precisions, the lowest first; the last is ``fp32``.
    least : float
        The cosine that outputs must keep.
    rungs : Mapping[str, Sequence[str]]
        By layer, the part of the ladder that it may be on, the last rung included; a layer that is
        missing may be on all of it.

    Attributes
    ----------
    losses : dict[str, float]
        By layer, what it alone takes from a cosine of 1 on its lowest rung, but for the last.
    cosine : float
        What is expected of the choice.
    """

    def __init__(
        self,
        rehearsal: Rehearsal,
        ladder: Sequence[str],
        least: float,
        rungs: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self._rehearsal, self._ladder, self._least, self._rungs = rehearsal, ladder, least, rungs
        self.losses = rehearsal.losses({name: self._rung(name, 0) for name in rehearsal.layers})
        self._layers = list(self.losses)
        self._last = len(self._layers) * (len(ladder) - 1)
        self._raised = self._settle()
        self.cosine = rehearsal.cosine(self.precisions())

    def precisions(self) -> dict[str, str]:
        """In which precision each layer is to compute."""
        return self._precisions(self._raised)

    def raise_more(self) -> bool:
        """Raise a few layers more; whether there were any."""
        if self._raised == self._last:
            return False
        step = -(-len(self._layers) // _STEPS)
        self._raised = min(self._last, self._raised + step)
        self.cosine = self._rehearsal.cosine(self.precisions())
        return True

    def applied(self, options: FormatOptions) -> FormatOptions:
        """The options of a compile; rules that the user gave stay above what was chosen."""
        found = self.precisions()
        lowest = min(found.values(), key=self._ladder.index)
        rules = tuple(LayerRule.of_layer(name, p) for name, p in found.items() if p != lowest)
        return replace(options, precision=lowest, rules=(*rules, *options.rules))

    def note(self) -> str:
        """What reports say of the choice."""
        counts = Counter(self.precisions().values())
        parts = [f"{counts[name]} layers in {name}" for name in self._ladder if counts[name]]
        unmoved = len(self._rehearsal.layers) - len(self._layers)
        slower = f" ({unmoved} of them would be no faster in less)" if unmoved else ""
        return (
            f"precision auto: {', '.join(parts)}{slower}, for a cosine of {self._least:g}; "
            f"{self.cosine:.5f} expected after {self._rehearsal.runs} runs of the model"
        )

    def _rung(self, layer: str, step: int) -> str:
        """Where a layer is that was raised so often: the next rung up that it may be on."""
        allowed = self._rungs.get(layer, self._ladder)
        return next(name for name in self._ladder[step:] if name in allowed)

    def _precisions(self, raised: int) -> dict[str, str]:
        count = len(self._layers)
        steps = {
            name: raised // count + (place < raised % count)
            for place, name in enumerate(self._layers)
        }
        last = len(self._ladder) - 1
        return {name: self._rung(name, steps.get(name, last)) for name in self._rehearsal.layers}

    def _settle(self) -> int:
        """The fewest raised with which the cosine holds, if more never hurt."""
        low, high = 0, self._last
        while low < high:
            middle = (low + high) // 2
            if self._rehearsal.cosine(self._precisions(middle)) >= self._least:
                high = middle
            else:
                low = middle + 1
        return low


def most_sensitive(losses: Mapping[str, float], count: int = 3) -> str:
    """Name the layers that hurt most, and what each alone takes from the cosine."""
    worst = sorted(losses.items(), key=lambda entry: -entry[1])[:count]
    return ", ".join(f"{name} ({loss:.1e})" for name, loss in worst)
