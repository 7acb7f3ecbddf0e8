"""The Markdown report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparse_tvm.report.content import (
    LAYER_HEADER,
    claims,
    layer_rows,
    summary_facts,
    verification_facts,
    verification_title,
)


def render_markdown(manifest: Mapping[str, Any], bench: Mapping[str, Any] | None = None) -> str:
    """Return the report of `manifest`, and of what was measured, as GitHub-flavoured Markdown."""
    phases = [(phase["name"], f"{phase['seconds']:.2f}") for phase in manifest["compile"]["phases"]]
    sections = [
        f"# {_escape(manifest['model']['name'])}",
        "\n".join(f"- {_escape(f'{figure}: {of}')}" for figure, of in claims(manifest, bench)),
        _table(("", ""), summary_facts(manifest)),
        "## Verification",
        _escape(verification_title(manifest)) + ".",
        _table(("output", "difference"), verification_facts(manifest)),
        "## Layers",
        _table(LAYER_HEADER, (row.cells for row in layer_rows(manifest))),
        "## Notes",
        "\n".join(f"- {_escape(note)}" for note in manifest["notes"] or ["none"]),
        "## Phases",
        _table(("phase", "seconds"), phases),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    if not rows:
        return ""
    return "\n".join([_line(header), _line(["---"] * len(header)), *map(_line, rows)])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(cell: str) -> str:
    """Keep a cell on its line and in its column, and its characters literal.

    A name must be neither a link nor an image, which would be fetched when the report is read.
    """
    for character in "\\|*_<`[]&$~":
        cell = cell.replace(character, "\\" + character)
    return " ".join(cell.split())
