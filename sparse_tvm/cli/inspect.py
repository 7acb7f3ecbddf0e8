"""``sparse-tvm inspect``: what a model's weights, or a compiled artifact, look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_tvm.cli.options import AllowPickle, InputShapes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def inspect(
    path: Annotated[str, typer.Argument(metavar="MODEL", help="Any model, or a compiled .so.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the fill of every candidate block.")
    ] = False,
    input_shape: InputShapes = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Show sparsity and structure of each weight of a model, or the manifest of an artifact."""
    import json

    from sparse_tvm.frontends.input_shapes import parse_input_shapes
    from sparse_tvm.frontends.kinds import check_path

    shapes = parse_input_shapes(input_shape or ())
    check_path(path)

    from sparse_tvm.artifact import is_artifact, read_manifest
    from sparse_tvm.cli.console import stdout_console

    if is_artifact(path):  # needs nothing of what reads models
        found, show = read_manifest(path), _print_artifact
    else:
        from sparse_tvm.cli.progress import progress_on_a_terminal

        with progress_on_a_terminal() as progress:
            progress("look at the weights")
            from sparse_tvm.inspection import inspect

            found = inspect(path, input_shapes=shapes, allow_pickle=allow_pickle)
        show = _print_model
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(stdout_console(), found)


def _print_model(console: Console, found: Mapping[str, Any]) -> None:
    from sparse_tvm.report.tables import fact_table, human_count, human_percent

    totals = found["totals"]
    console.print(_weight_table(found["layers"]))
    console.print(
        fact_table(
            [
                *_signature(found),
                ("Model", f"{found['file']} ({found['kind']})"),
                ("Opset", f"{found['opset']} (IR version {found['ir_version']})"),
                ("Producer", found["producer"] or "unknown"),
                ("Layers", str(len(found["layers"]))),
                ("Parameters in layers", human_count(totals["parameters"])),
                (
                    "Non-zeros",
                    f"{human_count(totals['nonzeros'])} "
                    f"(sparsity {human_percent(totals['sparsity'])})",
                ),
                ("Other parameters", human_count(totals["other_parameters"])),
            ]
        )
    )


def _print_artifact(console: Console, found: Mapping[str, Any]) -> None:
    from rich.text import Text

    from sparse_tvm.report.content import (
        summary_facts,
        verification_facts,
        verification_title,
    )
    from sparse_tvm.report.tables import fact_table, human_bytes, layer_table

    model, target, versions = found["model"], found["target"], found["versions"]
    stored = sum(weight["nbytes"] for weight in found["weights"])
    console.print(layer_table(found, console.width))
    console.print(fact_table(_signature(found)))
    console.print()
    console.print(
        fact_table(
            [
                ("Model", model["name"]),
                ("Source", str(model["source"])),
                ("Its SHA-256", str(model["sha256"])),
                *summary_facts(found),
                ("Triple", target["triple"]),
                ("CPU features", ", ".join(target["features"])),
                ("Threads", str(found["threads"] or "any")),
                ("Stored arrays", f"{len(found['weights'])} ({human_bytes(stored)})"),
                ("Phases", _phases(found)),
                ("Format version", str(found["format_version"])),
                ("Built with", ", ".join(f"{name} {v}" for name, v in versions.items())),
            ]
        )
    )
    console.print()
    console.print(Text(verification_title(found)))
    console.print(fact_table(verification_facts(found)))
    console.print(_kernel_table(found["kernels"]))


def _phases(manifest: Mapping[str, Any]) -> str:
    phases = manifest["compile"]["phases"]
    return ", ".join(f"{phase['name']} {phase['seconds']:.1f} s" for phase in phases)


def _signature(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (label if index == 0 else "", f"{spec['name']} {spec['dtype']}{_shape(spec['shape'])}")
        for label, key in (("Inputs", "inputs"), ("Outputs", "outputs"))
        for index, spec in enumerate(found[key])
    ]


def _shape(shape: list[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _weight_table(layers: list[dict[str, Any]]) -> Table:
    from sparse_tvm.cli.tables import name_cell, plain_table, shape_cell
    from sparse_tvm.report.groups import grouped
    from sparse_tvm.report.tables import human_count, human_percent

    numbers = ("non-zeros", "sparsity")
    table = plain_table("layer", "op", "shape", *numbers, "structure", "origin", numbers=numbers)
    rows = [
        (
            layer["name"],
            layer["op"],
            shape_cell(layer["shape"]),
            human_count(layer["nnz"]),
            human_percent(layer["sparsity"]),
            layer["structure"],
            layer["origin"] or "",
        )
        for layer in layers
    ]
    for name, *cells in grouped(rows):
        table.add_row(name_cell(name), *cells)
    return table


def _kernel_table(kernels: Mapping[str, Mapping[str, Any]]) -> Table:
    from rich.text import Text

    from sparse_tvm.cli.tables import plain_table

    table = plain_table("kernel", "kind", "layers")
    for name, kernel in kernels.items():
        table.add_row(Text(name), kernel["kind"], Text(", ".join(kernel["layers"])))
    return table
