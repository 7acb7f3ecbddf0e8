"""What symbolic extents of images usually are: what follows from images of the usual size.

Needed where layouts are chosen; any other size is computed as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx
from tvm.sym import Analyzer

from sparse_tvm.passes.graph import shape_of

_TYPICAL_IMAGE = 224
"""Rows and columns of an image ``[batch, channels, rows, columns]`` that a model gets."""

_IMAGE_RANK = 4


class TypicalSizes:
    """Typical values of the symbols that are rows and columns of a model's inputs."""

    def __init__(self, inputs: Sequence[relax.Var]) -> None:
        self._analyzer, bound = Analyzer(), set()
        for image in inputs:
            dims = shape_of(image)
            for dim in dims[2:] if len(dims) == _IMAGE_RANK else ():
                for symbol in [] if isinstance(dim, int) else tirx.analysis.undefined_vars(dim):
                    if symbol not in bound:
                        bound.add(symbol)
                        self._analyzer.bind(symbol, tirx.IntImm("int64", _of(symbol, dim)))

    def of(self, dims: Sequence[Any]) -> tuple[int | None, ...]:
        """The typical values of extents, None where these depend on something else."""
        values = (dim if isinstance(dim, int) else self._analyzer.simplify(dim) for dim in dims)
        return tuple(
            int(value) if isinstance(value, int | tirx.IntImm) else None for value in values
        )


def _of(symbol: tirx.Var, extent: Any) -> int:
    """A value at which an extent, a multiple of a symbol if not the symbol, is a typical one."""
    one = Analyzer()
    one.bind(symbol, tirx.IntImm("int64", 1))
    multiple = one.simplify(extent)
    times = int(multiple) if isinstance(multiple, tirx.IntImm) else 1
    return max(1, _TYPICAL_IMAGE // max(1, times))
