"""One worker process, seen from the server."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tvm.serving.channel import LENGTH, create_arena, pack

_START_SECONDS = 120.0


class WorkerDied(Exception):
    """The worker process ended, or was killed, before it answered."""


class RunFailed(Exception):
    """The model refused the inputs, or failed on them; the worker lives on."""

    def __init__(self, message: str, *, invalid: bool) -> None:
        super().__init__(message)
        self.invalid = invalid


class WorkerProcess:
    """Starts a process for the model at `path`; runs one batch at a time in it.

    Parameters
    ----------
    path : Path
        The artifact (or an ONNX model, to compare with).
    threads : int
        Threads of a run.
    """

    def __init__(self, path: Path, threads: int) -> None:
        ours, theirs = socket.socketpair()
        self._inputs, self._outputs = create_arena(), create_arena()
        passed = (theirs.fileno(), self._inputs.descriptor, self._outputs.descriptor)
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "sparse_tvm.serving.worker", os.fspath(path)),
                    *map(str, passed),
                    str(threads),
                ],
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        self._writer: asyncio.StreamWriter | None = None
        self._listener: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[dict[str, Any]] | None = None
        self.died = asyncio.Event()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    async def ready(self) -> dict[str, Any]:
        """Wait until the model is loaded and warm; return its specs and the times it took.

        Raises
        ------
        RunFailed
            When the artifact cannot be loaded, with the reason.
        WorkerDied
            When the process ended without saying why.
        """
        reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
        self._answer = asyncio.get_running_loop().create_future()
        self._listener = asyncio.create_task(self._listen(reader))
        return await self._answered(_START_SECONDS)

    async def run(
        self,
        layout: Sequence[tuple[str, Sequence[int]]],
        fill: Callable[[Sequence[np.ndarray]], None],
        timeout: float,
    ) -> tuple[list[np.ndarray], float]:
        """Run one batch.

        Parameters
        ----------
        layout : sequence of (dtype, shape)
            One per input, in the model's order.
        fill : callable
            Writes the inputs into the arrays it gets, which are shared with the process.
        timeout : float
            Seconds after which the process counts as hung and is killed.

        Returns
        -------
        list[np.ndarray], float
            Outputs in the model's order, valid until the next run, and the seconds it took.

        Raises
        ------
        RunFailed, WorkerDied
            When there is no result.
        """
        if self._writer is None or self.died.is_set():
            raise WorkerDied
        fill(self._inputs.place(layout))
        self._answer = asyncio.get_running_loop().create_future()
        self._writer.write(pack({"inputs": layout}))
        answer = await self._answered(timeout)
        return self._outputs.read(answer["outputs"]), answer["seconds"]

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    async def close(self) -> int:
        """Let the process end, by force if it must be, and return its exit status."""
        if self._writer is not None:
            self._writer.close()
        else:
            self._socket.close()
        if self._listener is not None:
            self._listener.cancel()
        try:
            return await asyncio.to_thread(self._process.wait, 2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return await asyncio.to_thread(self._process.wait)
        finally:
            os.close(self._inputs.descriptor)
            os.close(self._outputs.descriptor)

    async def _answered(self, timeout: float) -> dict[str, Any]:
        assert self._answer is not None
        end = asyncio.get_running_loop().call_later(timeout, self.kill)
        try:
            answer = await self._answer
        finally:
            end.cancel()
        if "error" in answer:
            raise RunFailed(answer["error"], invalid=answer.get("invalid", True))
        return answer

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                length = LENGTH.unpack(await reader.readexactly(LENGTH.size))[0]
                message = json.loads(await reader.readexactly(length))
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(message)
        except (asyncio.IncompleteReadError, OSError):
            self.died.set()
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(WorkerDied())
                self._answer.exception()  # nobody may be waiting
