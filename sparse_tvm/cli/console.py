"""Consoles shared by all verbs: results go to stdout, progress and errors to stderr."""

from __future__ import annotations

from rich.console import Console

PLAIN_WIDTH = 120
"""Columns used where the output is a file or a pipe, which have no width of their own."""


def stdout_console() -> Console:
    """Return a console on stdout, for results."""
    return _console(stderr=False)


def stderr_console() -> Console:
    """Return a console on stderr, for progress, warnings and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console
