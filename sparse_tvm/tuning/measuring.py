"""Having candidates measured in another process, and outliving what they do to it."""

from __future__ import annotations

import base64
import io
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from sparse_tvm.tuning.job import Job, Machine, ScheduleJob, this_machine

WORKER = (sys.executable, "-m", "sparse_tvm.tuning.worker")

LIMIT_S = 60.0
"""How long a candidate may take, its compilation included."""


class Measurer:
    """A worker process that is started when it is needed, and again after it died.

    Parameters
    ----------
    command : Sequence[str]
        What starts a worker.
    limit : float
        Seconds that a candidate may take before it counts as one that hangs.
    """

    def __init__(self, command: Sequence[str] = WORKER, limit: float = LIMIT_S) -> None:
        self._command, self._limit = list(command), limit
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._sent: set[str] = set()

    def __enter__(self) -> Measurer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    def name(self) -> str:
        """What the machine is called where the worker runs."""
        return "this machine"

    def machine(self) -> Machine:
        """Where the worker runs."""
        return this_machine()

    def observe(self) -> dict[str, Any]:
        """How fast the clock is where candidates run: :func:`sparse_tvm.machine_state.observe`.

        Or ``failure``, a sentence.
        """
        return self._ask(self._running(), {"observe": True})

    def __call__(self, job: Job, matrix: np.ndarray) -> dict[str, Any]:
        """Measure a candidate for a layer with this weight ``[N, K]``.

        Returns
        -------
        dict[str, Any]
            ``results``, one for each condition, or ``failure``, a sentence.
        """
        return self._ask(self._running(), *self._weight(job, matrix), job)

    def schedule(self, job: ScheduleJob) -> dict[str, Any]:
        """List the schedules of an operator without a kernel, or measure one.

        Returns
        -------
        dict[str, Any]
            ``schedules``, or ``results``, one for each number of threads, or ``failure``.
        """
        return self._ask(self._running(), job)

    def ship(self, job: Job | ScheduleJob, matrix: np.ndarray | None, path: Path) -> dict[str, Any]:
        """Have a candidate built, and written to files at a path, ``.so`` and ``.npz``.

        Returns
        -------
        dict[str, Any]
            ``arguments`` that it takes, or ``failure``, a sentence.
        """
        message = {"ship": job, "path": str(path)}
        return self._ask(self._running(), *self._weight(job, matrix), message)

    def _weight(
        self, job: Mapping[str, Any], matrix: np.ndarray | None
    ) -> Iterator[Mapping[str, Any]]:
        """The message with a job's weight, if the worker has not had it."""
        if matrix is None or job["weight"] in self._sent:
            return
        buffer = io.BytesIO()
        np.save(buffer, matrix)
        self._sent.add(job["weight"])  # forgotten again if the process dies of it
        yield {"weight": job["weight"], "npy": base64.b64encode(buffer.getvalue()).decode()}

    def _ask(
        self, process: subprocess.Popen[bytes], *messages: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Send messages, and wait for the answer to the last one."""
        assert process.stdin is not None
        try:
            for message in messages:
                process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return {"failure": self._death()}
        line = self._answer(process)
        if line is None:
            self._stop()
            return {"failure": f"took longer than {self._limit:g} s"}
        if not line:
            return {"failure": self._death()}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for us: we decide when it ends
            )
        return self._process

    def _answer(self, process: subprocess.Popen[bytes]) -> bytes | None:
        """One line of the worker's; nothing if it died, None if it takes too long."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(self._limit):
                return None
        return process.stdout.readline()

    def _death(self) -> str:
        """How the worker ended, and its last words."""
        process, errors = self._process, self._errors
        assert process is not None
        assert errors is not None
        code = process.wait()
        errors.seek(0)
        words = errors.read().decode(errors="replace").strip().splitlines()
        self._stop()
        return self._how(code, f": {words[-1]}" if words else "")

    def _how(self, code: int, words: str) -> str:
        """What an exit code says, and the last words."""
        how = f"killed by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
        return how + words

    def _stop(self) -> None:
        process, self._process = self._process, None
        self._sent.clear()
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, self._errors):
            assert stream is not None
            with suppress(OSError):  # what the worker did not read is lost with it
                stream.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
