"""The least sizes of symbolic dimensions: those from which no window is larger than its input.

A convolution over fewer rows than its kernel has would have outputs of negative size, and what
comes after divides by that.
"""

from __future__ import annotations

from collections.abc import Iterator

import tvm
from tvm import relax, tirx

from sparse_tvm.frontends.importer.sizes import Sizes, as_expr
from sparse_tvm.frontends.importer.tensors import shape_of
from sparse_tvm.spec import LARGEST_SIZE

_WINDOWS = ("relax.nn.conv", "relax.nn.max_pool", "relax.nn.avg_pool")


def demand_windows_fit(module: tvm.IRModule, sizes: Sizes) -> None:
    """Raise the lower bounds of dimensions until every window's output has an element.

    Raises
    ------
    ValueError
        When a bound of a dimension, or its fixed size, is too small for that.
    """
    seen: set[str] = set()
    for name, size in _outputs(module):
        if isinstance(size, int):
            if size < 1:
                raise ValueError(f"a window of {name} is larger than what it moves over")
            continue
        symbols = tirx.analysis.undefined_vars(size)
        if len(symbols) != 1 or str(size) in seen:
            continue
        seen.add(str(size))
        low, high = sizes.bounds.get(symbols[0].name, (1, LARGEST_SIZE))
        least = _least(size, symbols[0], low, high)
        if least > low:
            sizes.bounds[symbols[0].name] = least, high


def _outputs(module: tvm.IRModule) -> Iterator[tuple[str, object]]:
    """Yield operator and sizes of what convolutions and pools compute."""
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            operator = call.op if isinstance(call, relax.Call) else None
            if isinstance(operator, tvm.ir.Op) and operator.name.startswith(_WINDOWS):
                for size in shape_of(binding.var)[2:]:
                    yield operator.name, size


def _least(size: tirx.Expr, symbol: tirx.Var, low: int, high: int) -> int:
    """Return the least value of a symbol for which a size that grows with it is positive."""

    def is_positive(value: int) -> bool:
        analyzer = tvm.sym.Analyzer()
        analyzer.bind(symbol, as_expr(value))
        return int(analyzer.simplify(size)) > 0

    if is_positive(low):
        return low
    if not is_positive(high):
        raise ValueError(f"{symbol.name} is at most {high}, which is too small for a window")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_positive(middle) else (middle, high)
    return high
