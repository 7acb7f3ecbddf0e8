"""Rich tables for the terminal, shared by ``compile`` and ``inspect``."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_tvm.report.content import (
    human_bytes,
    human_count,
    human_percent,
    layer_rows,
    nothing_sparse,
    preview_facts,
    summary_facts,
    verification_facts,
    verification_title,
)
from sparse_tvm.report.groups import common_prefix, grouped

__all__ = [
    "fact_table",
    "fold_name",
    "human_bytes",
    "human_count",
    "human_percent",
    "layer_table",
    "print_preview",
    "print_summary",
]

WIDE = 100
"""Columns from which on everything about a layer has a column of its own."""

NAME_WIDTH = 24
STRUCTURE_WIDTH = 12
KERNEL_WIDTH = 21
_OTHER_COLUMNS = 46  # of the narrow table: shape, sparsity, format, and what parts them


def layer_table(manifest: Mapping[str, Any], width: int = WIDE) -> Table:
    """Return the table of a manifest's layers: what each became, and why.

    Layers that repeat share a row, and what all names begin with is said once, in the header.
    With fewer than :data:`WIDE` columns of `width`, the reason stands under the name.
    """
    rows = layer_rows(manifest)
    prefix = common_prefix([row.name for row in rows])
    cells = grouped([(row.name.removeprefix(prefix), *row.cells[1:]) for row in rows])
    header = f"layer ({prefix}…)" if prefix else "layer"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    (_wide_rows if width >= WIDE else _narrow_rows)(table, fold_name(header), cells, width)
    return table


def _wide_rows(table: Table, header: str, rows: list[tuple[str, ...]], width: int) -> None:
    kernel_width = KERNEL_WIDTH + max(0, width - WIDE) // 2
    names = [fold_name(name) for name, *_ in rows]
    kernels = [
        _format_and_kernel(format, kernel, epilogue, kernel_width)
        for *_, format, kernel, epilogue, _ in rows
    ]
    kernel_header = "format, kernel"
    table.add_column(header, width=min(_widest([header, *names]), NAME_WIDTH))
    table.add_column("shape", no_wrap=True)
    table.add_column("sparsity", justify="right", no_wrap=True)
    table.add_column("structure", width=STRUCTURE_WIDTH)
    table.add_column(
        kernel_header, width=min(_widest([kernel_header, *map(str, kernels)]), kernel_width)
    )
    table.add_column("reason")  # only the reason gives way
    for name, kernel, (_, shape, sparsity, structure, *_, reason) in zip(
        names, kernels, rows, strict=True
    ):
        table.add_row(Text(name), shape, sparsity, Text(structure), kernel, Text(reason))


def _narrow_rows(table: Table, header: str, rows: list[tuple[str, ...]], width: int) -> None:
    table.add_column(header, ratio=1, overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("sparsity", justify="right", no_wrap=True)
    table.add_column("format", max_width=KERNEL_WIDTH)
    table.expand = True
    name_width = max(width - _OTHER_COLUMNS, NAME_WIDTH)
    for name, shape, sparsity, structure, format, _kernel, epilogue, reason in rows:
        known = f"{structure}; {reason}" if structure != format else reason
        table.add_row(
            Text.assemble(fold_name(name, name_width), "\n", (known, "dim")),
            shape,
            sparsity,
            _format_and_kernel(format, "", epilogue, KERNEL_WIDTH),
        )


def fact_table(facts: list[tuple[str, str]]) -> Table:
    """Return a borderless table of (label, value) pairs."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for label, value in facts:
        table.add_row(Text(label), Text(value))
    return table


def print_summary(console: Console, manifest: Mapping[str, Any], output: Path) -> None:
    """Print what a compile made of each layer, its totals, and how it was verified."""
    _print_layers(console, manifest)
    console.print(fact_table(summary_facts(manifest)))
    console.print()
    console.print(Text(verification_title(manifest)))
    console.print(fact_table(verification_facts(manifest)))
    console.print(Text.assemble("wrote ", (str(output), "bold")), soft_wrap=True)
    console.print(Text(f"next: sparse-tvm bench {shlex.quote(str(output))}"), soft_wrap=True)


def print_preview(console: Console, manifest: Mapping[str, Any]) -> None:
    """Print what a compile would make of each layer, and how fast and large that is."""
    _print_layers(console, manifest)
    console.print(fact_table(preview_facts(manifest)))
    console.print(Text("nothing was written: a dry run"))


def _print_layers(console: Console, manifest: Mapping[str, Any]) -> None:
    console.print(layer_table(manifest, console.width))
    for note in manifest["notes"]:
        console.print(Text.assemble(("note: ", "dim"), note))
    if warning := nothing_sparse(manifest):
        console.print(Text.assemble(("warning: ", "bold yellow"), warning))


def fold_name(name: str, width: int = NAME_WIDTH, separators: str = "./") -> str:
    """Break a long name into lines of at most `width`, behind `separators` where it has any."""
    lines = []
    while len(name) > width:
        cut = max(name.rfind(separator, 1, width) for separator in separators) + 1
        if cut == 0:
            break
        lines.append(name[:cut])
        name = name[cut:]
    return "\n".join([*lines, name])


def _widest(cells: Iterable[str]) -> int:
    return max((len(line) for cell in cells for line in cell.splitlines()), default=0)


def _format_and_kernel(format: str, kernel: str, epilogue: str, width: int) -> Text:
    """Return ``bsr 4x1 + bias + gelu`` over the kernel's name, folded to `width`."""
    text = Text.assemble((format, "dim" if format == "dense" else "green"))
    if epilogue:
        text.append(f" + {epilogue}")
    if kernel:
        text.append("\n" + fold_name(kernel, width, separators="_"), "dim")
    return text
