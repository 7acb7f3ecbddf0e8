"""A server in a process of its own, for tests, load tests and notebooks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

_SECONDS = 60.0


class LocalServer:
    """A running ``sparse-tvm serve`` on free ports of the loopback device.

    Parameters
    ----------
    sources : sequence of Path
        As on the command line.
    options : str
        Further options of the command.

    Attributes
    ----------
    http, grpc : int
        The ports.
    log : list[dict[str, Any]]
        The lines of its log so far.
    """

    def __init__(self, sources: Sequence[Path], *options: str) -> None:
        self.log: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-c",
                    "import sys; from sparse_tvm.cli import main; sys.exit(main())",
                ),
                *("serve", *map(str, sources), "--port", "0", "--grpc-port", "0", *options),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        listening = self.wait_for("listening")
        self.http: int = listening["http"]
        self.grpc: int = listening["grpc"]

    @property
    def url(self) -> str:
        """Where it answers HTTP."""
        return f"http://127.0.0.1:{self.http}"

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        """Return the line of the log with the `count`-th such event, as soon as it is there.

        Raises
        ------
        TimeoutError
            When the server ends without it, or takes a minute.
        """
        deadline = monotonic() + _SECONDS
        while monotonic() < deadline:
            found = [line for line in list(self.log) if line["event"] == event]
            if len(found) >= count:
                return found[count - 1]
            if not self._reader.is_alive():
                break
            sleep(0.01)
        raise TimeoutError(f"no {event!r} in the log: {self.log}")

    def terminate(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_SECONDS)

    def worker_pids(self) -> list[int]:
        """Return the ids of the worker processes."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [
            int(child)
            for child in children
            if b"sparse_tvm.serving.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except json.JSONDecodeError:
                self.log.append({"event": line.rstrip()})


@contextmanager
def serving(sources: Sequence[Path], *options: str) -> Iterator[LocalServer]:
    """Run a server that is ready, and end it without ceremony."""
    server = LocalServer(sources, *options)
    try:
        server.wait_for("ready")
        yield server
    finally:
        server.process.kill()
        server.process.wait()
