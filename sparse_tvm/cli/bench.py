"""``sparse-tvm bench``: time a compiled model, beside its own framework if wanted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_tvm.cli.options import AllowPickle, Device, HugePages
from sparse_tvm.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from sparse_tvm.benchmark import BenchResult
    from sparse_tvm.profiling import GroupTime, KernelTime


def bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL.so", help="The compiled model.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Time this model in its own framework (ONNX Runtime for ONNX), or another "
            "compiled one, interleaved.",
        ),
    ] = None,
    allow_pickle: AllowPickle = False,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="By default as compiled, else every core.")
    ] = None,
    device: Device = None,
    huge_pages: HugePages = False,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:DIMS",
            help="Shape of an input, as in input_ids:8,128, or sizes of a symbolic dimension, one "
            "after the other, as in batch=1,8,32. Repeatable.",
        ),
    ] = None,
    warmup: Annotated[
        float, typer.Option(metavar="S", help="Seconds of uncounted runs, per engine.")
    ] = 1.0,
    duration: Annotated[
        float, typer.Option(metavar="S", help="Seconds of counted runs, per engine.")
    ] = 5.0,
    profile: Annotated[bool, typer.Option("--profile", help="Time every layer.")] = False,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Report on the model and its figures: .html, .md or .json."
        ),
    ] = None,
) -> None:
    """Time MODEL.so on random inputs: latency, throughput, memory, load time."""
    from sparse_tvm.cli.checks import check_artifact
    from sparse_tvm.cli.sweep import split_sweeps, sweep_table
    from sparse_tvm.frontends.input_shapes import parse_input_shapes

    check_artifact(model)
    given, combinations = split_sweeps(shape or ())
    shapes = parse_input_shapes(given, "--shape")

    from sparse_tvm.artifact import read_manifest
    from sparse_tvm.benchmark import bench
    from sparse_tvm.cli.console import stdout_console
    from sparse_tvm.cli.progress import progress_on_a_terminal
    from sparse_tvm.files import replacing
    from sparse_tvm.report import check_report_path, write_report

    if report is not None:
        check_report_path(report)
        if len(combinations) > 1:
            raise OptionError("--report is of one size", hint="leave out the others, or --report")

    def measure() -> list[BenchResult]:
        with progress_on_a_terminal() as progress:
            return [
                bench(
                    model,
                    against,
                    allow_pickle=allow_pickle,
                    threads=threads,
                    device=device,
                    huge_pages=huge_pages,
                    warmup=warmup,
                    duration=duration,
                    shapes=shapes,
                    sizes=sizes,
                    profile=profile,
                    progress=progress,
                )
                for sizes in combinations
            ]

    if json is None:
        results = measure()
    else:
        with replacing(json) as temporary:
            temporary.touch()  # a path that cannot be written fails before the measurement
            results = measure()
            temporary.write_text(_to_json(results), encoding="utf-8")
    if report is not None:
        write_report(read_manifest(model), report, results[0].to_dict())
    for result in results if profile or len(results) == 1 else ():
        _print(stdout_console(), result)
    if len(results) > 1:
        first = results[0]
        stdout_console().print(f"{first.path}, {_where(first)}, medians")
        stdout_console().print(sweep_table(combinations, results))


def _to_json(results: Sequence[BenchResult]) -> str:
    """One result, or the list of a sweep's."""
    import json

    found = [result.to_dict() for result in results]
    return json.dumps(found if len(found) > 1 else found[0], indent=2) + "\n"


def _print(console: Console, result: BenchResult) -> None:
    from rich.text import Text

    from sparse_tvm.cli.tables import shape_cell

    console.print(f"{result.path}, {_where(result)}")
    shapes = (f"{name} {shape_cell(shape)}" for name, shape in result.shapes.items())
    console.print(Text(f"inputs: {', '.join(shapes)}"))
    console.print(_timings(result))
    for timing in filter(None, (result.model, result.reference)):
        if timing.is_noisy:
            noise = f"{timing.engine} is too noisy to tell: p90 is {timing.p90 / timing.p50:.1f}x"
            advice = "p50; stop other programs, or raise --duration"
            console.print(Text.assemble(("warning: ", "bold yellow"), noise, " ", advice))
    if result.speedup is not None and result.reference is not None:
        engine = result.reference.engine
        console.print(f"{result.speedup:.2f}x the speed of {engine} (ratio of medians)")
    for name, difference in (result.max_abs_diff or {}).items():
        console.print(f"largest difference of {name}: {difference:.2e}", markup=False)
    if result.profile is not None:
        console.print(_kernels(result.profile.kernels))
        console.print(_groups(result.profile.groups))
        if all(group.bound is None for group in result.profile.groups):
            console.print("no rooflines: this machine's limits could not be measured; to see why,")
            console.print("run python -m sparse_tvm.machine_limits native", result.threads)


def _where(result: BenchResult) -> str:
    """The machine, as far as the model uses it."""
    from sparse_tvm.report.content import human_threads

    device = f"{result.device}, " if result.device != "cpu" else ""
    return f"{device}{human_threads(result.threads)}, {result.cpu}"


def _timings(result: BenchResult) -> Table:
    from sparse_tvm.cli.tables import plain_table
    from sparse_tvm.report.tables import human_bytes

    figures = ("p50", "p90", "p99", "mean", "runs/s", "runs", "load", "memory")
    table = plain_table("engine", *figures, numbers=figures)
    for timing in filter(None, (result.model, result.reference)):
        latencies = (timing.p50, timing.p90, timing.p99, timing.mean)
        table.add_row(
            timing.engine,
            *[f"{1e3 * seconds:.3f} ms" for seconds in latencies],
            f"{timing.throughput:.1f}",
            str(timing.runs),
            f"{timing.load_seconds:.2f} s",
            human_bytes(timing.peak_memory_bytes),
        )
    return table


def _groups(groups: Sequence[GroupTime]) -> Table:
    from sparse_tvm.cli.tables import plain_table
    from sparse_tvm.report.tables import human_percent

    figures = ("per run", "share", "speed", "of roofline")
    table = plain_table("part", *figures, numbers=figures)
    for group in groups:
        table.add_row(
            group.group,
            f"{1e3 * group.seconds:.3f} ms",
            human_percent(group.share),
            _speed(group),
            _of_roofline(group),
        )
    return table


def _kernels(kernels: Sequence[KernelTime]) -> Table:
    from sparse_tvm.cli.tables import name_cell, plain_table
    from sparse_tvm.report.tables import human_percent

    figures = ("calls", "per run", "share", "speed", "of roofline")
    table = plain_table("layer", "kernel", "kind", *figures, numbers=figures)
    for kernel in kernels:
        table.add_row(
            name_cell(kernel.layer or ""),
            name_cell(kernel.function),
            kernel.kind,
            str(kernel.calls),
            f"{1e3 * kernel.seconds:.3f} ms",
            human_percent(kernel.share),
            _speed(kernel),
            _of_roofline(kernel),
        )
    return table


def _speed(part: GroupTime | KernelTime) -> str:
    return f"{part.flops / part.seconds / 1e9:.0f} GFLOP/s" if part.flops else ""


def _of_roofline(part: GroupTime | KernelTime) -> str:
    from sparse_tvm.report.tables import human_percent

    return human_percent(part.bound / part.seconds) if part.bound else ""
