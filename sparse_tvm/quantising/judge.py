"""Whether what was compiled is near enough to the model it came from, and which layers are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tvm.compilation import Compilation
from sparse_tvm.errors import ModelError, OptionError, VerificationError
from sparse_tvm.frontends.importer.model import ImportedModel
from sparse_tvm.operators import PRECISION_NAMES
from sparse_tvm.quantising.choice import LEAST_COSINE_AUTO, Feeds, Quantising
from sparse_tvm.quantising.search import most_sensitive
from sparse_tvm.verification import (
    LEAST_COSINE,
    LEAST_COSINE_QUANTISED,
    TOLERANCE,
    TOLERANCE_16_BIT,
    Bound,
    Feed,
    NotVerified,
    compare_with_reference,
    feeds_of,
)


@dataclass(frozen=True)
class Judge:
    """Compares artifacts of one model with it.

    Attributes
    ----------
    given : Sequence[Feed]
        What to compare on.
    real : bool
        Whether those are the user's inputs.
    tolerance, min_cosine : float | None
        As the user said; otherwise they depend on the precision.
    chosen : bool
        Whether the precision is ``auto``.
    model : ImportedModel
        As it is, without scales that were found for it.
    """

    given: Sequence[Feed]
    real: bool
    tolerance: float | None
    min_cosine: float | None
    chosen: bool
    model: ImportedModel

    @classmethod
    def of(
        cls,
        compilation: Compilation,
        inputs: Mapping[str, np.ndarray] | None,
        tolerance: float | None,
        min_cosine: float | None,
        *,
        chosen: bool,
    ) -> Judge:
        """Judge by the user's inputs, or by random ones."""
        model = compilation.imported
        given = feeds_of(model, inputs)
        return cls(given, inputs is not None, tolerance, min_cosine, chosen, model)

    @property
    def feeds(self) -> Feeds:
        """The arrays to compare on."""
        return [feed.arrays for feed in self.given]

    @property
    def real_feeds(self) -> Feeds:
        """Those of the user; empty if there are none."""
        return self.feeds if self.real else []

    @property
    def least_cosine(self) -> float:
        """What ``auto`` has to keep."""
        return LEAST_COSINE_AUTO if self.min_cosine is None else self.min_cosine

    def verification(
        self, compilation: Compilation, quantising: Quantising | None, artifact: Path
    ) -> dict[str, Any]:
        """What the manifest says of the comparison with the reference, or why there was none.

        Raises
        ------
        VerificationError
            When an output is worse than it may be. In low precision the layers that hurt most are
            named, unless others can be chosen.
        """
        source, target = compilation.source, compilation.context.target
        bound = self._bound(compilation)
        try:
            compared = compare_with_reference(artifact, source, target, bound, self.given)
        except NotVerified as reason:
            return {"unverified": str(reason)}
        except VerificationError as error:
            if bound.min_cosine is None or self.chosen:
                raise
            losses = self._losses(compilation, quantising)
            if not losses:
                raise
            worst = most_sensitive(losses)
            raise VerificationError(
                f"{error.message}; the layers that take most from it are {worst}", hint=error.hint
            ) from error
        if bound.min_cosine is not None and (self.real or self.chosen):
            losses = self._losses(compilation, quantising)
            if losses:
                compared["sensitivity"] = losses
        return {"verification": compared}

    def _bound(self, compilation: Compilation) -> Bound:
        """How far outputs may be off: as told, or as the model's precision has it."""
        imported = compilation.imported
        precisions = compilation.context.options.precisions
        rounded = not {"fp32", "fp16"}.issuperset(precisions)
        rounded |= self.chosen and "fp16" in precisions
        tolerance, least = self.tolerance, self.min_cosine
        if tolerance is None:
            halves = imported.widened or "fp16" in precisions
            tolerance = TOLERANCE_16_BIT if halves else TOLERANCE
        if least is None and self.chosen:
            least = LEAST_COSINE_AUTO
        if least is None:
            least = LEAST_COSINE if rounded else LEAST_COSINE_QUANTISED
        return Bound(tolerance, least if rounded or imported.quantised else None)

    def _losses(self, compilation: Compilation, quantising: Quantising | None) -> dict[str, float]:
        """What each layer in low precision takes from the cosine, by itself."""
        found = {r.name: PRECISION_NAMES[r.precision] for r in compilation.program.reports.values()}
        lowered = {name: p for name, p in found.items() if p in ("int8", "bf16")}
        if not lowered:
            return {}
        if quantising is None:
            try:
                quantising = Quantising(compilation.source, compilation.context, self.model)
            except (ModelError, OptionError):
                return {}  # a saved module, or a model of its own integers: nothing to rehearse
        return quantising.losses(lowered, self.feeds)
