"""The HTML report's plots: Vega-Lite specifications, drawn to SVG when the report is written.

Each is drawn for a page and for a phone, on which a page's plot could not be read.

Colours are CSS variables of the page, so plots follow its light or dark scheme. What a mark stands
for is its ``aria-label``, which the page shows as a tooltip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

WIDTH = 1080
"""Pixels of a plot that fills the page."""

SLIM_WIDTH = 230
"""Pixels of every plot on a phone, beside its axis."""

_THEME: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "labelLimit": 260,
    },
    "legend": {
        "labelColor": "var(--text)",
        "titleColor": "var(--muted)",
        "labelFontSize": 12,
        "symbolType": "square",
        "orient": "top",
        "title": None,
    },
}

_PADDING = {"left": 14, "right": 14, "top": 2, "bottom": 2}  # text may be wider than measured
_DENSE = "var(--dense-bar)"
OTHER = "var(--other)"
"""What is neither a dense nor a sparse layer."""

_SPARSE = [f"var(--c{index})" for index in range(6)]


class Plot(NamedTuple):
    """A plot as SVG, drawn for a page and for a phone; a page shows the one that fits."""

    broad: str
    slim: str

    def __html__(self) -> str:
        return f'<div class="broad">{self.broad}</div>\n<div class="slim">{self.slim}</div>'


def format_colours(formats: Sequence[str]) -> dict[str, str]:
    """A colour for each weight format: grey for dense ones, in the order given for others."""
    sparse = [name for name in dict.fromkeys(formats) if not name.startswith("dense")]
    colours = {name: _DENSE for name in formats if name.startswith("dense")}
    return colours | {name: _SPARSE[i % len(_SPARSE)] for i, name in enumerate(sparse)}


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """A colour for each group of a profile, the same whichever of them are there."""
    known = {"sparse layers": _SPARSE[0], "dense layers": _DENSE, "attention": _SPARSE[1]}
    return {group: known.get(group, OTHER) for group in groups}


def layer_strip(layers: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Plot:
    """One bar per layer, in the model's order: its height is the sparsity, its colour the format.

    `layers` have ``index``, ``sparsity``, ``format`` and ``label``.
    """
    return _draw(
        {
            "data": {"values": list(layers)},
            "height": 130,
            "width": WIDTH,
            "mark": {"type": "bar", "width": {"band": 0.86}, "minBandSize": 1},
            "encoding": {
                "x": {"field": "index", "type": "ordinal", "axis": None},
                "y": {
                    "field": "sparsity",
                    "type": "quantitative",
                    "scale": {"domain": [0, 1]},
                    "axis": {"format": "%", "tickCount": 4, "title": None},
                },
                "color": _colour("format", colours),
                "description": {"field": "label"},
            },
        }
    )


def layer_times(
    layers: Sequence[Mapping[str, Any]], colours: Mapping[str, str], *, log: bool
) -> Plot:
    """Milliseconds of every layer: as it is, in front of the best dense form; measured, as a dot.

    `layers` have ``index``, ``chosen``, ``format`` and ``label``, and where known ``dense`` and
    ``measured``.
    """
    scale = {"type": "symlog", "constant": 0.01} if log else {}
    y = {"type": "quantitative", "axis": {"title": "ms", "tickCount": 5}, "scale": scale}
    x = {"field": "index", "type": "ordinal", "axis": None}
    label = {"field": "label"}

    def bars(field: str, width: float, colour: Mapping[str, Any]) -> dict[str, Any]:
        encoding = {"x": x, "y": {**y, "field": field}, "color": colour, "description": label}
        mark = {"type": "bar", "width": {"band": width}, "minBandSize": 1}
        return {"mark": mark, "encoding": encoding}

    dots = {
        "transform": [{"filter": "isValid(datum.measured)"}],
        "mark": {"type": "point", "filled": True, "size": 22, "color": "var(--text)"},
        "encoding": {"x": x, "y": {**y, "field": "measured"}, "description": label},
    }
    return _draw(
        {
            "data": {"values": list(layers)},
            "height": 170,
            "width": WIDTH,
            "layer": [
                bars("dense", 0.9, {"value": _DENSE}),  # no legend: the text above says it
                bars("chosen", 0.55, _colour("format", colours)),
                dots,
            ],
        }
    )


def shares(parts: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Plot:
    """One bar, cut into parts: these have ``part``, ``value`` and ``label``."""
    values = [{**part, "order": order} for order, part in enumerate(parts)]
    return _draw(
        {
            "data": {"values": values},
            "height": 34,
            "width": WIDTH,
            "mark": {"type": "bar", "cornerRadius": 2},
            "encoding": {
                "x": {
                    "field": "value",
                    "type": "quantitative",
                    "stack": "normalize",
                    "axis": {"format": "%", "title": None, "grid": False, "tickCount": 5},
                },
                "color": _colour("part", colours),
                "order": {"field": "order"},
                "description": {"field": "label"},
            },
        }
    )


def roofline(kernels: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> Plot:
    """Measured milliseconds over those of the machine's limit; on the line, there is no faster.

    `kernels` have ``bound``, ``measured``, ``group`` and ``label``.
    """
    ends = [value for kernel in kernels for value in (kernel["bound"], kernel["measured"])]
    low, high = min(ends) / 1.3, max(ends) * 1.3
    axis = {"grid": True, "tickCount": 5, "format": "~g"}
    scale = {"type": "log", "domain": [low, high], "nice": False}

    def position(field: str, title: str) -> dict[str, Any]:
        return {
            "field": field,
            "type": "quantitative",
            "scale": scale,
            "axis": {**axis, "title": title},
        }

    x = position("bound", "ms at the machine's limit")
    y = position("measured", "ms measured")
    limit = {
        "data": {"values": [{"bound": end, "measured": end} for end in (low, high)]},
        "mark": {"type": "line", "color": "var(--muted)", "strokeDash": [4, 3]},
        "encoding": {"x": x, "y": y},
    }
    points = {
        "data": {"values": list(kernels)},
        "mark": {"type": "point", "filled": True, "size": 45, "opacity": 0.75},
        "encoding": {
            "x": x,
            "y": y,
            "color": _colour("group", colours),
            "description": {"field": "label"},
        },
    }
    return _draw({"width": 420, "height": 300, "layer": [limit, points]})


def frontier(
    curves: Mapping[str, Sequence[tuple[float, float]]], chosen: tuple[float, float], *, unit: str
) -> Plot:
    """Error over cost: a line for each curve, the first one the frontier, and the chosen point."""
    values = [
        {"curve": name, "cost": cost, "error": error}
        for name, points in curves.items()
        for cost, error in points
    ]
    first = next(iter(curves))
    x = {"field": "cost", "type": "quantitative", "axis": {"title": unit, "tickCount": 8}}
    y = {
        "field": "error",
        "type": "quantitative",
        "axis": {"format": "%", "title": "error: what a layer loses", "tickCount": 6},
    }
    colours = {name: _SPARSE[i % len(_SPARSE)] for i, name in enumerate(curves)}
    lines = {
        "data": {"values": values},
        "mark": {"type": "line", "clip": True},
        "encoding": {
            "x": x,
            "y": y,
            "color": _colour("curve", colours),
            "strokeWidth": {"condition": {"test": f"datum.curve == '{first}'", "value": 3}}
            | {"value": 1.5},
        },
    }
    cost, error = chosen
    point = {
        "data": {
            "values": [
                {"cost": cost, "error": error, "label": f"the plan: {cost:.3g} {unit}, {error:.1%}"}
            ]
        },
        "mark": {"type": "point", "filled": True, "size": 130, "color": "var(--text)"},
        "encoding": {"x": x, "y": y, "description": {"field": "label"}},
    }
    return _draw({"width": WIDTH, "height": 320, "layer": [lines, point]})


def phases(values: Sequence[Mapping[str, Any]]) -> Plot:
    """A bar for each ``phase``: its ``seconds``."""
    order = [value["phase"] for value in values]
    y = {"field": "phase", "type": "nominal", "sort": order, "axis": {"title": None}}
    x = {"field": "seconds", "type": "quantitative", "axis": {"title": "seconds", "tickCount": 5}}
    text = {
        "mark": {"type": "text", "align": "left", "dx": 4, "color": "var(--muted)"},
        "encoding": {"y": y, "x": x, "text": {"field": "seconds", "format": ".2f"}},
    }
    bars = {"mark": {"type": "bar", "color": "var(--c0)"}, "encoding": {"y": y, "x": x}}
    return _draw(
        {
            "data": {"values": list(values)},
            "width": 420,
            "height": {"step": 20},
            "layer": [bars, text],
        }
    )


_SHADES = 16
"""Of a density picture."""


def densest(density: Sequence[str]) -> float:
    """The share of non-zeros in the fullest cell; see ``density`` in ``docs/formats.md``."""
    return max(max(bytes.fromhex(row)) for row in density) / 255


def density_picture(density: Sequence[str]) -> str:
    """Where a weight's non-zeros are: the fuller a cell, the darker; the fullest is opaque.

    One path for each shade: a mark for each cell, as Vega-Lite draws them, takes twenty times the
    bytes.
    """
    cells = [bytes.fromhex(row) for row in density]
    top = max(max(row) for row in cells) or 1
    shades: dict[int, list[str]] = {}
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if shade := round(_SHADES * value / top):
                shades.setdefault(shade, []).append(f"M{x} {y}h1v1h-1z")
    paths = (
        f'<path fill-opacity="{shade / _SHADES:.2g}" d="{"".join(squares)}"/>'
        for shade, squares in sorted(shades.items())
    )
    return (
        f'<svg viewBox="0 0 {len(cells[0])} {len(cells)}" preserveAspectRatio="none" '
        f'shape-rendering="crispEdges" fill="var(--c0)">{"".join(paths)}</svg>'
    )


def _colour(field: str, colours: Mapping[str, str]) -> dict[str, Any]:
    domain, range_ = list(colours), list(colours.values())
    return {"field": field, "type": "nominal", "scale": {"domain": domain, "range": range_}}


def _draw(specification: Mapping[str, Any]) -> Plot:
    import vl_convert

    drawn = []
    for width, legend_columns in ((specification["width"], 0), (SLIM_WIDTH, 3)):
        legend = {**_THEME["legend"], "columns": legend_columns}
        svg: str = vl_convert.vegalite_to_svg(
            {"$schema": "https://vega.github.io/schema/vega-lite/v5.json"}
            | {"padding": _PADDING, **specification}
            | {"width": width, "config": {**_THEME, "legend": legend}},
            vl_version="5.21",
        )
        drawn.append(svg)
    return Plot(*drawn)
