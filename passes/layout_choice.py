"""The choice of a weight's layout, and why.

For every weight, the layouts that the kernel families offer and the user allows are compared by
what the families predict for this weight's real count of stored blocks; dense always takes part,
so a layer is never made sparse where that would make it slower. The user's rules win over the
prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

    The first number of tokens decides between layouts, and tells the report; at none of the others
    may a sparse layout be slower than the dense one.
    """
    families = [f for f in backend.accepting(op, target) if isinstance(f, WeightedFamily)]
    usual, *others = tokens

    def priced(wish: Wish | None = None, at: int = usual) -> list[tuple[float, Layout]]:
        return [
            (family.cost(op, layout, weight, at, target), layout)
            for family in families
            for layout in family.candidates(op, weight, target, wish)
        ]

    def best(pairs: list[tuple[float, Layout]]) -> tuple[float, Layout]:
        return min(pairs, key=lambda pair: pair[0])

    # Several dense layouts: the one that is nearest to the best at every number of tokens.
    losses: dict[Layout, float] = {}
    for count in tokens:
        pairs = priced(Wish("dense"), count)
        for seconds, layout in pairs:
            losses[layout] = losses.get(layout, 0.0) + seconds / best(pairs)[0]
    dense = min(losses, key=lambda layout: losses[layout])
    dense_seconds = next(seconds for seconds, layout in priced(Wish("dense")) if layout == dense)

    def kept(reason: str) -> Choice:
        return Choice(dense, reason, dense_seconds, dense_seconds)

    def made(pairs: list[tuple[float, Layout]], asked: Wish | None, why: str) -> Choice:
        seconds, layout = best(pairs)
        reason = why + _compared(seconds, dense_seconds)
        if asked is not None and asked.block is not None and asked.block != layout.block:
            reason += "; {}x{} stored as {}x{}".format(*asked.block, *layout.block)
        return Choice(layout, reason, seconds, dense_seconds)

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
    slower: dict[Layout, int] = {}
    for count in others:
        limit, _ = best(priced(Wish("dense"), count))
        slower |= {layout: count for seconds, layout in priced(wish, count) if seconds > limit}
    sparse = [pair for pair in priced(wish) if pair[1].sparse]
    fitting = [pair for pair in sparse if pair[1] not in slower]
    choice = made(fitting or sparse, wish, "")
    if not fitting:
        return kept(
            f"sparsity {weight.sparsity:.1%} does not pay: predicted slower than dense at "
            f"{slower[choice.layout]} tokens"
        )
    if choice.seconds * _MARGIN >= dense_seconds:
        return kept(f"sparsity {weight.sparsity:.1%} does not pay: {choice.reason}")
    return choice


def _compared(seconds: float, dense_seconds: float) -> str:
    if seconds <= dense_seconds:
        return f"{dense_seconds / seconds:.1f}x faster than dense (predicted)"
    return f"{seconds / dense_seconds:.1f}x slower than dense (predicted)"
