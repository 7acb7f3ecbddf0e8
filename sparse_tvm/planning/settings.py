"""How one layer may be pruned: a structure, and the share of zeros."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_tvm.errors import OptionError
from sparse_tvm.sparsity.pattern import Pattern
from sparse_tvm.sparsity.statistics import AssumedWeight

TOKENS = 128
"""Of an input that leaves their number open."""

SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.875, 0.9, 0.925, 0.95, 0.96, 0.97)
"""The shares of zeros among which a plan chooses: the larger, the less another percent costs."""


@dataclass(frozen=True, order=True)
class Setting:
    """How a layer is pruned.

    Attributes
    ----------
    structure : str
        What is pruned as a unit, as ``prune --structure`` takes it.
    sparsity : float
        Share of zeros, 0 to 1; 0 leaves the layer as it is.
    """

    structure: str = "unstructured"
    sparsity: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Parse ``"90%:4x1"``, ``"0.9:4x1"``, ``"90%"`` or ``"2:4"``.

        Raises
        ------
        OptionError
            When it is none of these.
        """
        if re.fullmatch(r"\d+:\d+", text):
            return cls(text, _implied(text))
        share, _, structure = text.partition(":")
        structure = structure or cls.structure
        number = share.removesuffix("%")
        try:
            sparsity = float(number) / (100 if share.endswith("%") else 1)
        except ValueError:
            sparsity = -1.0
        if not 0 <= sparsity < 1:
            raise OptionError(
                f"{text!r} is not SPARSITY:STRUCTURE",
                hint="such as 90%:4x1, 80%:unstructured or 2:4",
            )
        check_structure(structure)
        if ":" in structure:
            raise OptionError(f"{text!r}: {structure} implies its sparsity", hint="leave it out")
        return cls(structure, sparsity)

    def __str__(self) -> str:
        if ":" in self.structure:
            return self.structure
        return f"{100 * self.sparsity:.4g}%:{self.structure}" if self.sparsity else "dense"

    def assumed(self, shape: tuple[int, int]) -> AssumedWeight:
        """The zeros that a weight ``[N, K]`` will have."""
        pattern = Pattern.parse(self.structure)
        return AssumedWeight(shape, self.sparsity, pattern.block, pattern.n_m)


DENSE = Setting()
"""A layer that is left as it is."""


def settings_of(structure: str, sparsities: Sequence[float] = SPARSITIES) -> list[Setting]:
    """The settings of a structure that are compared: N:M has a single one."""
    check_structure(structure)
    if ":" in structure:
        return [Setting(structure, _implied(structure))]
    return [Setting(structure, sparsity) for sparsity in sparsities]


def check_structure(structure: str) -> None:
    """Refuse what is no structure.

    Raises
    ------
    OptionError
        As `Pattern.parse`.
    """
    Pattern.parse(structure)


def _implied(structure: str) -> float:
    pattern = Pattern.parse(structure)
    assert pattern.n_m is not None
    kept, of = pattern.n_m
    return 1 - kept / of
