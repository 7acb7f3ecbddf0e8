"""Hurt a server under load in every way that a machine can, and check that it keeps its word.

Workers are killed and stopped, files are swapped, overwritten, cut short and damaged, disk,
descriptors and memory run out, clients leave, stall and send nonsense. Meanwhile:

- every answer is the right one, of one version, or an error that docs/serving.md has;
- ten seconds after each event the server is ready and answers;
- at the end there are as many processes, threads, descriptors and as much memory as before.

Everything is on the loopback device and ends by itself.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Annotated

import aiohttp
import typer
from chaos_events import Events
from chaos_load import Load, Truth
from rich.console import Console

from sparse_tvm.cli.console import stdout_console
from sparse_tvm.serving.local import LocalServer, serving
from sparse_tvm.serving.metrics import proportional_bytes

READY_SECONDS = 10.0
_MORE_MEMORY, _MORE_THREADS, _MORE_DESCRIPTORS = 1.2, 4, 8
_OPTIONS = ("--workers", "2", "--threads", "1", "--timeout", "3", "--poll", "0.3")


def main(
    first: Annotated[Path, typer.Argument(help="model.so")],
    second: Annotated[Path, typer.Argument(help="The same model with other weights.")],
    seconds: Annotated[float, typer.Option(help="How long.")] = 600.0,
    clients: Annotated[int, typer.Option(help="Connections under load.")] = 6,
    seed: Annotated[int, typer.Option(help="Of events and requests.")] = 0,
    longest: Annotated[int, typer.Option(help="Tokens of the longest request.")] = 64,
) -> None:
    """Print a report, and fail if anything was not as it should be."""
    console = stdout_console()
    truth = Truth((first, second), longest, seed)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "model" / "1").mkdir(parents=True)
        shutil.copy(first, root / "model" / "1" / "model.so")
        with serving([root], *_OPTIONS) as server:
            run = Run(server, truth, Events(server, root, (first, second), seed), seed)
            asyncio.run(run.go(seconds, clients))
    sys.exit(run.report(console))


class Resources:
    """What a server and its workers occupy."""

    def __init__(self, server: LocalServer) -> None:
        pid = server.process.pid
        workers = server.worker_pids()
        self.workers = len(workers)
        self.children = len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        self.threads = _count(f"/proc/{pid}/task")
        self.descriptors = Counter(_descriptors(pid))
        self.memory = sum(proportional_bytes(process) or 0 for process in (pid, *workers))

    def __str__(self) -> str:
        return (
            f"{self.children} processes, {self.threads} threads, "
            f"{self.descriptors.total()} descriptors {dict(self.descriptors)}, "
            f"{self.memory / 2**20:.0f} MiB"
        )

    def leaks(self, before: Resources) -> list[str]:
        """Return what has become more."""
        found = []
        if (self.children, self.workers) != (before.children, before.workers):
            found.append("processes")
        if self.threads > before.threads + _MORE_THREADS:
            found.append("threads")
        if self.descriptors.total() > before.descriptors.total() + _MORE_DESCRIPTORS:
            found.append("descriptors")
        if self.memory > _MORE_MEMORY * before.memory:
            found.append("memory")
        return found


def _descriptors(pid: int) -> Iterator[str]:
    """Give the kind of every open file of a process."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            yield str(link.readlink()).partition(" ")[0].partition("[")[0]


def _count(directory: str) -> int:
    return sum(1 for _ in Path(directory).iterdir())


class Run:
    """One run: load, events, and what came of both."""

    def __init__(self, server: LocalServer, truth: Truth, events: Events, seed: int) -> None:
        self._server = server
        self._events = events
        self._rng = random.Random(seed)
        self.load = Load(server, truth, seed)
        self.recoveries: list[tuple[float, str]] = []
        self.late: list[str] = []
        self.before: Resources | None = None
        self.after: Resources | None = None

    async def go(self, seconds: float, clients: int) -> None:
        """Let events happen under load, then see what is left."""
        async with self.load.running(clients):
            await asyncio.sleep(2)
            self.before = Resources(self._server)
            ending = monotonic() + seconds
            while monotonic() < ending:
                name, event = self._events.next()
                await self._survive(name, event)
            await self._events.clear_up()
            await self._survive("the end", _nothing)
        ending = monotonic() + READY_SECONDS  # in which retired versions end
        while (left := Resources(self._server)).leaks(self.before) and monotonic() < ending:
            await asyncio.sleep(0.5)
        self.after = left

    async def _survive(self, name: str, event: Callable[[], Awaitable[None]]) -> None:
        self.load.event = name
        await event()
        self.load.event = ""
        started = monotonic()
        while not await self._is_well():
            if monotonic() - started > READY_SECONDS:
                self.late.append(name)
                break
            await asyncio.sleep(0.05)
        self.recoveries.append((monotonic() - started, name))
        await asyncio.sleep(self._rng.uniform(0.1, 1.0))

    async def _is_well(self) -> bool:
        """Whether the server says that it is ready, and answers a request rightly."""
        timeout = aiohttp.ClientTimeout(total=2)
        try:
            async with aiohttp.ClientSession(self._server.url, timeout=timeout) as session:
                async with session.get("/v2/health/ready") as response:
                    if response.status != 200:
                        return False
                return await self.load.post(session) == "200"
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False

    def report(self, console: Console) -> int:
        """Print everything and return the exit code."""
        assert self.before is not None
        assert self.after is not None
        slowest = sorted(self.recoveries, reverse=True)[:5]
        leaks = self.after.leaks(self.before)
        died = sum(line["event"] == "worker died" for line in self._server.log)
        tracebacks = [line for line in self._server.log if "traceback" in line]
        plain = [line for line in self._server.log if set(line) == {"event"}]
        for line in (
            f"events: {dict(self._events.counts)}",
            f"answers: {dict(self.load.outcomes)}",
            f"wrong: {len(self.load.wrong)}, undocumented: {len(self.load.undocumented)}",
            *(f"  {what}" for what in [*self.load.wrong, *self.load.undocumented][:20]),
            "slowest recoveries: "
            + ", ".join(f"{seconds:.1f} s after {name}" for seconds, name in slowest),
            f"not ready within {READY_SECONDS:g} s: {self.late or 'never'}",
            f"{died} workers died; tracebacks: {len(tracebacks)}; lines not JSON: {len(plain)}",
            *(f"  {line}" for line in [*tracebacks, *plain][:10]),
            f"before: {self.before}",
            f"after:  {self.after}; leaks: {', '.join(leaks) or 'none'}",
        ):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        bad = self.load.wrong or self.load.undocumented or self.late or leaks or tracebacks
        return int(bool(bad))


async def _nothing() -> None:
    pass


if __name__ == "__main__":
    typer.run(main)
