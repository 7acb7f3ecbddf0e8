"""``sparse-tvm tune``: measure which layouts are fastest on this machine."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_tvm.cli.options import AllowPickle, InputShapes, Quiet
from sparse_tvm.collection import without_collection

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sparse_tvm.tuning.kernel import Kernel
    from sparse_tvm.tuning.rest import ScheduleTrial
    from sparse_tvm.tuning.rest_operator import RestOperator
    from sparse_tvm.tuning.throttling import Notice
    from sparse_tvm.tuning.tuner import Trial, Tuned

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def tune(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="The model to tune.")] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where to keep what is measured; what is there already is not measured again.",
        ),
    ] = Path("records.jsonl"),
    target: Annotated[
        str, typer.Option(metavar="NAME", help="native, or another that this machine runs.")
    ] = "native",
    trials: Annotated[
        int, typer.Option(min=1, metavar="N", help="Candidates of a kernel, at most.")
    ] = 16,
    time_limit: Annotated[
        str | None, typer.Option("--time", metavar="10m", help="When to stop: 90s, 10m, 1h.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Tune the layers whose name matches.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", help="Numbers of tokens, where the model's inputs leave them open."
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Numbers of threads; 1 and all cores by default."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="As for compile: fp32, bf16 or int8.")
    ] = None,
    operators: Annotated[
        bool,
        typer.Option(help="Tune attention, and operators without a kernel of ours, too."),
    ] = True,
    fit: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Instead: fit the target's cost parameters to these records. Repeatable.",
        ),
    ] = None,
    input_shape: InputShapes = None,
    allow_pickle: AllowPickle = False,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="USER@BOARD", help="Measure there, by ssh; it needs NumPy and apache-tvm."
        ),
    ] = None,
    python: Annotated[
        str, typer.Option(metavar="PATH", help="The interpreter on --host.")
    ] = "python3",
    ignore_throttling: Annotated[
        bool,
        typer.Option("--ignore-throttling", help="Go on where the machine is hot or slowed down."),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Measure MODEL's kernels in several layouts; `compile --records` takes the fastest."""
    from sparse_tvm.errors import OptionError

    if (model is None) == (not fit):
        raise OptionError("tune takes either a MODEL or --fit FILE")
    if fit:
        _fit(fit)
        return
    assert model is not None

    from sparse_tvm.cli.checks import check_target
    from sparse_tvm.files import check_writable
    from sparse_tvm.frontends.input_shapes import parse_input_shapes
    from sparse_tvm.frontends.kinds import check_model

    check_target(target)
    seconds = _seconds(time_limit) if time_limit is not None else None
    counts, cores = _numbers(tokens, "--tokens"), _numbers(threads, "--threads")
    input_shapes = parse_input_shapes(input_shape or ())
    check_model(model)
    check_writable(output)

    from sparse_tvm.cli.console import stderr_console, stdout_console

    console = stderr_console()
    show = _Progress(console, quiet=quiet)
    with without_collection():
        from sparse_tvm.tuning.measuring import Measurer
        from sparse_tvm.tuning.remote import RemoteMeasurer
        from sparse_tvm.tuning.tuner import tune

        try:
            tuned = tune(
                model,
                output,
                target=target,
                trials=trials,
                seconds=seconds,
                layers=layer,
                tokens=counts,
                threads=cores,
                precision=precision,
                input_shapes=input_shapes,
                allow_pickle=allow_pickle,
                measurer=RemoteMeasurer(host, python) if host is not None else Measurer(),
                progress=show,
                operators=operators,
                ignore_throttling=ignore_throttling,
            )
        except KeyboardInterrupt:
            if not quiet:
                again = "the same command goes on from there"
                console.print(f"interrupted: {show.count} candidates are in {output}; {again}")
            raise
    if not quiet:
        _print_summary(stdout_console(), tuned, output)


def _fit(paths: list[Path]) -> None:
    """Print fitted parameters, and how much better they predict."""
    from rich.text import Text

    from sparse_tvm.cli.console import stderr_console, stdout_console
    from sparse_tvm.cli.tables import plain_table
    from sparse_tvm.tuning.fitting import as_table, fit
    from sparse_tvm.tuning.records import read_records

    records = read_records(paths)
    for remark in records.remarks:
        stderr_console().print(Text.assemble(("note: ", "dim"), remark), soft_wrap=True)
    console = stdout_console()
    for found in fit(records):
        title = f"{found.target} on {found.cpu}: {found.count} records"
        table = plain_table("", "before", "after", numbers=("before", "after"))
        for name, (before, after) in as_table(found).items():
            table.add_row(name, f"{before:.1%}", f"{after:.1%}")
        console.print(Text(title), table, Text(found.entry()), sep="\n")


class _Progress:
    """A line for each candidate: what it took, the best so far, and what is left."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._started, self.count = time.perf_counter(), 0

    def __call__(self, trial: Trial | ScheduleTrial | Notice) -> None:
        from rich.text import Text

        from sparse_tvm.tuning.rest import ScheduleTrial
        from sparse_tvm.tuning.schedule_records import kind
        from sparse_tvm.tuning.throttling import Notice

        self.count += not isinstance(trial, Notice)
        if self._quiet:
            return
        elapsed = (f"{time.perf_counter() - self._started:6.0f} s  ", "dim")
        if isinstance(trial, Notice):
            self._console.print(Text.assemble(elapsed, f"note: {trial.text}"), soft_wrap=True)
            return
        if isinstance(trial, ScheduleTrial):
            what, best = f"{trial.operator.title}: {kind(trial.schedule)}", _best_of(trial.operator)
        else:
            what = f"{trial.kernel.layer.title}: {layout_name(trial.layout)}"
            best = _best(trial.kernel)
        first = trial.records[0]
        took = f"failed: {first.failure}"
        if first.seconds is not None:
            took = _microseconds(first.seconds)
        line = Text.assemble(
            elapsed,
            f"{what} {took}",
            (f"; best {best}; at most {trial.left} left", "dim"),
        )
        self._console.print(line, soft_wrap=True)


def layout_name(layout: object) -> str:
    """A layout as in ``csr parts=2`` or ``bsr 4x1``."""
    from sparse_tvm.operators import Layout

    assert isinstance(layout, Layout)
    block = "x".join(map(str, layout.block))
    words = [layout.format, *([block] if layout.format != "csr" else [])]
    words += [f"{name}={value}" for name, value in layout.parameters]
    if layout.family not in ("matmul", "convolution"):
        words.insert(0, layout.family)
    return " ".join(words)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us"


def _best(kernel: Kernel) -> str:
    if kernel.best is None:
        return "none"
    usual = next(iter(kernel.measured[kernel.best].values()))
    return f"{layout_name(kernel.best)} {_microseconds(usual)}"


def _best_of(operator: RestOperator) -> str:
    from sparse_tvm.tuning.schedule_records import kind

    best = operator.best
    seconds = operator.seconds(best) if best is not None else None
    return f"{kind(str(best))} {_microseconds(seconds[0])}" if seconds is not None else "none"


def _operators_table(operators: Sequence[RestOperator]) -> Table:
    from rich.text import Text

    from sparse_tvm.cli.tables import plain_table
    from sparse_tvm.tuning.schedule_records import kind

    table = plain_table(
        "operator", "calls", "tried", "best", "gain", numbers=("calls", "tried", "gain")
    )
    for one in operators:
        gain = one.gain()
        table.add_row(
            Text(one.title),
            str(one.calls),
            str(len(one.records)),
            kind(one.best) if one.best is not None else "none",
            f"{gain:.2f}x" if gain is not None else "",
        )
    return table


def _print_summary(console: Console, tuned: Tuned, output: Path) -> None:
    from rich.text import Text

    from sparse_tvm.cli.tables import plain_table

    table = plain_table(
        "kernel", "layers", "tried", "untuned", "best", "gain", numbers=("layers", "tried", "gain")
    )
    for kernel in tuned.kernels:
        gain = kernel.gain()
        table.add_row(
            Text(kernel.layer.title),
            str(len(kernel.layer.layers)),
            f"{kernel.tried} of {len(kernel.predicted)}",
            layout_name(kernel.untuned),
            layout_name(kernel.best) if kernel.best is not None else "none",
            f"{gain:.2f}x" if gain is not None else "",
        )
    if tuned.kernels:
        console.print(table)
    if tuned.operators:
        console.print(_operators_table(tuned.operators))
    for remark in tuned.remarks:
        console.print(Text.assemble(("note: ", "dim"), remark), soft_wrap=True)
    console.print(Text.assemble("wrote ", (str(output), "bold")), soft_wrap=True)
    console.print(
        Text(f"next: sparse-tvm compile MODEL -o model.so --records {output}"), soft_wrap=True
    )


def _seconds(text: str) -> float:
    from sparse_tvm.errors import OptionError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise OptionError(f"--time {text!r} is no length of time", hint="such as 90s, 10m or 1h")
    return float(found[1]) * _UNITS[found[2]]


def _numbers(text: str | None, option: str) -> list[int] | None:
    from sparse_tvm.errors import OptionError

    if text is None:
        return None
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise OptionError(
            f"{option} {text!r} is no list of numbers", hint=f"such as {option} 1,16,128"
        ) from None
