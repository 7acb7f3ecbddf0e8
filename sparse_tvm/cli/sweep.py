"""``bench --shape batch=1,8,32``: sizes of symbolic dimensions, one measurement for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING

from sparse_tvm.errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table

    from sparse_tvm.benchmark import BenchResult

_SWEEP = re.compile(r"(?P<dimension>[^=:]+)=(?P<sizes>[1-9]\d*(,[1-9]\d*)*)")


def split_sweeps(options: Iterable[str]) -> tuple[list[str], list[dict[str, int]]]:
    """Part ``--shape`` options into shapes of inputs, and the sizes to sweep over.

    Returns
    -------
    tuple[list[str], list[dict[str, int]]]
        The options that give shapes; and every combination of sizes, by dimension: one without
        sizes where there is nothing to sweep.

    >>> split_sweeps(["mask:1,64", "batch=1,8"])
    (['mask:1,64'], [{'batch': 1}, {'batch': 8}])
    """
    shapes, sweeps = [], {}
    for option in options:
        match = _SWEEP.fullmatch(option)
        if match is None:
            shapes.append(option)
            continue
        dimension = match["dimension"]
        if dimension in sweeps:
            raise OptionError(f"--shape gives the sizes of {dimension!r} twice")
        sweeps[dimension] = [int(size) for size in match["sizes"].split(",")]
    combinations = product(*sweeps.values())
    return shapes, [dict(zip(sweeps, sizes, strict=True)) for sizes in combinations]


def sweep_table(combinations: Sequence[dict[str, int]], results: Sequence[BenchResult]) -> Table:
    """One row for each combination of sizes: medians, and how much faster."""
    from sparse_tvm.cli.tables import plain_table

    dimensions = list(combinations[0])
    engines = [timing.engine for timing in (results[0].model, results[0].reference) if timing]
    speedup = ["gain"] if len(engines) > 1 else []
    figures = [*engines, "runs/s", *speedup]
    table = plain_table(*dimensions, *figures, numbers=(*dimensions, *figures))
    for sizes, result in zip(combinations, results, strict=True):
        timings = filter(None, (result.model, result.reference))
        table.add_row(
            *map(str, sizes.values()),
            *(f"{1e3 * timing.p50:.3f} ms{' (noisy)' * timing.is_noisy}" for timing in timings),
            f"{result.model.throughput:.1f}",
            *([f"{result.speedup:.2f}x"] if result.speedup is not None else []),
        )
    return table
