"""Having candidates timed on another machine, by ssh: they are built here, and run there."""

from __future__ import annotations

import base64
import errno
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from sparse_tvm import __version__
from sparse_tvm.errors import OptionError
from sparse_tvm.tuning.job import Job, Machine, ScheduleJob
from sparse_tvm.tuning.measuring import LIMIT_S, Measurer
from sparse_tvm.tuning.runner import BOOT, bundle


class RemoteMeasurer(Measurer):
    """A runner on another machine, reached by ssh, and a worker here that builds for it.

    Parameters
    ----------
    host : str
        As ssh takes it: ``user@board``.
    python : str
        The interpreter there, which has NumPy and apache-tvm.
    """

    _LOST = 255
    """ssh's own exit code."""

    _KILLED = 128
    """To which a shell adds the number of the signal that killed its command."""

    def __init__(self, host: str, python: str = "python3", limit: float = LIMIT_S) -> None:
        runner = f"{shlex.quote(python)} -c {shlex.quote(BOOT)}; exit $?"
        options = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=10")
        super().__init__(["ssh", *options, "--", host, runner], limit)
        self._host, self._builder = host, Measurer(limit=limit)
        self._directory = tempfile.TemporaryDirectory(prefix="sparse-tvm-tune-")
        self._built: dict[str, Mapping[str, Any]] = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._builder.__exit__(kind, error, trace)
        self._directory.cleanup()
        super().__exit__(kind, error, trace)

    @property
    def name(self) -> str:
        """What the machine is called where candidates run."""
        return self._host

    def machine(self) -> Machine:
        """Where candidates run; the versions are those of what builds them.

        Raises
        ------
        OptionError
            When it cannot be reached, or lacks what a runner needs.
        """
        answer = self._ask(self._running(), {})
        ours = metadata.version("apache-tvm")
        if "failure" in answer:
            raise OptionError(
                f"{self._host}: no runner starts there: {answer['failure']}",
                hint="ssh has to work without a password, and the interpreter that --python names "
                f"to have NumPy and TVM's runtime: pip install numpy apache-tvm=={ours}",
            )
        if answer["tvm"] != ours:
            raise OptionError(
                f"{self._host} has TVM {answer['tvm']}, which does not run what {ours} builds",
                hint=f"there: pip install apache-tvm=={ours}",
            )
        return cast("Machine", {**answer, "sparse_tvm": __version__})

    def __call__(self, job: Job, matrix: np.ndarray) -> dict[str, Any]:
        """Measure a candidate for a layer with this weight ``[N, K]``."""
        calls = [call for call in (job["beside"], job["call"]) if call is not None]
        return self._measure([{**job, "call": call, "beside": None} for call in calls], job, matrix)

    def schedule(self, job: ScheduleJob) -> dict[str, Any]:
        """List the schedules of an operator without a kernel, or measure one."""
        if job["schedule"] is None:
            return self._builder.schedule(job)
        names = [name for name in (job["beside"], job["schedule"]) if name is not None]
        jobs: list[ScheduleJob]
        jobs = [{**job, "schedule": name, "beside": None} for name in (job["expected"], *names)]
        return self._measure(jobs, job, None)

    def _measure(
        self, sides: list[Any], job: Job | ScheduleJob, matrix: np.ndarray | None
    ) -> dict[str, Any]:
        """Build what is not built, send what is not sent, and have it timed.

        Of the sides of a schedule the first is what the others' results are to be.
        """
        described = []
        for side in sides:
            key = sha256(json.dumps(side, sort_keys=True).encode()).hexdigest()[:16]
            if key not in self._built:
                path = Path(self._directory.name, f"{key}.so")
                self._built[key] = self._builder.ship(side, matrix, path)
            answer = self._built[key]
            if "failure" in answer:
                return dict(answer)
            described.append({"key": key, **answer})
        expected = described.pop(0) if "function" in job else None
        kept = [one["key"] for one in (expected, *described[:-1]) if one is not None]
        passing = described[-1]["key"] if described[-1]["key"] not in kept else None
        forget = [passing] if passing is not None and len(described) > 1 else []
        run = {
            "sides": described,
            "expected": expected,
            "forget": forget,
            **{name: job[name] for name in ("tokens", "threads", "copies", "seconds")},
        }
        keys = dict.fromkeys([*kept, described[-1]["key"]])
        answer = self._ask(self._running(), *self._loads(keys), run)
        if "failure" in answer:
            self._sent -= keys.keys()
            self._check_room(answer["failure"])
        for key in forget:
            self._forget(key)
        return answer

    def _loads(self, keys: Mapping[str, None]) -> Iterator[Mapping[str, Any]]:
        """Messages with the libraries that the runner has not had."""
        for key in keys:
            if key in self._sent:
                continue
            self._sent.add(key)
            library = Path(self._directory.name, f"{key}.so")
            files = {"library": library, "weight": library.with_suffix(".npz")}
            found = {name: base64.b64encode(path.read_bytes()) for name, path in files.items()}
            yield {"load": key, **{name: text.decode() for name, text in found.items()}}

    def _check_room(self, failure: str) -> None:
        """Refuse to go on where no candidate could be measured any more."""
        if os.strerror(errno.ENOSPC) in failure:
            raise OptionError(
                f"{self._host}: no space is left for what is sent there: {failure}",
                hint="make room, or set TMPDIR there to a larger file system",
            )

    def _forget(self, key: str) -> None:
        self._sent.discard(key)
        self._built.pop(key, None)
        for suffix in (".so", ".npz"):
            Path(self._directory.name, key + suffix).unlink(missing_ok=True)

    def _running(self) -> subprocess.Popen[bytes]:
        fresh = self._process is None
        process = super()._running()
        if fresh:
            assert process.stdin is not None
            files = bundle()
            with suppress(BrokenPipeError):  # the next message meets it too
                process.stdin.write(f"{len(files)}\n".encode() + files)
                process.stdin.flush()
        return process

    def _how(self, code: int, words: str) -> str:
        if code == self._LOST:
            raise OptionError(
                f"{self._host}: the connection is lost{words}",
                hint="what was measured is kept; the same command goes on from there",
            )
        return super()._how(self._KILLED - code if code > self._KILLED else code, words)
