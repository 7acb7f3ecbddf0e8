"""The HTML report: one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from sparse_tvm.report.content import (
    LAYER_HEADER,
    LayerRow,
    layer_rows,
    summary_facts,
    verification_facts,
    verification_title,
)


def render_html(manifest: Mapping[str, Any]) -> str:
    """Return the report of `manifest` as a self-contained HTML page."""
    template = Template(files(__package__).joinpath("template.html").read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return template.substitute(
        title=escape(manifest["model"]["name"]),
        source=escape(f"compiled from {manifest['model']['source'] or 'a model in memory'}"),
        versions=escape(versions),
        cards="\n".join(_card(label, value) for label, value in summary_facts(manifest)),
        verification_title=escape(verification_title(manifest)),
        verification="\n".join(_row(map(escape, fact)) for fact in verification_facts(manifest)),
        layer_header="".join(f"<th>{escape(column)}</th>" for column in LAYER_HEADER),
        layers="\n".join(_layer(row) for row in layer_rows(manifest)),
        notes="\n".join(_row([escape(note)]) for note in manifest["notes"] or ["none"]),
        signature="\n".join(_signature(manifest)),
        phases="\n".join(_phases(manifest["compile"]["phases"])),
    )


def _card(label: str, value: str) -> str:
    return f'<div class="card"><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>'


def _row(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _layer(row: LayerRow) -> str:
    cells = dict(zip(LAYER_HEADER, map(escape, row.cells), strict=True))
    kind = "dense" if row.format == "dense" else "sparse"
    cells["layer"] = cells["layer"].replace(".", ".<wbr>").replace("/", "/<wbr>")
    cells["format"] = f'<span class="tag {kind}">{cells["format"]}</span>'
    cells["sparsity"] = _bar(row.fraction, row.sparsity)
    cells["reason"] = f'<span class="reason">{cells["reason"]}</span>'
    return _row(cells.values())


def _phases(phases: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    phases = list(phases)
    longest = max((phase["seconds"] for phase in phases), default=0.0)
    for phase in phases:
        seconds = phase["seconds"]
        yield _row(
            [escape(phase["name"]), _bar(seconds / longest if longest else 0.0, f"{seconds:.2f} s")]
        )


def _signature(manifest: Mapping[str, Any]) -> Iterable[str]:
    for direction in ("input", "output"):
        for spec in manifest[f"{direction}s"]:
            shape = ", ".join(str(size) for size in spec["shape"])
            yield _row(map(escape, (direction, spec["name"], spec["dtype"], f"[{shape}]")))


def _bar(fraction: float, label: str) -> str:
    """Return a bar `fraction` full; ``data-value`` is what the column sorts by."""
    return (
        f'<div class="bar" data-value="{fraction:.6f}">'
        f'<i style="width:{100 * fraction:.1f}%"></i><b>{escape(label)}</b></div>'
    )
