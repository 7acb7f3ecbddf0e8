"""``sparse-tvm prune``: set the least important weights of a model to zero."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_tvm.cli.options import AllowPickle, Exclude, InputShapes, Layers

if TYPE_CHECKING:
    from rich.table import Table

    from sparse_tvm.planning.structures import StructureChoice
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
            help="unstructured, blocks of outputs x inputs such as 4x1, or N:M such as 2:4; "
            "`sparse-tvm targets` lists what kernels skip. auto: by layer the one with the least "
            "predicted time for the share of the weight's norm that it keeps.",
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
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="For structure auto: where it will run, as for compile; by default here.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="For structure auto: in which it will compute, as for compile; by default fp32, "
            "and fp16 on GPUs.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Of calibration, and of the model that auto is to make fast."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="For structure auto: tokens of an input that leaves it open (128).",
        ),
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="For structure auto: what `sparse-tvm tune` measured. Repeatable.",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="For structure auto: time the model here, pruned in several ways, rather than "
            "predict.",
        ),
    ] = False,
    permute: Annotated[
        bool,
        typer.Option(
            "--permute",
            help="For N:M: first put inputs in an order in which more of a weight stays, where the "
            "model can compute the same in it.",
        ),
    ] = False,
    input_shape: InputShapes = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Prune the weights of MODEL. Embeddings are never touched."""
    from sparse_tvm.frontends.input_shapes import parse_input_shapes
    from sparse_tvm.frontends.kinds import check_model
    from sparse_tvm.sparsity.pattern import AUTO, Goal, asked_sparsity

    shapes = parse_input_shapes(input_shape or ())
    if plan is None and structure == AUTO:
        asked_sparsity(sparsity)
    elif plan is None:
        Goal.parse(structure, sparsity)
    if target is not None:
        from sparse_tvm.cli.checks import check_target

        check_target(target)
    check_model(model)

    from sparse_tvm.cli.console import stderr_console, stdout_console
    from sparse_tvm.cli.progress import PhaseProgress, progress_on_a_terminal
    from sparse_tvm.frontends.source import SourceOptions
    from sparse_tvm.planning.document import read_plan
    from sparse_tvm.report.tables import fact_table
    from sparse_tvm.sparsity.pruning import prune

    # Otherwise it is a matter of seconds.
    slow = calibrate is not None or structure == AUTO or permute
    shown = PhaseProgress(stderr_console()) if slow else progress_on_a_terminal()
    with shown as progress:
        if not slow:
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
            threads=threads,
            target=target,
            precision=precision,
            tokens=tokens,
            records=records or (),
            measure=measure,
            permute=permute,
            progress=progress,
        )
    console = stdout_console()
    if report.structures is not None:
        console.print(_structure_table(report.structures))
    if report.reordered:
        console.print(_order_table(report))
    console.print(_layer_table(report))
    planned = [] if plan is None else [("Planned for", read_plan(plan).where)]
    console.print(fact_table([*_facts(report), *planned]))


def _structure_table(choice: StructureChoice) -> Table:
    """What was chosen for each layer, with what it gives, and what it was compared with."""
    from sparse_tvm.cli.tables import name_cell, plain_table
    from sparse_tvm.report.groups import grouped
    from sparse_tvm.report.tables import human_percent

    table = plain_table("layer", "structure", "faster", "kept", "rather than", numbers=("kept",))
    rows = []
    for layer in choice.layers:
        found = [
            (one.setting.structure, f"{one.faster:.1f}x", human_percent(one.kept))
            for one in layer.candidates
        ]
        if found:
            others = ", ".join(map(" ".join, found[1:]))
            rows.append((layer.name, *found[0], others))
    for name, *cells in grouped(rows):
        table.add_row(name_cell(name), *cells)
    return table


def _order_table(report: PruneReport) -> Table:
    """What another order of inputs keeps of each layer's magnitude, or why it has none."""
    from rich.text import Text

    from sparse_tvm.cli.tables import name_cell, plain_table
    from sparse_tvm.report.groups import grouped
    from sparse_tvm.report.tables import human_percent

    table = plain_table("layer", "kept", "reordered", "", numbers=("kept", "reordered"))
    rows = [
        (
            one.name,
            human_percent(one.before),
            human_percent(one.after) if not one.reason else "",
            one.reason,
        )
        for one in report.reordered
    ]
    for name, before, after, reason in grouped(rows):
        table.add_row(name_cell(name), before, after, Text(reason))
    return table


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
    chosen = report.structures
    return [
        *([] if chosen is None else _expected(chosen)),
        ("Pruned layers", str(len(report.layers))),
        ("Parameters", human_count(report.parameters)),
        ("Non-zeros", f"{human_count(report.nonzeros)} ({human_percent(share)})"),
        ("Wrote", str(report.output)),
    ]


def _expected(choice: StructureChoice) -> list[tuple[str, str]]:
    from sparse_tvm.planning.report import milliseconds
    from sparse_tvm.report.content import human_threads

    times = [choice.basis, f"{choice.target} in {choice.precision}"]
    times += [] if choice.threads is None else [human_threads(choice.threads)]
    return [
        (
            "Latency",
            f"{milliseconds(choice.seconds)}, as it is {milliseconds(choice.dense_seconds)} "
            f"({choice.dense_seconds / choice.seconds:.2f}x)",
        ),
        ("Times", ", ".join(times)),
    ]
