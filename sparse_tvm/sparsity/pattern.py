"""What pruning aims at: what goes as a unit, and how much of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparse_tvm.errors import OptionError
from sparse_tvm.sparsity.blocks import parse_block

AUTO = "auto"
"""To ``prune``, in place of a structure: by layer the one that its kernels reward most."""


@dataclass(frozen=True)
class Pattern:
    """What is pruned as a unit: blocks, or the least of every M inputs.

    Attributes
    ----------
    block : tuple[int, int]
        Outputs by inputs; ``(1, 1)`` is unstructured.
    n_m : tuple[int, int] | None
        Keep N of every M consecutive inputs; `block` is not used then.
    """

    block: tuple[int, int] = (1, 1)
    n_m: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse ``"unstructured"``, ``"RxC"`` or ``"N:M"``.

        Raises
        ------
        OptionError
            When `text` is none of these.
        """
        if text == "unstructured":
            return cls()
        if match := re.fullmatch(r"(\d{1,3}):(\d{1,3})", text, re.ASCII):
            n, m = int(match[1]), int(match[2])
            if not 0 < n < m:
                raise OptionError(
                    f"structure {text!r} keeps {n} of every {m} values",
                    hint="N must be smaller than M and not 0, for example 2:4",
                )
            return cls(n_m=(n, m))
        try:
            return cls(parse_block(text))
        except OptionError:
            raise OptionError(
                f"unknown structure {text!r}",
                hint="give unstructured, blocks of outputs x inputs such as 4x1, or N:M as in 2:4",
            ) from None


@dataclass(frozen=True)
class Goal:
    """How one layer is to be pruned.

    Attributes
    ----------
    pattern : Pattern
        What goes as a unit.
    sparsity : float
        Share of values to set to zero, in [0, 1).
    """

    pattern: Pattern
    sparsity: float

    @classmethod
    def parse(cls, structure: str, sparsity: float | None) -> Goal:
        """Combine a structure and a sparsity as users write them; N:M implies its sparsity.

        Raises
        ------
        OptionError
            When one of them is no such thing, or they contradict each other.
        """
        pattern = Pattern.parse(structure)
        if pattern.n_m:
            n, m = pattern.n_m
            implied = 1 - n / m
            if sparsity is not None and abs(sparsity - implied) > 1e-6:
                raise OptionError(
                    f"sparsity {sparsity} contradicts structure {structure}, "
                    f"which implies {implied:g}",
                    hint="leave the sparsity out",
                )
            return cls(pattern, implied)
        if sparsity is None:
            raise OptionError(f"structure {structure} needs a sparsity", hint="for example 0.9")
        if not 0 <= sparsity < 1:
            raise OptionError(
                f"sparsity {sparsity} is not in [0, 1)",
                hint="0.9 sets 90 % of the weights to zero",
            )
        return cls(pattern, sparsity)


def asked_sparsity(sparsity: float | None) -> float:
    """Return the sparsity that goes with structure :data:`AUTO`.

    Raises
    ------
    OptionError
        When there is none, or it is not between 0 and 1.
    """
    if sparsity is None or not 0 < sparsity < 1:
        raise OptionError(
            f"structure {AUTO} needs a sparsity between 0 and 1"
            + ("" if sparsity is None else f", not {sparsity}"),
            hint="0.9 sets 90 % of the weights to zero",
        )
    return sparsity
