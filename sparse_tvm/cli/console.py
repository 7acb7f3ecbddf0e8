"""Consoles shared by all verbs: results go to stdout, progress and errors to stderr."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from sparse_tvm.printable import printable

PLAIN_WIDTH = 120
"""Columns used where the output is a file or a pipe, which have no width of their own."""


def stdout_console() -> Console:
    """Return a console on stdout, for results."""
    return _console(stderr=False)


def stderr_console() -> Console:
    """Return a console on stderr, for progress, warnings and errors."""
    return _console(stderr=True)


class _SafeConsole(Console):
    """A console on which names from files and models are text, whatever is in them."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def _console(*, stderr: bool) -> Console:
    console = _SafeConsole(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console
