"""What must not hurt a server: hostile requests, killed workers, signals and floods under load."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gevent")  # of the extra for tests, beyond the server's own
pytest.importorskip("uvicorn")

import aiohttp
import grpc
from hostile import hostile_json, hostile_message
from serving_fixtures import infer_body, write_encoder
from tritonclient.grpc import service_pb2 as pb

from sparse_tvm.serving.local import LocalServer, serving

IDS = np.array([[1, 2, 3, 99]])
HOSTILE = 10_000
INFER = "/v2/models/encoder/infer"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "encoder.so")


@pytest.fixture
def server(artifact: Path) -> Iterator[LocalServer]:
    with serving([artifact]) as running:
        yield running


def resident(server: LocalServer) -> int:
    """Bytes of memory of the server and its workers."""
    pids = [server.process.pid, *server.worker_pids()]
    pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return sum(pages) * os.sysconf("SC_PAGESIZE")


def sound_message() -> Any:
    request = pb.ModelInferRequest(model_name="encoder")
    for name in ("input_ids", "attention_mask"):
        tensor = request.inputs.add(name=name, datatype="INT64", shape=[1, 4])
        tensor.contents.int64_contents.extend([1, 2, 3, 4])
    return request


async def flood(count: int, send: Callable[[int], Awaitable[Any]], at_once: int = 32) -> Counter:
    """Send `count` requests, `at_once` at a time, and count what comes back."""
    answers: Counter = Counter()
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            answers[await send(number)] += 1

    await asyncio.gather(*(client() for _ in range(at_once)))
    return answers


@asynccontextmanager
async def http(server: LocalServer) -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(server.url, timeout=timeout) as session:
        yield session


async def status_of(session: aiohttp.ClientSession, body: Any = None) -> Any:
    """Return the status of a sound request, or what went wrong with the connection."""
    try:
        async with session.post(INFER, json=body or infer_body(IDS)) as response:
            await response.read()
            return response.status
    except aiohttp.ClientError as error:
        return type(error).__name__


def test_hostile_requests_are_refused_and_leave_no_trace(server: LocalServer) -> None:
    rng = random.Random(0)
    bodies = [hostile_json(rng, infer_body(IDS)) for _ in range(2 * HOSTILE // 3)]
    messages = [hostile_message(rng, sound_message()) for _ in range(HOSTILE - len(bodies))]

    async def attack(share: slice) -> tuple[Counter, Counter]:
        async with (
            http(server) as session,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc}") as channel,
        ):
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

            async def post(number: int) -> int:
                body = bodies[share][number]
                headers = {"Inference-Header-Content-Length": "7"} if number % 50 == 0 else {}
                async with session.post(INFER, data=body, headers=headers) as response:
                    await response.read()
                    return response.status

            async def rpc(number: int) -> str:
                try:
                    await call(messages[share][number])
                except grpc.aio.AioRpcError as error:
                    return error.code().name
                return "OK"

            return (
                await flood(len(bodies[share]), post),
                await flood(len(messages[share]), rpc),
            )

    pids = server.worker_pids()
    asyncio.run(attack(slice(0, 1000)))
    before = resident(server)
    by_http, by_grpc = asyncio.run(attack(slice(1000, None)))
    after = resident(server)
    assert set(by_http) <= {400}, by_http
    assert set(by_grpc) <= {"INVALID_ARGUMENT", "NOT_FOUND"}, by_grpc
    assert after - before < 8 << 20
    assert server.worker_pids() == pids
    assert asyncio.run(one(server)) == 200


async def one(server: LocalServer) -> Any:
    async with http(server) as session:
        return await status_of(session)


def talk(server: LocalServer, data: bytes, seconds: float = 5) -> bytes:
    """Send raw bytes and return the beginning of the answer."""
    with socket.create_connection(("127.0.0.1", server.http), timeout=seconds) as connection:
        connection.sendall(data)
        return connection.recv(4096)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01 not HTTP at all\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000, b"400"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000, b"400"),
        (f"POST {INFER} HTTP/1.1\r\ncontent-length: {10**12}\r\n\r\n".encode(), b"413"),
        (f"POST {INFER} HTTP/1.1\r\ncontent-length: -4\r\n\r\n".encode(), b"400"),
        (f"POST {INFER} HTTP/1.1\r\ncontent-encoding: gzip\r\n\r\n".encode(), b"415"),
        (b"GET /v2/models/../../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"DELETE /v2 HTTP/1.1\r\n\r\n", b"405"),
    ],
)
def test_wrong_http_is_refused(server: LocalServer, data: bytes, status: bytes) -> None:
    assert talk(server, data).startswith(b"HTTP/1.1 " + status)


def test_oversize_bodies_are_refused_while_they_come(artifact: Path) -> None:
    async def send() -> Any:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b" " * 65536

        async with http(server) as session:
            try:
                async with session.post(INFER, data=chunks()) as response:
                    return response.status
            except aiohttp.ClientError:
                return "closed"

    with serving([artifact], "--max-body-mb", "1") as server:
        assert asyncio.run(send()) in (413, "closed")
        assert asyncio.run(one(server)) == 200


def test_slow_clients_do_not_hold_up_others(server: LocalServer) -> None:
    slow = [socket.create_connection(("127.0.0.1", server.http)) for _ in range(200)]
    try:
        for number, connection in enumerate(slow):
            head = f"POST {INFER} HTTP/1.1\r\n"
            connection.sendall(
                (head if number % 2 else head + "content-length: 99\r\n\r\n{").encode()
            )
        started = monotonic()
        assert asyncio.run(one(server)) == 200
        assert monotonic() - started < 2
    finally:
        for connection in slow:
            # A reset, as from a client that is gone.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
    assert asyncio.run(one(server)) == 200


async def under_load(
    server: LocalServer, events: Callable[[], Awaitable[None]], clients: int = 8
) -> Counter:
    """Send sound requests without a pause while `events` happen; count the answers."""
    answers: Counter = Counter()
    ending = asyncio.Event()

    async def client(session: aiohttp.ClientSession) -> None:
        while not ending.is_set():
            answers[await status_of(session)] += 1

    async with http(server) as session:
        tasks = [asyncio.create_task(client(session)) for _ in range(clients)]
        await asyncio.sleep(0.3)
        await events()
        ending.set()
        await asyncio.gather(*tasks)
    return answers


def test_killed_workers_come_back_and_no_request_notices(artifact: Path) -> None:
    async def kill() -> None:
        for victim in server.worker_pids():
            os.kill(victim, signal.SIGKILL)
            await asyncio.sleep(1)

    with serving([artifact], "--workers", "2") as server:
        before = server.worker_pids()
        answers = asyncio.run(under_load(server, kill))
        assert set(answers) == {200}, answers
        after = server.worker_pids()
        assert len(after) == 2
        assert not set(before) & set(after)
        died = [line for line in server.log if line["event"] == "worker died"]
        assert [line["status"] for line in died] == [-signal.SIGKILL] * 2


def test_terminating_loses_no_accepted_request(artifact: Path) -> None:
    async def terminate() -> None:
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(1.5)

    with serving([artifact], "--drain", "1") as server:
        answers = asyncio.run(under_load(server, terminate))
        assert server.process.wait(10) == 0
    assert set(answers) <= {200, "ClientConnectorError"}, answers
    assert answers[200] > 50


def test_a_full_queue_refuses_fast_and_does_not_grow(artifact: Path) -> None:
    ids = np.ones((64, 512), int)  # takes a while
    seconds: list[float] = []

    async def storm() -> Counter:
        async with http(server) as session:

            async def send(_: int) -> Any:
                started = monotonic()
                async with session.post(INFER, data=body, headers=headers) as response:
                    await response.read()
                    if response.status == 429:
                        seconds.append(monotonic() - started)
                        assert int(response.headers["retry-after"]) >= 1
                    return response.status

            return await flood(600, send, at_once=64)

    arrays = [ids, np.ones_like(ids)]
    names = ("input_ids", "attention_mask")
    entries = [
        {
            "name": name,
            "datatype": "INT64",
            "shape": [64, 512],
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in zip(names, arrays, strict=True)
    ]
    head = json.dumps({"inputs": entries}).encode()
    body = b"".join([head, *(array.tobytes() for array in arrays)])
    headers = {"Inference-Header-Content-Length": str(len(head))}
    with serving([artifact], "--max-queue", "4", "--max-body-mb", "8") as server:
        asyncio.run(storm())
        before = resident(server)
        answers = asyncio.run(storm())
        assert resident(server) - before < 32 << 20
    assert set(answers) == {200, 429}, answers
    assert answers[429] > 100
    assert sorted(seconds)[len(seconds) // 2] < 1


def test_requests_whose_clients_are_gone_are_not_run(artifact: Path) -> None:
    async def leave() -> None:
        async with http(server) as session:
            for _ in range(20):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(status_of(session), 0.05)
            await asyncio.sleep(0.1)
            async with session.get("/metrics") as response:
                text = await response.text()
            assert 'sparse_tvm_queue_length{model="encoder"} 0.0' in text

    with serving([artifact]) as server:
        [worker] = server.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        try:
            asyncio.run(leave())
        finally:
            os.kill(worker, signal.SIGCONT)
        assert asyncio.run(one(server)) == 200
        assert server.worker_pids() == [worker]


def test_a_hung_worker_is_replaced(artifact: Path) -> None:
    with serving([artifact], "--timeout", "0.5") as server:
        [worker] = server.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        assert asyncio.run(one(server)) == 504
        server.wait_for("worker died")
        deadline = monotonic() + 10
        while asyncio.run(one(server)) != 200:
            assert monotonic() < deadline
