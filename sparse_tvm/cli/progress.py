"""Progress by named phase: a spinner with the elapsed time, or plain lines in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn

from sparse_tvm.cli.console import stderr_console


class PhaseProgress:
    """A context manager to be called with the name of each phase as it starts.

    Parameters
    ----------
    console : Console
        Where to show progress. On a terminal each phase is a line with a spinner that becomes a
        tick; elsewhere each phase is one line, printed when the phase is over.
    quiet : bool
        Show nothing.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._phase: str | None = None
        self._task: TaskID | None = None
        self._started = 0.0
        self._live: Progress | None = None
        if console.is_terminal and not quiet:
            self._live = Progress(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description}", markup=False),
                TextColumn("{task.elapsed:.1f} s", style="dim", justify="right"),
                console=console,
            )

    def __enter__(self) -> PhaseProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __call__(self, phase: str) -> None:
        """End the phase that runs and start `phase`."""
        self._finish()
        self._phase = phase
        self._started = time.perf_counter()
        if self._live is not None:
            self._task = self._live.add_task(phase, total=1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish()
        if self._live is not None:
            self._live.stop()

    def _finish(self) -> None:
        if self._phase is None:
            return
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=1)
            self._live.stop_task(self._task)
        elif not self._quiet:
            seconds = time.perf_counter() - self._started
            self._console.print(f"{self._phase:<28} {seconds:7.2f} s", markup=False)
        self._phase = None


def progress_on_a_terminal() -> PhaseProgress:
    """Return progress for somebody who waits, of which a log has no use."""
    console = stderr_console()
    return PhaseProgress(console, quiet=not console.is_terminal)
