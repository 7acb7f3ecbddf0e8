"""``sparse-tvm plan``: how far to prune each layer, for a latency, a speed-up or a size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_tvm.cli.options import AllowPickle, Exclude, InputShapes, Layers, Quiet, Target
from sparse_tvm.collection import without_collection

if TYPE_CHECKING:
    from sparse_tvm.planning.document import Plan
    from sparse_tvm.planning.what_if import WhatIf

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20}
_BYTES["GiB"] = 2**30


def plan(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The model to plan for.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The plan to write: JSON."),
    ] = None,
    latency: Annotated[
        str | None, typer.Option(metavar="5ms", help="How long a run may take: 5ms, 0.2s.")
    ] = None,
    speedup: Annotated[
        str | None, typer.Option(metavar="4x", help="How many times faster than the model is.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="20MB", help="How many bytes all weights may have.")
    ] = None,
    what_if: Annotated[
        str | None,
        typer.Option(
            metavar="90%:4x1", help="Instead: how fast would it be with all layers pruned so?"
        ),
    ] = None,
    shapes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For --what-if without a model: CSV or JSON with in, out, tokens, count.",
        ),
    ] = None,
    target: Target = "native",
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="In which it will compute, as for compile; by default fp32, and fp16 on GPUs.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads that run it; by default all cores."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of an input that leaves it open.")
    ] = 128,
    structure: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STRUCTURE",
            help="One that it may choose, as for prune; by default those that `sparse-tvm "
            "targets` lists. Repeatable.",
        ),
    ] = None,
    layers: Layers = None,
    exclude: Exclude = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="What `sparse-tvm tune` measured. Repeatable."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Measure errors on these inputs: an .npz, a .txt of sentences, or a folder of "
            "images.",
        ),
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Time the model, pruned in several ways, on this machine; by default where the "
            "target's code runs here.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a .html page, or the frontier as .svg."),
    ] = None,
    input_shape: InputShapes = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
) -> None:
    """Find how far to prune each layer of MODEL; `prune --plan` then does it."""
    from sparse_tvm.cli.checks import check_target
    from sparse_tvm.errors import OptionError
    from sparse_tvm.files import check_writable
    from sparse_tvm.frontends.input_shapes import parse_input_shapes
    from sparse_tvm.frontends.kinds import check_model

    goals: dict[str, Any] = {
        "latency": _amount(latency, "--latency", _SECONDS, "5ms"),
        "speedup": _amount(speedup, "--speedup", {"x": 1.0, "": 1.0}, "4x"),
        "size": _amount(size, "--size", _BYTES, "20MB"),
    }
    given = [name for name, value in goals.items() if value is not None]
    wanted = [*given, *(["what-if"] if what_if is not None else [])]
    if len(wanted) != 1:
        raise OptionError(
            "plan takes one goal" + (f", not {' and '.join(wanted)}" if wanted else ""),
            hint="--latency 5ms, --speedup 4x, --size 20MB or --what-if 90%:4x1",
        )
    if (model is None) == (shapes is None):
        raise OptionError("plan takes either a MODEL or --shapes FILE")
    if what_if is None and model is None:
        raise OptionError(
            "a table of shapes has no weights to plan for", hint="give --what-if 90%:4x1"
        )
    if what_if is None and output is None:
        raise OptionError("plan needs a file to write", hint="give -o plan.json")
    check_target(target)
    common: dict[str, Any] = {
        "target": target,
        "precision": precision,
        "tokens": tokens,
        "threads": threads,
        "input_shapes": parse_input_shapes(input_shape or ()),
        "layers": layers,
        "exclude": exclude,
        "records": records or (),
        "measure": measure,
        "allow_pickle": allow_pickle,
    }
    if model is not None:
        check_model(model)
    if output is not None:
        check_writable(output)
    if what_if is not None:
        _what_if(model, shapes, what_if, common, quiet=quiet)
        return
    assert model is not None
    assert output is not None
    if report is not None:
        from sparse_tvm.planning.report import check_plan_report

        check_plan_report(report)

    from sparse_tvm.cli.console import stderr_console, stdout_console
    from sparse_tvm.cli.progress import PhaseProgress

    with without_collection(), PhaseProgress(stderr_console(), quiet=quiet) as progress:
        progress("load the compiler")
        from sparse_tvm.planning.document import write_plan
        from sparse_tvm.planning.planner import plan

        found = plan(
            model,
            structures=structure,
            calibrate=calibrate,
            progress=progress,
            **goals,
            **common,
        )
        write_plan(found, output)
        if report is not None:
            from sparse_tvm.planning.report import write_plan_report

            write_plan_report(found, report)
    if not quiet:
        _print_plan(stdout_console(), found, model, output, precision)


def _what_if(
    model: str | None, shapes: Path | None, text: str, common: dict[str, Any], *, quiet: bool
) -> None:
    from sparse_tvm.cli.console import stderr_console, stdout_console
    from sparse_tvm.cli.progress import PhaseProgress
    from sparse_tvm.planning.settings import Setting

    setting = Setting.parse(text)
    with without_collection(), PhaseProgress(stderr_console(), quiet=quiet) as progress:
        progress("load the compiler")
        from sparse_tvm.planning.what_if import read_shapes, what_if

        subject = model if shapes is None else read_shapes(shapes)
        found = what_if(subject, setting, progress=progress, **common)
    _print_what_if(stdout_console(), found)


def _print_plan(console: Any, plan: Plan, model: str, output: Path, precision: str | None) -> None:
    import shlex

    from rich.text import Text

    from sparse_tvm.cli.tables import name_cell, plain_table
    from sparse_tvm.planning.report import COLUMNS, doubt, facts, frontier_rows, rows
    from sparse_tvm.report.groups import grouped
    from sparse_tvm.report.tables import fact_table

    table = plain_table(*COLUMNS, numbers=("sparsity", "faster", "error"))
    for name, *cells in grouped(rows(plan)):
        table.add_row(name_cell(name), *cells)
    cost = "size" if plan.goal == "size" else "latency"
    frontier = plain_table(cost, "least error", numbers=("least error",))
    for row in frontier_rows(plan):
        frontier.add_row(*row)
    console.print(table)
    console.print(frontier)
    console.print(fact_table(facts(plan)))
    if why := doubt(plan):
        console.print(Text.assemble(("warning: ", "bold yellow"), why), soft_wrap=True)
    console.print(Text.assemble("wrote ", (str(output), "bold")), soft_wrap=True)
    command = f"sparse-tvm prune {shlex.quote(model)} -o pruned.onnx --plan {output}"
    console.print(Text(f"next: {command}"), soft_wrap=True)
    if precision is not None:
        command = f"sparse-tvm compile pruned.onnx -o model.so --precision {precision}"
        console.print(Text(f"then: {command}"), soft_wrap=True)


def _print_what_if(console: Any, found: WhatIf) -> None:
    from sparse_tvm.cli.tables import name_cell, plain_table, shape_cell
    from sparse_tvm.planning.report import milliseconds
    from sparse_tvm.report.content import human_threads
    from sparse_tvm.report.tables import fact_table, human_bytes

    numbers = ("layers", "as it is", "pruned", "faster")
    table = plain_table("first layer", "shape", *numbers, "stored as", numbers=numbers)
    for row in found.rows:
        table.add_row(
            name_cell(row.name),
            shape_cell(row.shape),
            str(row.count),
            milliseconds(row.dense_seconds),
            milliseconds(row.seconds),
            f"{row.dense_seconds / row.seconds:.2f}x",
            row.format,
        )
    console.print(table)
    whole = "a run" if found.rest_seconds is not None else "the layers"
    faster = found.dense_seconds / found.seconds
    facts = [("What if", f"{found.setting} in all layers")]
    if found.rest_seconds is not None:
        facts.append(("Not pruned", milliseconds(found.rest_seconds)))
    facts += [
        ("As it is", f"{milliseconds(found.dense_seconds)} for {whole}"),
        ("Pruned", f"{milliseconds(found.seconds)} for {whole} ({faster:.2f}x)"),
        (
            "Weights",
            f"{human_bytes(round(found.nbytes))}, as they are "
            f"{human_bytes(round(found.dense_bytes))}",
        ),
        ("Times", f"{found.basis}, {human_threads(found.threads)}"),
    ]
    console.print(fact_table(facts))


def _amount(text: str | None, option: str, units: dict[str, float], such_as: str) -> float | None:
    """A number with a unit."""
    from sparse_tvm.errors import OptionError

    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2] not in units or not float(found[1]):
        raise OptionError(
            f"{option} {text!r} is not a positive number with a unit",
            hint=f"such as {option} {such_as}",
        )
    return float(found[1]) * units[found[2]]
