"""Rich tables for the terminal, shared by ``compile`` and ``inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_tvm.report.content import (
    LayerRow,
    human_bytes,
    human_count,
    human_percent,
    layer_rows,
    summary_facts,
    verification_facts,
    verification_title,
)

__all__ = [
    "fact_table",
    "fold_name",
    "human_bytes",
    "human_count",
    "human_percent",
    "layer_table",
    "print_summary",
]

WIDE = 100
NAME_WIDTH = 24
STRUCTURE_WIDTH = 12
KERNEL_WIDTH = 21


def layer_table(manifest: Mapping[str, Any], width: int = WIDE) -> Table:
    """Return the table of a manifest's layers: what each became, and why.

    With fewer than :data:`WIDE` columns of `width`, names may break inside words.
    """
    wide = width >= WIDE
    rows = layer_rows(manifest)
    names = [fold_name(row.name) for row in rows]
    widest = max((len(line) for name in names for line in name.splitlines()), default=0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold", min_width=min(widest, NAME_WIDTH) if wide else None)
    table.add_column("shape", no_wrap=True)
    table.add_column("sparsity", justify="right", no_wrap=True)
    table.add_column("structure", max_width=STRUCTURE_WIDTH)
    table.add_column("format, kernel", overflow="fold", min_width=KERNEL_WIDTH if wide else None)
    table.add_column("reason", overflow="fold")
    for name, row in zip(names, rows, strict=True):
        table.add_row(
            Text(name),
            row.shape,
            row.sparsity,
            Text(row.structure),
            _format_and_kernel(row),
            Text(row.reason),
        )
    return table


def fact_table(facts: list[tuple[str, str]]) -> Table:
    """Return a borderless table of (label, value) pairs."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for label, value in facts:
        table.add_row(Text(label), Text(value))
    return table


def print_summary(console: Console, manifest: Mapping[str, Any], output: Path) -> None:
    """Print what a compile made of each layer, its totals, and how it was verified."""
    console.print(layer_table(manifest, console.width))
    for note in manifest["notes"]:
        console.print(Text.assemble(("note: ", "dim"), note))
    console.print(fact_table(summary_facts(manifest)))
    console.print()
    console.print(Text(verification_title(manifest)))
    console.print(fact_table(verification_facts(manifest)))
    console.print(Text.assemble("wrote ", (str(output), "bold")), soft_wrap=True)


def fold_name(name: str, width: int = NAME_WIDTH) -> str:
    """Break a long dotted or slashed name into lines of at most `width` where it has parts."""
    lines = []
    while len(name) > width:
        cut = max(name.rfind(".", 0, width), name.rfind("/", 1, width)) + 1
        if cut == 0:
            break
        lines.append(name[:cut])
        name = name[cut:]
    return "\n".join([*lines, name])


def _format_and_kernel(row: LayerRow) -> Text:
    """Return ``bsr 4x1 + bias + gelu`` over the kernel's name."""
    style = "dim" if row.format == "dense" else "green"
    epilogue = f" + {row.epilogue}" if row.epilogue else ""
    return Text.assemble((row.format, style), epilogue, "\n", (row.kernel, "dim"))
