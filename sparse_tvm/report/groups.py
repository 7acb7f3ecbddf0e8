"""Layers that repeat, as one row: ``encoder.layer.0-11.query``."""

from __future__ import annotations

import re
from collections.abc import Sequence

_INDEX = re.compile(r"(?<![0-9A-Za-z])\d+(?![0-9A-Za-z])")
_DECIMAL = re.compile(r"\d+\.\d+")


def grouped(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Merge rows whose names differ in one index, and whose other cells in decimals only.

    Parameters
    ----------
    rows : Sequence[Sequence[str]]
        A name, and other cells of equal number.

    Returns
    -------
    list[tuple[str, ...]]
        Each group where its first row was; what differs within it is a range, as ``0-11`` in
        names and ``89.5-90.0 %`` in other cells.
    """
    return [merged(group) for group in groups(rows)]


def groups(rows: Sequence[Sequence[str]]) -> list[list[Sequence[str]]]:
    """Return the rows that :func:`grouped` merges, together."""
    found: dict[tuple[str, ...], list[Sequence[str]]] = {}
    for row in rows:
        name, *cells = row
        key = (_INDEX.sub("#", name, count=1), *(_DECIMAL.sub("#", cell) for cell in cells))
        found.setdefault(key, []).append(row)
    return list(found.values())


def merged(group: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return one of :func:`groups` as one row."""
    return (_merged_names([row[0] for row in group]), *map(_merged, *[row[1:] for row in group]))


def common_prefix(names: Sequence[str]) -> str:
    """Return what all names start with, up to and with a ``.`` or ``/``; nothing for one name."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return first[: max(first.rfind(mark, 0, same) for mark in "./") + 1]


def _merged_names(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    indices = sorted({int(match[0]) for name in names if (match := _INDEX.search(name))})
    return _INDEX.sub(_ranges(indices), names[0], count=1)


def _ranges(numbers: list[int]) -> str:
    """Return ``0-3,5`` for 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _merged(*cells: str) -> str:
    """Return the first cell, with each of its decimals as the range of all cells' there."""
    columns = zip(*(_DECIMAL.findall(cell) for cell in cells), strict=True)
    ranges = iter([_range(sorted(set(column), key=float)) for column in columns])
    return _DECIMAL.sub(lambda _: next(ranges), cells[0])


def _range(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"{values[0]}-{values[-1]}"
