"""``sparse-tvm prune``: set the least important weights of a model to zero."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_tvm.cli.options import AllowPickle, Exclude, InputShapes, Layers

if TYPE_CHECKING:
    from rich.table import Table

    from sparse_tvm.sparsity.pruning import PruneReport


def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model to prune.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="PATH", help="The model to write, in its own kind or .onnx."
        ),
    ],
    sparsity: Annotated[
        float | None,
        typer.Option(metavar="0..1", help="Share of weights to set to zero; N:M implies it."),
    ] = None,
    structure: Annotated[
        str,
        typer.Option(
            metavar="STRUCTURE",
            help="unstructured, blocks of outputs x inputs such as 4x1, or N:M such as 2:4.",
        ),
    ] = "unstructured",
    scope: Annotated[
        str,
        typer.Option(
            metavar="SCOPE",
            help="uniform: this sparsity in every layer; global: over all layers together.",
        ),
    ] = "uniform",
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="What `sparse-tvm plan` wrote: structure and sparsity by layer."
        ),
    ] = None,
    layers: Layers = None,
    exclude: Exclude = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="magnitude; with --calibrate: wanda, or obs, where other weights make up for "
            "those that go.",
        ),
    ] = "magnitude",
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="An .npz of inputs, a .txt of sentences, or a folder of images.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="The most samples of --calibrate to use.")
    ] = 512,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="tokenizer.json for sentences; default: the model's."),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Replace the weights by random ones first: a what-if on speed."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --random-weights.")] = 0,
    input_shape: InputShapes = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Prune the weights of MODEL. Embeddings are never touched."""
    from sparse_tvm.frontends.input_shapes import parse_input_shapes
    from sparse_tvm.frontends.kinds import check_model
    from sparse_tvm.sparsity.pattern import Goal

    shapes = parse_input_shapes(input_shape or ())
    if plan is None:
        Goal.parse(structure, sparsity)
    check_model(model)

    from sparse_tvm.cli.console import stderr_console, stdout_console
    from sparse_tvm.cli.progress import PhaseProgress, progress_on_a_terminal
    from sparse_tvm.frontends.source import SourceOptions
    from sparse_tvm.report.tables import fact_table
    from sparse_tvm.sparsity.pruning import prune

    # Without data it is a matter of seconds.
    shown = PhaseProgress(stderr_console()) if calibrate else progress_on_a_terminal()
    with shown as progress:
        if calibrate is None:
            progress("prune")
        report = prune(
            model,
            output,
            options=SourceOptions(input_shapes=shapes, allow_pickle=allow_pickle),
            sparsity=sparsity,
            structure=structure,
            plan=plan,
            scope=scope,
            layers=layers,
            exclude=exclude,
            method=method,
            calibrate=calibrate,
            samples=samples,
            tokenizer=tokenizer,
            random_weights=random_weights,
            seed=seed,
            progress=progress,
        )
    console = stdout_console()
    console.print(_layer_table(report))
    console.print(fact_table(_facts(report)))


def _layer_table(report: PruneReport) -> Table:
    from rich.text import Text

    from sparse_tvm.cli.tables import name_cell, plain_table, shape_cell
    from sparse_tvm.report.groups import grouped
    from sparse_tvm.report.tables import human_percent

    measured = any(layer.error is not None for layer in report.layers)
    numbers = ("before", "after", *(("error",) if measured else ()))
    table = plain_table("layer", "op", "shape", *numbers, "structure", numbers=numbers)
    rows = [
        (
            layer.name,
            layer.op,
            shape_cell(layer.shape),
            human_percent(layer.before),
            human_percent(layer.after),
            *((human_percent(layer.error or 0.0),) if measured else ()),
            layer.structure,
        )
        for layer in report.layers
    ]
    for name, *cells in grouped(rows):
        table.add_row(name_cell(name), *cells)
    for name, reason in report.skipped.items():
        table.add_row(name_cell(name), "", "", *("" for _ in numbers), Text(f"skipped: {reason}"))
    return table


def _facts(report: PruneReport) -> list[tuple[str, str]]:
    from sparse_tvm.report.tables import human_count, human_percent

    share = report.nonzeros / report.parameters if report.parameters else 1.0
    return [
        ("Pruned layers", str(len(report.layers))),
        ("Parameters", human_count(report.parameters)),
        ("Non-zeros", f"{human_count(report.nonzeros)} ({human_percent(share)})"),
        ("Wrote", str(report.output)),
    ]
