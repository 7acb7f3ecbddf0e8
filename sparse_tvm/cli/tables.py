"""The look of the tables that verbs print."""

from __future__ import annotations

from collections.abc import Collection

from rich import box
from rich.table import Table
from rich.text import Text

from sparse_tvm.report.tables import fold_name

NAME_WIDTH = 48


def plain_table(*columns: str, numbers: Collection[str] = ()) -> Table:
    """Return an empty table with these columns; those of `numbers` are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def name_cell(name: str) -> Text:
    """Return a layer's name, broken between its parts where it is long."""
    return Text(fold_name(name, NAME_WIDTH))


def shape_cell(shape: Collection[int]) -> str:
    """Return a shape such as ``768x3072``."""
    return "x".join(map(str, shape))
