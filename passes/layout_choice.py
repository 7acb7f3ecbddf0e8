"""The choice of a weight's layout, and why.

For every weight, the layouts that the kernel families offer and the user allows are compared by
what the families predict for this weight's real count of stored blocks; dense always takes part,
so a layer is never made sparse where that would make it slower. The user's rules win over the
prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

from sparse_tvm.families import TYPICAL_TOKENS, WeightedFamily, Wish
from sparse_tvm.operators import Layout, WeightedOperator
from sparse_tvm.passes.formats import FormatOptions
from sparse_tvm.sparsity.statistics import WeightStatistics

if TYPE_CHECKING:
    from sparse_tvm.backends.base import Backend, BackendTarget

_MARGIN = 1.1
"""How much faster a sparse form must be predicted: never slower than dense, on more threads too,
which share what their weights stream through."""


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
        Predicted for the layout, and for the best dense one, on one core.
    """

    layout: Layout
    reason: str
    seconds: float
    dense_seconds: float


def choose(
    op: WeightedOperator,
    weight: WeightStatistics,
    options: FormatOptions,
    backend: Backend,
    target: BackendTarget,
    tokens: Sequence[int] = TYPICAL_TOKENS[:1],
) -> Choice:
    """Choose how the weight of one layer is stored, that is to see so many tokens at a time.

    Layouts are compared by how much faster than dense they are in the mean over these numbers; the
    report tells of the first, and of those at which dense would be faster.
    """
    families = [f for f in backend.accepting(op, target) if isinstance(f, WeightedFamily)]
    usual = tokens[0]

    def priced(wish: Wish | None = None) -> dict[Layout, list[float]]:
        """Seconds of every layout at each number of tokens."""
        layouts = [
            (family, layout)
            for family in families
            for layout in family.candidates(op, weight, target, wish)
        ]
        return {
            layout: [family.cost(op, layout, weight, count, target) for count in tokens]
            for family, layout in layouts
        }

    dense_layouts = priced(Wish("dense"))
    fastest_dense = [min(column) for column in zip(*dense_layouts.values(), strict=True)]

    def loss(seconds: list[float]) -> float:
        """Mean over the numbers of tokens of how much slower than dense, as a logarithm."""
        ratios = zip(seconds, fastest_dense, strict=True)
        return sum(log(one / best) for one, best in ratios) / len(tokens)

    dense = min(dense_layouts, key=lambda layout: loss(dense_layouts[layout]))
    dense_seconds = dense_layouts[dense][0]

    def kept(reason: str) -> Choice:
        return Choice(dense, reason, dense_seconds, dense_seconds)

    def made(pairs: dict[Layout, list[float]], asked: Wish | None, why: str) -> Choice:
        layout = min(pairs, key=lambda layout: loss(pairs[layout]))
        seconds = pairs[layout]
        reason = why + _compared(seconds[0], dense_seconds)
        slower = [
            count
            for count, one, best in zip(tokens, seconds, fastest_dense, strict=True)
            if one > best
        ]
        if slower and usual not in slower:
            reason += f"; slower at {', '.join(map(str, sorted(slower)))} tokens"
        if asked is not None and asked.block is not None and asked.block != layout.block:
            reason += "; {}x{} stored as {}x{}".format(*asked.block, *layout.block)
        return Choice(layout, reason, seconds[0], dense_seconds)

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
        return made(priced(named), named, f"{why}; ")
    if weight.nonzeros == op.matrix[0] * op.matrix[1]:
        return kept("no zeros")
    wish = Wish("bsr", options.block) if options.block else None
    sparse = {layout: seconds for layout, seconds in priced(wish).items() if layout.sparse}
    choice = made(sparse, wish, "")
    mean = loss(sparse[choice.layout])
    if mean + log(_MARGIN) >= 0 or choice.seconds * _MARGIN >= dense_seconds:
        return kept(f"sparsity {weight.sparsity:.1%} does not pay: {choice.reason}")
    return choice


def _compared(seconds: float, dense_seconds: float) -> str:
    if seconds <= dense_seconds:
        return f"{dense_seconds / seconds:.1f}x faster than dense (predicted)"
    return f"{seconds / dense_seconds:.1f}x slower than dense (predicted)"
