"""What can happen to a server, one thing at a time; each undoes itself."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import signal
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import aiohttp
import grpc
from tritonclient.grpc import service_pb2 as pb

from sparse_tvm.serving.local import LocalServer

PATH = "/v2/models/model/infer"
_KEPT_VERSIONS = 3
_LOAD_LOOKS = 300


class Events:
    """Events for one server.

    Parameters
    ----------
    root : Path
        The directory of models that it serves, with ``model/1/model.so``.
    artifacts : sequence of Path
        Two that may be served.
    """

    def __init__(
        self, server: LocalServer, root: Path, artifacts: Sequence[Path], seed: int
    ) -> None:
        self._server = server
        self._model = root / "model"
        self._artifacts = artifacts
        self._rng = random.Random(seed)
        self._newest = 1
        self.counts: Counter[str] = Counter()
        self._events: dict[str, Callable[[], Awaitable[None]]] = {
            "kill one worker": self._kill_one,
            "kill all workers": self._kill_all,
            "stop a worker for a while": self._stop_briefly,
            "stop a worker until it counts as hung": self._stop_long,
            "stop the server for a moment": self._stop_server,
            "a new version": self._new_version,
            "a version that is cut short": self._cut_version,
            "a version with flipped bits": self._flipped_version,
            "a version that is no artifact": self._nonsense_version,
            "disk full while a version is copied": self._disk_full,
            "the served file is overwritten": self._overwrite,
            "the served file is cut short and restored": self._truncate,
            "the served file is renamed over": self._swap,
            "the newest version is taken away": self._take_away,
            "disk limit": self._file_limit,
            "descriptors run out": self._descriptor_limit,
            "descriptors run out, and a worker is killed": self._descriptors_and_kill,
            "memory of a worker runs out": self._memory_limit,
            "unload and load": self._unload_and_load,
            "unload and load by clients that leave": self._leave_while_loading,
            "clients leave in the middle": self._leave,
            "clients do not finish": self._unfinished,
            "nonsense": self._nonsense,
        }
        self._bag: list[str] = []

    def next(self) -> tuple[str, Callable[[], Awaitable[None]]]:
        """Return an event; all come before one comes again."""
        if not self._bag:
            self._bag = list(self._events)
            self._rng.shuffle(self._bag)
        name = self._bag.pop()
        self.counts[name] += 1
        return name, self._events[name]

    async def clear_up(self) -> None:
        """Leave a sound version, served."""
        await self._new_version()
        for _ in range(_LOAD_LOOKS):
            if await self._serves(self._newest):
                return
            await asyncio.sleep(0.1)

    async def _serves(self, version: int) -> bool:
        async with (
            aiohttp.ClientSession(self._server.url) as session,
            session.post("/v2/repository/index") as response,
        ):
            rows = await response.json()
        return any(row["version"] == str(version) and row["state"] == "READY" for row in rows)

    # Processes

    async def _kill_one(self) -> None:
        _signal(self._any_worker(), signal.SIGKILL)

    async def _kill_all(self) -> None:
        for pid in self._server.worker_pids():
            _signal(pid, signal.SIGKILL)

    async def _stop_briefly(self) -> None:
        pid = self._any_worker()
        _signal(pid, signal.SIGSTOP)
        await asyncio.sleep(self._rng.uniform(0.1, 1.5))
        _signal(pid, signal.SIGCONT)

    async def _stop_long(self) -> None:
        pid = self._any_worker()
        _signal(pid, signal.SIGSTOP)
        await asyncio.sleep(4)
        _signal(pid, signal.SIGCONT)

    async def _stop_server(self) -> None:
        _signal(self._server.process.pid, signal.SIGSTOP)
        await asyncio.sleep(self._rng.uniform(0.1, 1.0))
        _signal(self._server.process.pid, signal.SIGCONT)

    def _any_worker(self) -> int:
        pids = self._server.worker_pids()
        return self._rng.choice(pids) if pids else 0

    # Files

    async def _new_version(self) -> None:
        self._put(self._rng.choice(self._artifacts).read_bytes())
        await asyncio.sleep(self._rng.uniform(0, 2))

    async def _cut_version(self) -> None:
        data = self._rng.choice(self._artifacts).read_bytes()
        self._put(data[: self._rng.randrange(len(data))])
        await self._look_and_remove()

    async def _flipped_version(self) -> None:
        data = bytearray(self._rng.choice(self._artifacts).read_bytes())
        for _ in range(self._rng.choice([1, 1, 100])):
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
        self._put(bytes(data))
        await self._look_and_remove()

    async def _nonsense_version(self) -> None:
        self._put(self._rng.choice([b"", b"\x7fELF", self._rng.randbytes(10_000)]))
        await self._look_and_remove()

    async def _look_and_remove(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.5, 2))
        self._remove(self._newest)

    async def _disk_full(self) -> None:
        """Copy a version as a tool does whose disk is full: part of it stays there for a while."""
        data = self._rng.choice(self._artifacts).read_bytes()
        directory = self._model / str(self._newest + 1)
        directory.mkdir()
        self._newest += 1
        with (directory / "model.so").open("wb") as file:
            for start in range(0, len(data) // 2, 1 << 20):
                file.write(data[start : start + (1 << 20)])
                await asyncio.sleep(0.01)
        await asyncio.sleep(1)
        self._remove(self._newest)

    async def _overwrite(self) -> None:
        """Write another model into the file that is being served, slowly."""
        data = self._rng.choice(self._artifacts).read_bytes()
        with self._served().open("r+b") as file:
            file.truncate(0)
            for start in range(0, len(data), 1 << 20):
                file.write(data[start : start + (1 << 20)])
                file.flush()
                await asyncio.sleep(0.01)
        await asyncio.sleep(self._rng.uniform(0, 1.5))

    async def _truncate(self) -> None:
        path = self._served()
        data = path.read_bytes()
        os.truncate(path, len(data) // 2)
        await self._kill_one()
        await asyncio.sleep(self._rng.uniform(0.5, 2))
        path.write_bytes(data)

    async def _swap(self) -> None:
        path = self._served()
        temporary = path.with_name("incoming")
        shutil.copy(self._rng.choice(self._artifacts), temporary)
        temporary.replace(path)
        await self._kill_one()
        await asyncio.sleep(self._rng.uniform(0, 1.5))

    async def _take_away(self) -> None:
        self._remove(self._versions()[-1])
        await self._kill_one()

    def _put(self, data: bytes) -> None:
        """Make a new version in one step, and drop old ones."""
        self._newest += 1
        aside = self._model.parent / ".incoming"
        aside.mkdir()
        (aside / "model.so").write_bytes(data)
        aside.rename(self._model / str(self._newest))
        for version in self._versions()[:-_KEPT_VERSIONS]:
            self._remove(version)

    def _versions(self) -> list[int]:
        return sorted(int(path.name) for path in self._model.iterdir())

    def _remove(self, version: int) -> None:
        """Remove a version, unless it is the only one."""
        if self._versions() != [version]:
            shutil.rmtree(self._model / str(version))

    def _served(self) -> Path:
        return self._model / str(self._versions()[-1]) / "model.so"

    # Limits

    async def _file_limit(self) -> None:
        """Shared memory counts as files: neither can tensors be passed nor artifacts be copied."""
        pids = [self._server.process.pid, *self._server.worker_pids()]
        await self._limited(resource.RLIMIT_FSIZE, dict.fromkeys(pids, 4096))

    async def _descriptor_limit(self) -> None:
        await self._limited(resource.RLIMIT_NOFILE, {self._server.process.pid: 8})

    async def _descriptors_and_kill(self) -> None:
        await self._limited(resource.RLIMIT_NOFILE, {self._server.process.pid: 8}, self._kill_all)

    async def _memory_limit(self) -> None:
        pid = self._any_worker()
        with suppress(OSError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
            await self._limited(resource.RLIMIT_AS, {pid: pages * resource.getpagesize()})

    async def _limited(
        self,
        kind: int,
        limits: dict[int, int],
        meanwhile: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        before = {}
        for pid, limit in limits.items():
            with suppress(ProcessLookupError):
                before[pid] = resource.prlimit(pid, kind)
                resource.prlimit(pid, kind, (limit, before[pid][1]))
        if meanwhile is not None:
            await meanwhile()
        await asyncio.sleep(self._rng.uniform(0.5, 2.5))
        for pid, limit in before.items():
            with suppress(ProcessLookupError):
                resource.prlimit(pid, kind, limit)
        if kind == resource.RLIMIT_FSIZE:  # workers that were started meanwhile inherited it
            for pid in self._server.worker_pids():
                with suppress(ProcessLookupError):
                    resource.prlimit(pid, kind, before[self._server.process.pid])

    # Clients

    async def _unload_and_load(self) -> None:
        for verb in ("unload", "load"):
            await self._control(verb, 30)

    async def _leave_while_loading(self) -> None:
        for verb in ("unload", "load"):
            await self._control(verb, self._rng.uniform(0.001, 0.3))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._server.grpc}") as channel:
            for method in ("RepositoryModelUnload", "RepositoryModelLoad"):
                call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
                message = pb.RepositoryModelLoadRequest(model_name="model").SerializeToString()
                with suppress(grpc.aio.AioRpcError):
                    await call(message, timeout=self._rng.uniform(0.001, 0.3))
        await self._control("load", 30)

    async def _control(self, verb: str, seconds: float) -> None:
        timeout = aiohttp.ClientTimeout(total=seconds)
        with suppress(asyncio.TimeoutError, aiohttp.ClientError):
            async with (
                aiohttp.ClientSession(self._server.url, timeout=timeout) as session,
                session.post(f"/v2/repository/models/model/{verb}") as response,
            ):
                await response.read()

    async def _leave(self) -> None:
        body = b'{"inputs": [' + b" " * 100_000
        for _ in range(50):
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._server.http)
                writer.write(f"POST {PATH} HTTP/1.1\r\ncontent-length: 200000\r\n\r\n".encode())
                writer.write(body[: self._rng.randrange(len(body))])
                await asyncio.sleep(0.005)
                writer.transport.abort()

    async def _unfinished(self) -> None:
        held: list[socket.socket] = []
        for _ in range(100):
            with suppress(OSError):
                client = socket.create_connection(("127.0.0.1", self._server.http), timeout=1)
                client.sendall(f"POST {PATH} HTTP/1.1\r\ncontent-length: 9\r\n\r\n{{".encode())
                held.append(client)
        await asyncio.sleep(self._rng.uniform(0.5, 2))
        for client in held:
            client.close()

    async def _nonsense(self) -> None:
        for _ in range(200):
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._server.http)
                writer.write(self._rng.randbytes(self._rng.randrange(2000)))
                await asyncio.sleep(0.002)
                writer.transport.abort()


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        if pid:
            os.kill(pid, number)
