"""The HTML report: one page that explains a model, and needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

from sparse_tvm.printable import printable
from sparse_tvm.report import charts
from sparse_tvm.report.content import (
    LayerRow,
    claims,
    human_bytes,
    human_percent,
    layer_figures,
    layer_rows,
    nothing_sparse,
    summary_facts,
    verification_facts,
    verification_title,
)
from sparse_tvm.report.groups import common_prefix, groups, merged

_COLUMNS = ("layer", "shape", "sparsity", "structure", "format", "faster", "reason", "bytes")
_WIDE_RANGE = 30.0
"""Between the longest and the median layer, from which on times are plotted on a log scale."""

_VISIBLE = 0.001
"""Share of a run's time from which on a kernel is plotted."""


def render_html(manifest: Mapping[str, Any], bench: Mapping[str, Any] | None = None) -> str:
    """Return the report of `manifest` as a self-contained page.

    Parameters
    ----------
    manifest : Mapping[str, Any]
        Of an artifact.
    bench : Mapping[str, Any] | None
        What ``sparse-tvm bench`` measured of it, as its ``--json`` has it.
    """
    return render_page(
        "template.html",
        manifest=manifest,
        bench=bench,
        claims=claims(manifest, bench),
        facts=summary_facts(manifest),
        warning=nothing_sparse(manifest),
        verification_title=verification_title(manifest),
        verification=verification_facts(manifest),
        plots=[plot for plot in _plots(manifest, bench) if plot["svg"]],
        pictures=_pictures(manifest),
        columns=_COLUMNS,
        prefix=common_prefix([layer["name"] for layer in manifest["layers"]]),
        groups=_groups(manifest),
        signature=_signature(manifest),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
    )


def render_page(template: str, **content: Any) -> str:
    """Fill in a template of this package."""
    import jinja2

    def read(name: str) -> str:
        return files(__package__).joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=jinja2.FunctionLoader(read)
    )
    return environment.get_template(template).render(**content)


def _plots(manifest: Mapping[str, Any], bench: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Every plot with its title and what it shows; ``svg`` is None where there are no figures."""
    rows = layer_rows(manifest)
    colours = charts.format_colours([_kind(layer, row) for layer, row in _layers(manifest, rows)])
    measured = _measured_layers(bench)
    phases = [
        {"phase": phase["name"], "seconds": phase["seconds"]}
        for phase in manifest["compile"]["phases"]
    ]
    wide = [
        {
            "title": "Layers, in the model's order",
            "about": "How high: the share of zeros. Colour: how the weight is stored.",
            "svg": charts.layer_strip(_strip(manifest, rows), colours) if rows else None,
        },
        {
            "title": "Time of each layer",
            "about": "Grey behind: the fastest dense form. In front: what was chosen"
            + (". Dots: measured in the running model." if measured else ", as it was decided."),
            "svg": _times(manifest, rows, colours, measured),
        },
        {
            "title": "Where the bytes go",
            "about": "Weights in the file. Tables are embeddings and other arrays of no layer.",
            "svg": _bytes(manifest, rows, colours),
        },
        {"title": "Where the time goes", "about": "Of a run, measured.", "svg": _parts(bench)},
    ]
    narrow = [
        {
            "title": "Measured against the machine's limit",
            "about": "Every kernel, at the longer of what its arithmetic and its memory traffic "
            "take at least. On the dashed line there is nothing left to gain.",
            "svg": _roofline(bench),
        },
        {
            "title": "Compile phases",
            "about": f"{manifest['compile']['seconds']:.1f} s in all.",
            "svg": charts.phases(phases) if phases else None,
        },
    ]
    return [{**plot, "wide": plot in wide} for plot in (*wide, *narrow)]


def _pictures(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the zeros of the largest weights are."""
    prefix = common_prefix([layer["name"] for layer in manifest["layers"]])
    return [
        {
            "name": row.name.removeprefix(prefix).split("."),
            "about": f"{row.shape}, {row.structure}; darkest: "
            f"{human_percent(charts.densest(layer['density']))} non-zero",
            "svg": charts.density_picture(layer["density"]),
        }
        for layer, row in _layers(manifest, layer_rows(manifest))
        if layer.get("density")
    ]


def _layers(
    manifest: Mapping[str, Any], rows: Sequence[LayerRow]
) -> list[tuple[Mapping[str, Any], LayerRow]]:
    return list(zip(manifest["layers"], rows, strict=True))


def _kind(layer: Mapping[str, Any], row: LayerRow) -> str:
    """The weight's format, with its precision where that is not float32."""
    precision = layer["precision"]
    return row.format if precision == "float32" else f"{row.format} {precision}"


def _strip(manifest: Mapping[str, Any], rows: Sequence[LayerRow]) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "sparsity": max(layer["sparsity"], 0.01),  # a dense layer is to be seen, too
            "format": _kind(layer, row),
            "label": f"{printable(row.name)}: {row.shape}, {row.sparsity} zeros, "
            f"{_kind(layer, row)}",
        }
        for index, (layer, row) in enumerate(_layers(manifest, rows))
    ]


def _measured_layers(bench: Mapping[str, Any] | None) -> dict[str, float]:
    """Seconds of each layer in the running model."""
    if bench is None or bench["profile"] is None:
        return {}
    kernels = bench["profile"]["kernels"]
    return {kernel["layer"]: kernel["seconds"] for kernel in kernels if kernel["layer"]}


def _times(
    manifest: Mapping[str, Any],
    rows: Sequence[LayerRow],
    colours: Mapping[str, str],
    measured: Mapping[str, float],
) -> charts.Plot | None:
    values: list[dict[str, Any]] = []
    for index, (layer, row) in enumerate(_layers(manifest, rows)):
        if "times" not in layer:
            continue
        figures, found = layer_figures(layer), measured.get(layer["name"])
        chosen, dense = 1e3 * figures["seconds"], 1e3 * figures["dense_seconds"]
        label = (
            f"{printable(layer['name'])}: {_kind(layer, row)} {chosen:.3f} ms, dense {dense:.3f} ms"
        )
        values.append(
            {
                "index": index,
                "chosen": chosen,
                "dense": dense,
                "format": _kind(layer, row),
                "measured": None if found is None else 1e3 * found,
                "label": label + (f", measured {1e3 * found:.3f} ms" if found else ""),
            }
        )
    if not values:
        return None
    dense_times = sorted(value["dense"] for value in values)
    wide = dense_times[-1] > _WIDE_RANGE * dense_times[len(dense_times) // 2]
    return charts.layer_times(values, colours, log=wide)


def _bytes(
    manifest: Mapping[str, Any], rows: Sequence[LayerRow], colours: Mapping[str, str]
) -> charts.Plot | None:
    parts: dict[str, int] = {}
    for layer, row in _layers(manifest, rows):
        kind = _kind(layer, row)
        parts[kind] = parts.get(kind, 0) + layer["bytes"]
    parts["tables"] = max(0, manifest["totals"]["weight_bytes"] - sum(parts.values()))
    found = {part: size for part, size in parts.items() if size}
    if not found:
        return None
    return charts.shares(
        [
            {"part": part, "value": size, "label": f"{part}: {human_bytes(size)}"}
            for part, size in found.items()
        ],
        {part: colours.get(part, charts.OTHER) for part in found},
    )


def _parts(bench: Mapping[str, Any] | None) -> charts.Plot | None:
    if bench is None or bench["profile"] is None:
        return None
    groups = [group for group in bench["profile"]["groups"] if group["seconds"]]
    return charts.shares(
        [
            {
                "part": group["group"],
                "value": group["seconds"],
                "label": f"{group['group']}: {1e3 * group['seconds']:.3f} ms, "
                f"{human_percent(group['share'])}",
            }
            for group in groups
        ],
        charts.group_colours([group["group"] for group in groups]),
    )


def _roofline(bench: Mapping[str, Any] | None) -> charts.Plot | None:
    if bench is None or bench["profile"] is None:
        return None
    kernels = [
        {
            "bound": 1e3 * kernel["bound"],
            "measured": 1e3 * kernel["seconds"],
            "group": kernel["group"],
            "label": f"{printable(kernel['layer'] or kernel['function'])}: "
            f"{1e3 * kernel['seconds']:.3f} ms, "
            f"{human_percent(kernel['bound'] / kernel['seconds'])} of the limit's speed",
        }
        for kernel in bench["profile"]["kernels"]
        if kernel["bound"] and kernel["share"] >= _VISIBLE
    ]
    groups = list(dict.fromkeys(kernel["group"] for kernel in kernels))
    return charts.roofline(kernels, charts.group_colours(groups)) if kernels else None


def _groups(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Layers that repeat together: what they have in common, and each."""
    rows = layer_rows(manifest)
    cells = [_cells(layer, row) for layer, row in _layers(manifest, rows)]
    return [
        {
            "summary": dict(zip(_COLUMNS, merged(group), strict=True)),
            "sparse": group[0][_COLUMNS.index("format")].split()[0] != "dense",
            "members": [dict(zip(_COLUMNS, row, strict=True)) for row in group],
        }
        for group in groups(cells)
    ]


def _cells(layer: Mapping[str, Any], row: LayerRow) -> tuple[str, ...]:
    faster = ""
    if "times" in layer and row.format != "dense":
        figures = layer_figures(layer)
        faster = f"{figures['dense_seconds'] / figures['seconds']:.1f}x"
    return (
        row.name,
        row.shape,
        row.sparsity,
        row.structure,
        _kind(layer, row),
        faster,
        row.reason,
        human_bytes(layer["bytes"]),
    )


def _signature(manifest: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (direction, spec["name"], spec["dtype"], f"[{', '.join(map(str, spec['shape']))}]")
        for direction in ("input", "output")
        for spec in manifest[f"{direction}s"]
    ]
