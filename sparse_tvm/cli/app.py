"""The frame of the command line: verbs, global options, and what every error looks like."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from sparse_tvm.cli.bench import bench
from sparse_tvm.cli.compile import compile
from sparse_tvm.cli.doctor import doctor
from sparse_tvm.cli.examples import epilog
from sparse_tvm.cli.inspect import inspect
from sparse_tvm.cli.plan import plan
from sparse_tvm.cli.prune import prune
from sparse_tvm.cli.run import run
from sparse_tvm.cli.serve import serve
from sparse_tvm.cli.targets import targets
from sparse_tvm.cli.tune import tune
from sparse_tvm.cli.verify import verify
from sparse_tvm.errors import OutputError, SparseTvmError

EXIT_BROKEN_PIPE = 1
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130

_CANNOT_WRITE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}

app = typer.Typer(
    name="sparse-tvm",
    help="Compile pruned models into one .so that runs faster because of its zeros.",
    pretty_exceptions_enable=False,
)
for verb in (compile, run, bench, serve, inspect, verify, plan, prune, tune, targets, doctor):
    app.command(epilog=epilog(verb.__name__))(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        from sparse_tvm import __version__

        typer.echo(f"sparse-tvm {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show tracebacks of errors. Also accepted after the verb."),
    ] = False,
) -> None:
    """Take the options that stand before the verb; :func:`main` has acted on ``--debug``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : Sequence[str] | None
        The arguments after the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        The exit code: 0, the error's own code, 70 for a bug in sparse-tvm, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    verb_and_options = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(verb_and_options or ["--help"], prog_name="sparse-tvm", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error)
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    """Print `error` the way users see it and return the exit code."""
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        error = _as_output_error(error)
    if isinstance(error, SparseTvmError):
        _print_error("error", error.message, error.hint)
        return error.exit_code
    if isinstance(error, typer.TyperException):
        _print_error("error", error.format_message(), _usage_hint(error))
        return error.exit_code
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("sparse_tvm"):
        from sparse_tvm.extras import LIGHT, installed_distribution

        light = installed_distribution() == LIGHT
        hint = f"install sparse-tvm in place of {LIGHT}" if light else "python -m pip check"
        _print_error("error", f"a package is missing: {error}", hint)
        return 1
    first_line = (str(error).strip().splitlines() or [""])[0]
    _print_error(
        "internal error",
        f"{type(error).__name__}: {first_line}",
        "run again with --debug and report it",
    )
    return EXIT_INTERNAL


def _as_output_error(error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    if error.filename is None:
        return OutputError(f"cannot write: {reason}")
    return OutputError(f"cannot access {os.fsdecode(error.filename)}: {reason}")


def _usage_hint(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "sparse-tvm"
    return f"see `{command} --help`"


def _print_error(label: str, message: str, hint: str | None) -> None:
    from rich.text import Text

    from sparse_tvm.cli.console import stderr_console

    console = stderr_console()
    lines = [Text.assemble((f"{label}: ", "bold red"), message.replace("\n", "\\n"))]
    if hint:
        lines.append(Text.assemble(("hint: ", "bold cyan"), hint.replace("\n", "\\n")))
    for line in lines:
        console.print(line, soft_wrap=True)


def _discard_stdout() -> None:
    """Keep the interpreter from complaining about the closed pipe when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
