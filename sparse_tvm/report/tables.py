"""Rich tables for the terminal, shared by ``compile`` and ``inspect``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    rows = layer_rows(manifest)
    name_header, kernel_header = "layer", "format, kernel"
    kernel_width = KERNEL_WIDTH + max(0, width - WIDE) // 2
    names = [fold_name(row.name) for row in rows]
    kernels = [_format_and_kernel(row, kernel_width) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    fixed: dict[str, int] = {}
    if width >= WIDE:  # only the reason gives way
        fixed = {
            "name": min(_widest([name_header, *names]), NAME_WIDTH),
            "structure": STRUCTURE_WIDTH,
            "kernel": min(_widest([kernel_header, *map(str, kernels)]), kernel_width),
        }
    table.add_column(name_header, overflow="fold", width=fixed.get("name"))
    table.add_column("shape", no_wrap=True)
    table.add_column("sparsity", justify="right", no_wrap=True)
    table.add_column("structure", width=fixed.get("structure"), max_width=STRUCTURE_WIDTH)
    table.add_column(kernel_header, overflow="fold", width=fixed.get("kernel"))
    table.add_column("reason", overflow="fold")
    for name, kernel, row in zip(names, kernels, rows, strict=True):
        table.add_row(
            Text(name),
            row.shape,
            row.sparsity,
            Text(row.structure),
            kernel,
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


def _format_and_kernel(row: LayerRow, width: int) -> Text:
    """Return ``bsr 4x1 + bias + gelu`` over the kernel's name, folded to `width`."""
    kernel = fold_name(row.kernel, width, separators="_")
    style = "dim" if row.format == "dense" else "green"
    epilogue = f" + {row.epilogue}" if row.epilogue else ""
    return Text.assemble((row.format, style), epilogue, "\n", (kernel, "dim"))
