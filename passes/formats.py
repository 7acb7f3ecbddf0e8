"""How the user wants weights stored: the options of the command line, checked.

Imports neither NumPy nor TVM, so that a wrong option is refused at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparse_tvm.errors import OptionError
from sparse_tvm.sparsity.blocks import parse_block

FORMATS = ("auto", "dense", "csr", "bsr")


@dataclass(frozen=True)
class LayerRule:
    """One ``--layer REGEX=FORMAT`` option."""

    pattern: re.Pattern[str]
    format: str
    block: tuple[int, int] | None
    text: str


@dataclass(frozen=True)
class FormatOptions:
    """How the user wants weights stored.

    Attributes
    ----------
    format : str
        ``auto`` chooses by predicted cost; the others are for every layer.
    block : tuple[int, int] | None
        Rows x columns of BSR blocks; None lets the cost model choose.
    threshold : float | None
        Layers with a smaller share of zeros stay dense.
    rules : tuple[LayerRule, ...]
        Exceptions by layer name; the last that matches counts.
    """

    format: str = "auto"
    block: tuple[int, int] | None = None
    threshold: float | None = None
    rules: tuple[LayerRule, ...] = field(default=())

    @classmethod
    def parse(
        cls,
        *,
        format: str = "auto",
        block: str | None = None,
        threshold: float | None = None,
        rules: Sequence[str] = (),
    ) -> FormatOptions:
        """Check the options of the command line.

        Raises
        ------
        OptionError
            When a value is unknown or contradicts another.
        """
        if format not in FORMATS:
            raise OptionError(f"unknown format {format!r}", hint=f"one of {', '.join(FORMATS)}")
        if block is not None and format not in ("auto", "bsr"):
            raise OptionError(f"--block {block} needs --format bsr or auto, not {format}")
        if threshold is not None and not 0 <= threshold <= 1:
            raise OptionError(
                f"threshold {threshold} is not a share of zeros", hint="a number from 0 to 1"
            )
        size = parse_block(block) if block else None
        return cls(format, size, threshold, tuple(_parse_rule(rule) for rule in rules))

    def rule_for(self, layer: str) -> LayerRule | None:
        """The last rule that matches the layer."""
        return next((r for r in reversed(self.rules) if r.pattern.search(layer)), None)


def _parse_rule(text: str) -> LayerRule:
    """Parse ``REGEX=dense|csr|bsr[:RxC]``."""
    expression, equals, wanted = text.rpartition("=")
    format, _, block = wanted.partition(":")
    if not equals or format not in ("dense", "csr", "bsr") or (block and format != "bsr"):
        raise OptionError(
            f"layer rule {text!r} is not REGEX=FORMAT", hint="for example 'query|key=bsr:4x1'"
        )
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise OptionError(f"layer rule {text!r}: bad regular expression: {error}") from error
    return LayerRule(pattern, format, parse_block(block) if block else None, text)
