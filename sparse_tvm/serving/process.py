"""One worker process, seen from the server."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from sparse_tvm.serving import logs
from sparse_tvm.serving.channel import LENGTH, NoRoom, create_arena, pack
from sparse_tvm.serving.private_copy import PrivateCopy

_START_SECONDS = 120.0
_END_SECONDS = 2.0
_LOOK_SECONDS = 0.005
_LAST_WORDS_SECONDS = 0.5
_LONGEST_TEXT = 16 << 10


class WorkerDied(Exception):
    """The worker process ended, or was killed, before it answered."""


class RunFailed(Exception):
    """The model refused the inputs, or failed on them; the worker lives on."""

    def __init__(self, message: str, *, invalid: bool) -> None:
        super().__init__(message)
        self.invalid = invalid


class WorkerProcess:
    """Starts a process for a model; runs one batch at a time in it.

    Whoever makes one must close it.

    Parameters
    ----------
    path : Path
        What errors call the model; an ONNX model, to compare with, is loaded from here.
    artifact : PrivateCopy
        The artifact.
    threads : int
        Threads of a run.
    device : str | None
        Where runs are made, as :func:`sparse_tvm.load` has it.
    huge_pages : bool
        Whether it has the weights in memory of its own, as there.
    verify : bool
        Compare all of the artifact with its checksums; once is enough for a copy.

    Raises
    ------
    OSError
        When the system has no room for another process; nothing is left behind then.
    """

    def __init__(
        self,
        path: Path,
        artifact: PrivateCopy,
        threads: int,
        device: str | None = None,
        *,
        huge_pages: bool = False,
        verify: bool,
    ) -> None:
        self.device = device
        with ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            with theirs:
                self._inputs = create_arena()
                undo.callback(self._inputs.close)
                self._outputs = create_arena()
                undo.callback(self._outputs.close)
                passed = (
                    *(artifact.descriptor, theirs.fileno()),
                    *(self._inputs.descriptor, self._outputs.descriptor),
                )
                numbers = threads, int(huge_pages), int(verify)
                command = (sys.executable, "-m", "sparse_tvm.serving.worker", os.fspath(path))
                self._process = subprocess.Popen(
                    [*command, *map(str, (*passed, *numbers)), device or ""],
                    pass_fds=passed,
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
            undo.pop_all()
        assert self._process.stderr is not None
        self._errors = self._process.stderr
        self._socket = ours
        self._writer: asyncio.StreamWriter | None = None
        self._listener: asyncio.Task[None] | None = None
        self._relay: asyncio.Task[None] | None = None
        self._answer: asyncio.Future[dict[str, Any]] | None = None
        self._closed = False
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
        self._relay = asyncio.create_task(self._log_errors())
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
        RunFailed, WorkerDied, NoRoom
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
        """Let the process end, by force if it must be, and return its exit status.

        However this ends, cancelled or called again, nothing of the process is left.
        """
        if self._closed:
            return self._process.wait()
        self._closed = True
        try:
            if self._listener is not None:
                self._listener.cancel()
            if self._writer is not None:
                self._writer.close()
            else:
                self._socket.close()
            await self._end(monotonic() + _END_SECONDS)
            if self._relay is not None:
                await asyncio.wait({self._relay}, timeout=_LAST_WORDS_SECONDS)
        finally:
            # It is dead already, but for a cancellation: then this takes the kernel's time only.
            self._process.kill()
            status = self._process.wait()
            if self._relay is not None:
                self._relay.cancel()
            else:
                self._errors.close()
            self._inputs.close()
            self._outputs.close()
        return status

    async def _log_errors(self) -> None:
        """Log what the process, or a library in it, writes to its standard error."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._errors
        )
        try:
            while text := await reader.read(_LONGEST_TEXT):
                logs.warning("worker wrote", pid=self.pid, text=text.decode(errors="replace"))
        finally:
            transport.close()

    async def _end(self, deadline: float) -> None:
        """Give the process time to end by itself; needs neither a thread nor a descriptor."""
        while self._process.poll() is None:
            if monotonic() > deadline:
                self._process.kill()
            await asyncio.sleep(_LOOK_SECONDS)

    async def _answered(self, timeout: float) -> dict[str, Any]:
        assert self._answer is not None
        end = asyncio.get_running_loop().call_later(timeout, self.kill)
        try:
            answer = await self._answer
        finally:
            end.cancel()
        if answer.get("no_room"):
            raise NoRoom(answer["error"])
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
        except Exception as error:  # its end, or nonsense from a process gone wrong
            if not isinstance(error, (asyncio.IncompleteReadError, OSError)):
                logs.exception("worker answered nonsense", error)
            self.died.set()
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(WorkerDied())
                self._answer.exception()  # nobody may be waiting
