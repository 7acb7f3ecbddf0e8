"""Sizes of blocks, as users write them."""

from __future__ import annotations

import re

from sparse_tvm.errors import OptionError


def parse_block(text: str) -> tuple[int, int]:
    """Parse a block size such as ``"4x1"`` into ``(rows, columns)``.

    Raises
    ------
    OptionError
        When `text` has another form, or a size is zero.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text.strip().lower(), re.ASCII)
    if match is None:
        raise OptionError(
            f"block size {text!r} is not of the form RxC",
            hint="give outputs x inputs, for example 4x1",
        )
    return int(match[1]), int(match[2])
