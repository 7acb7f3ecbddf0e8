"""``sparse-tvm targets``: what models can be compiled for, and what this machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sparse_tvm.backends.base import Backend, BackendTarget


def targets(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the targets, which of them run here, and what this machine has."""
    import json

    from sparse_tvm.cli.console import stdout_console

    found = _found()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(stdout_console(), found)


def _found() -> dict[str, Any]:
    from sparse_tvm.backends import backends
    from sparse_tvm.cpu import architecture, cpu_model, host_features, usable_cores
    from sparse_tvm.errors import TargetError
    from sparse_tvm.targets import TARGETS, get_target

    used = {feature for target in TARGETS.values() for feature in target.features}
    try:
        native = get_target().name
    except TargetError:  # a machine that none fits still may compile for others
        native = None
    return {
        "machine": {
            "cpu": cpu_model(),
            "architecture": architecture(),
            "cores": usable_cores(),
            "features": sorted(used & host_features()),
            "native": native,
        },
        "targets": [
            {
                **target.as_json(),
                "description": getattr(target, "description", ""),
                "aliases": list(getattr(target, "aliases", ())),
                "runs_here": backend.runs_here(target),
                "structures": _structures(backend, target),
            }
            for backend in backends().values()
            for target in backend.targets
        ],
    }


def _structures(backend: Backend, target: BackendTarget) -> dict[str, list[str]]:
    """What kernels of dense layers skip, by the precisions that the target has."""
    from sparse_tvm.operators import PRECISIONS, Dense

    found = {}
    for precision in PRECISIONS:
        layer, refusal = backend.in_precision(Dense(layer="", matrix=(64, 64)), precision, target)
        if refusal is None and (skipped := backend.structures(layer, target)):
            found[precision] = skipped
    return found


def _print(console: Any, found: dict[str, Any]) -> None:
    from sparse_tvm.cli.tables import plain_table
    from sparse_tvm.report.tables import fact_table

    machine = found["machine"]
    table = plain_table("target", "made for", "runs here", "which is in", "also called")
    for target in found["targets"]:
        native = target["name"] == machine["native"]
        runs = "native" if native else "yes" if target["runs_here"] else "no"
        aliases = ", ".join(target["aliases"])
        bits = f"{target['vector_bits']}-bit vectors" if "vector_bits" in target else ""
        made_for = " ".join(target.get("architectures", ())) or bits
        table.add_row(target["name"], made_for, runs, target["description"], aliases)
    console.print(table)
    console.print(
        fact_table(
            [
                ("This machine", f"{machine['cpu']} ({machine['architecture']})"),
                ("Cores", str(machine["cores"])),
                ("Features", " ".join(machine["features"])),
                *_pruned(found),
            ]
        )
    )


def _pruned(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What to prune for this machine, by precision; alike ones together."""
    structures: dict[str, list[str]] = {}
    for target in found["targets"]:
        if target["name"] == found["machine"]["native"]:
            for precision, skipped in target["structures"].items():
                structures.setdefault(", ".join(skipped), []).append(precision)
    return [(f"Pruned for {', '.join(names)}", skipped) for skipped, names in structures.items()]
