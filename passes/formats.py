"""How the user wants weights stored: the options of the command line, checked.

Imports neither NumPy nor TVM, so that a wrong option is refused at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparse_tvm.errors import OptionError
from sparse_tvm.operators import PRECISIONS
from sparse_tvm.sparsity.blocks import parse_block

FORMATS = ("auto", "dense", "csr", "bsr")


@dataclass(frozen=True)
class LayerRule:
    """One ``--layer REGEX=FORMAT`` option.

    ``format`` and ``precision`` are None where the rule leaves them to other options.
    """

    pattern: re.Pattern[str]
    format: str | None
    block: tuple[int, int] | None
    precision: str | None
    text: str

    @classmethod
    def of_layer(cls, name: str, precision: str) -> LayerRule:
        """The precision of one layer, all of it, every time that its weight is used."""
        pattern = re.compile(f"^{re.escape(name)}{_PART}$")
        return cls(pattern, None, None, precision, f"{name}=@{precision}")


_PART = r"(?:\.forward|\.backward)?(?: \(\d+\))?"
"""What a layer's name ends in for one direction of a recurrent one, and where its weight is used
once more."""


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
        Exceptions by layer name; the last that matches, and has a say, counts.
    precision : str
        In which layers compute; ``fp32``, ``bf16`` or ``int8``.
    integers : bool
        Whether quantised layers multiply the model's own integers, where the target can.
    """

    format: str = "auto"
    block: tuple[int, int] | None = None
    threshold: float | None = None
    rules: tuple[LayerRule, ...] = field(default=())
    precision: str = "fp32"
    integers: bool = False

    @classmethod
    def parse(
        cls,
        *,
        format: str = "auto",
        block: str | None = None,
        threshold: float | None = None,
        rules: Sequence[str] = (),
        precision: str = "fp32",
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
        _check_precision(precision)
        size = parse_block(block) if block else None
        parsed = tuple(_parse_rule(rule) for rule in rules)
        return cls(format, size, threshold, parsed, precision)

    @property
    def precisions(self) -> list[str]:
        """All that are asked for."""
        asked = [self.precision, *(rule.precision for rule in self.rules)]
        return list(dict.fromkeys(name for name in asked if name is not None))

    def rule_for(self, layer: str) -> LayerRule | None:
        """The last rule that matches the layer and names a format."""
        return next((r for r in self._rules_for(layer) if r.format is not None), None)

    def precision_for(self, layer: str) -> str:
        """In which precision the layer computes."""
        return self.ruled_precision(layer) or self.precision

    def ruled_precision(self, layer: str) -> str | None:
        """The precision that the last rule has for the layer."""
        ruled = (rule.precision for rule in self._rules_for(layer))
        return next((name for name in ruled if name is not None), None)

    def _rules_for(self, layer: str) -> list[LayerRule]:
        return [rule for rule in reversed(self.rules) if rule.pattern.search(layer)]


def _parse_rule(text: str) -> LayerRule:
    """Parse ``REGEX=[dense|csr|bsr[:RxC]][@PRECISION]``."""
    expression, equals, wanted = text.rpartition("=")
    form, at, precision = wanted.partition("@")
    format, _, block = form.partition(":")
    known = format in ("dense", "csr", "bsr") or (at and not form)
    if not equals or not known or (block and format != "bsr"):
        raise OptionError(
            f"layer rule {text!r} is not REGEX=FORMAT",
            hint="for example 'query|key=bsr:4x1', '.=@int8' or 'output=bsr:16x4@int8'",
        )
    if at:
        _check_precision(precision)
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise OptionError(f"layer rule {text!r}: bad regular expression: {error}") from error
    size = parse_block(block) if block else None
    return LayerRule(pattern, format or None, size, precision or None, text)


def _check_precision(name: str) -> None:
    if name not in PRECISIONS:
        raise OptionError(f"unknown precision {name!r}", hint=f"one of {', '.join(PRECISIONS)}")
