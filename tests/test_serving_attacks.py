"""Requests that are small and cost much: memory, time on the event loop, a crash.

Each test sends what used to hurt, and watches the server's memory and how long its health takes.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gevent")  # of the extra for tests, beyond the server's own
pytest.importorskip("uvicorn")

import aiohttp
import grpc
from health_watch import Watch
from serving_fixtures import expected, infer_body, peak_bytes, write_encoder
from tritonclient.grpc import service_pb2 as pb

from sparse_tvm.serving.local import LocalServer, serving

IDS = np.array([[1, 2, 3, 99]])
INFER = "/v2/models/encoder/infer"
MIB = 1 << 20


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "encoder.so")


@pytest.fixture
def server(artifact: Path) -> Iterator[LocalServer]:
    with serving([artifact]) as running:
        assert post(running, json.dumps(infer_body(IDS)).encode())[0] == 200
        yield running


def post(server: LocalServer, body: bytes, path: str = INFER, **headers: str) -> tuple[int, bytes]:
    async def send() -> tuple[int, bytes]:
        async with (
            aiohttp.ClientSession(server.url) as session,
            session.post(path, data=body, headers=headers) as response,
        ):
            return response.status, await response.read()

    return asyncio.run(send())


def call(server: LocalServer, message: bytes) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        try:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message, timeout=60)
        except grpc.RpcError as error:
            return error.code().name
        return "OK"


def with_data(data: str, shape: str = "[50, 500]") -> bytes:
    tensor = f'{{"name": "input_ids", "datatype": "INT64", "shape": {shape}, "data": {data}}}'
    return f'{{"inputs": [{tensor}]}}'.encode()


BOMBS = {
    "fixed-width strings": with_data('["' + "x" * 10_000 + '"' + ', ""' * 24_999 + "]"),
    "empty lists as data": with_data("[" + "[]," * (2 << 20) + "[]]"),
    "empty lists as inputs": b'{"inputs": [' + b"[]," * (2 << 20) + b"[]]}",
    "empty objects as inputs": b'{"inputs": [' + b"{}," * (2 << 20) + b"{}]}",
    "unknown fields": b'{"x": [' + b"[]," * (2 << 20) + b'[]], "inputs": []}',
    "a shape without end": with_data("[1]", "[" + "1," * (3 << 20) + "1]"),
    "too many numbers": with_data("[" + "1," * (3 << 20) + "1]", "[1, 4]"),
    "a number without end": with_data("[" + "7" * (6 << 20) + "]", "[1, 1]"),
    "parameters without end": b'{"parameters": {'
    + b",".join(b'"%d": 1' % number for number in range(1 << 19))
    + b'}, "inputs": []}',
    "deep": with_data("[" * (1 << 20)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_request_cannot_take_memory_or_the_loop(server: LocalServer, bomb: str) -> None:
    body = BOMBS[bomb]
    before = peak_bytes(server.process.pid)
    with Watch(server) as health:
        assert post(server, body)[0] == 400
    more = peak_bytes(server.process.pid) - before
    print(f"{len(body) / 1e6:.1f} MB: {more / MIB:.0f} MiB, {health.longest:.2f} s")
    assert health.longest < 0.5
    assert more < 4 * len(body) + 32 * MIB


def test_many_long_requests_let_short_ones_through(server: LocalServer) -> None:
    """Each is skimmed in one step, and one after the other would add up to seconds."""
    body = with_data("[" + "[]," * (4 << 20) + "[]]")

    async def send(count: int) -> list[int]:
        async def one() -> int:
            async with session.post(INFER, data=body) as response:
                return response.status

        async with aiohttp.ClientSession(server.url) as session:
            return await asyncio.gather(*(one() for _ in range(count)))

    with Watch(server) as health:
        statuses = asyncio.run(send(12))
    print(f"12 at once of {len(body) / 1e6:.1f} MB: {health.longest:.2f} s")
    assert set(statuses) <= {400, 429}  # 429: so many do not fit the memory for requests
    assert health.longest < 0.5


def test_long_json_is_decoded_in_steps(tmp_path: Path) -> None:
    """Half a million numbers are fine, right, and hold up nobody."""
    path = write_encoder(tmp_path / "encoder.so", longest=1 << 19)
    ids = np.random.default_rng(0).integers(0, 100, (1, 1 << 19))
    with serving([path]) as server, Watch(server) as health:
        body = infer_body(ids)
        for tensor in body["inputs"]:
            tensor["data"] = np.array(tensor["data"]).reshape(ids.shape).tolist()
        status, answer = post(server, json.dumps(body).encode())
        assert status == 200, answer[:200]
        [output] = json.loads(answer)["outputs"]
        hidden = np.array(output["data"], np.float32).reshape(output["shape"])
    np.testing.assert_allclose(hidden, expected(ids, np.ones_like(ids)), atol=1e-3)
    assert health.longest < 0.5


def test_more_json_than_can_be_skimmed_is_refused(server: LocalServer) -> None:
    status, answer = post(server, with_data("[" + "1," * (9 << 20) + "1]"))
    assert status == 413
    assert b"binary" in answer


def infer_message(**changes: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="encoder", **changes)
    for name in ("input_ids", "attention_mask"):
        tensor = request.inputs.add(name=name, datatype="INT64", shape=[1, 4])
        tensor.contents.int64_contents.extend([1, 2, 3, 4])
    return request


def message_with(**contents: Any) -> bytes:
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="input_ids", datatype="INT64", shape=[1, 4], **contents
    )
    return pb.ModelInferRequest(model_name="encoder", inputs=[tensor]).SerializeToString()


MESSAGES = {
    "empty inputs": b"\x2a\x00" * (3 << 20),
    "empty raw contents": b"\x3a\x00" * (3 << 20),
    "a shape without end": message_with()
    + pb.ModelInferRequest(
        inputs=[pb.ModelInferRequest.InferInputTensor(shape=[1] * (6 << 20))]
    ).SerializeToString(),
    "too many numbers": message_with(
        contents=pb.InferTensorContents(int64_contents=[1] * (6 << 20))
    ),
    "empty bytes": message_with(contents=pb.InferTensorContents(bytes_contents=[b""] * (3 << 20))),
}


@pytest.mark.parametrize("bomb", MESSAGES)
def test_a_small_message_cannot_take_memory_or_the_loop(server: LocalServer, bomb: str) -> None:
    message = MESSAGES[bomb]
    before = peak_bytes(server.process.pid)
    with Watch(server) as health:
        assert call(server, message) == "INVALID_ARGUMENT"
    more = peak_bytes(server.process.pid) - before
    print(f"{len(message) / 1e6:.1f} MB: {more / MIB:.0f} MiB, {health.longest:.2f} s")
    assert health.longest < 0.5
    assert more < 24 * len(message) + 32 * MIB


@pytest.mark.parametrize("length", ["0" * 4300 + "7", "9" * 4301, "9" * 30, "-1", "1_0", "٣", ""])
def test_header_lengths_that_are_none(server: LocalServer, length: str) -> None:
    body = json.dumps(infer_body(IDS)).encode()
    status, answer = post(server, body, **{"Inference-Header-Content-Length": length})
    assert status == 400, answer


@pytest.mark.parametrize("timeout", [float("nan"), float("inf"), -float("inf"), -1.0, 1e300])
def test_timeouts_that_are_none_over_grpc(server: LocalServer, timeout: float) -> None:
    request = infer_message()
    request.parameters["timeout"].double_param = timeout
    assert call(server, request.SerializeToString()) == "INVALID_ARGUMENT"
    assert call(server, infer_message().SerializeToString()) == "OK"


def test_results_that_would_not_fit_are_refused_before_they_are_computed(artifact: Path) -> None:
    ids = np.ones((20_000, 512), np.int64)  # 82 MB in, 655 MB out
    entries = [
        {
            "name": name,
            "datatype": "INT64",
            "shape": list(ids.shape),
            "parameters": {"binary_data_size": ids.nbytes},
        }
        for name in ("input_ids", "attention_mask")
    ]
    head = json.dumps({"inputs": entries}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    with serving([artifact], "--max-body-mb", "200", "--max-pending-mb", "600") as server:
        started = perf_counter()
        status, answer = post(server, head + 2 * ids.tobytes(), **headers)
        assert status == 413, answer
        assert b"results" in answer
        assert perf_counter() - started < 10


def test_unfinished_bodies_give_way_to_others(artifact: Path) -> None:
    """Bodies that do not end must not keep the memory that others need."""
    unfinished = b'{"inputs": [' + b" " * (24 << 20)

    async def hold_back(ending: asyncio.Event) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http)
        writer.write(f"POST {INFER} HTTP/1.1\r\ncontent-length: {30 << 20}\r\n\r\n".encode())
        writer.write(unfinished)
        await writer.drain()
        answer = asyncio.ensure_future(reader.read(100))
        done, _ = await asyncio.wait({answer, asyncio.ensure_future(ending.wait())}, timeout=20)
        writer.close()
        return answer.result() if answer in done and answer.done() else b""

    async def scenario() -> tuple[list[int], list[bytes]]:
        ending = asyncio.Event()
        holders = []
        for _ in range(4):
            holders.append(asyncio.create_task(hold_back(ending)))
            await asyncio.sleep(1)
        statuses = []
        async with aiohttp.ClientSession(server.url) as session:
            for _ in range(20):
                body = json.dumps(infer_body(IDS)) + " " * (8 << 20)
                async with session.post(INFER, data=body) as response:
                    statuses.append(response.status)
        ending.set()
        return statuses, await asyncio.gather(*holders)

    with serving([artifact], "--max-body-mb", "30", "--max-pending-mb", "100") as server:
        statuses, refused = asyncio.run(scenario())
    assert statuses == [200] * 20
    assert any(b"408" in answer for answer in refused)


def test_clients_that_do_not_read_are_left(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "encoder.so")
    ids = np.ones((200, 512), int)  # 20 MB of JSON come back

    async def ask(count: int) -> None:
        body = json.dumps(infer_body(ids)).encode()
        head = f"POST {INFER} HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        connections = []
        for _ in range(count):
            _, writer = await asyncio.open_connection("127.0.0.1", server.http, limit=1024)
            writer.transport.pause_reading()
            writer.write(head + body)
            connections.append(writer)
        await asyncio.sleep(8)
        for writer in connections:
            writer.transport.abort()

    with serving([path], "--patience", "2") as server:
        before, open_before = resident(server), descriptors(server)
        asyncio.run(ask(6))
        until = time.monotonic() + 15
        while resident(server) - before >= 100 * MIB and time.monotonic() < until:
            time.sleep(0.5)
        assert resident(server) - before < 100 * MIB
        assert descriptors(server) - open_before < 3


def descriptors(server: LocalServer) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def resident(server: LocalServer) -> int:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * 4096


def send_slowly(connection: socket.socket, data: bytes) -> None:
    for start in range(0, len(data), 1 << 16):
        connection.sendall(data[start : start + (1 << 16)])
        time.sleep(0.001)


@pytest.mark.parametrize(
    "endless",
    [b"0\r\n" + b"x: y\r\n" * (1 << 20), b"0\r\nx: " + b"y" * (6 << 20), b"1;" + b"e" * (6 << 20)],
    ids=["trailers", "trailer", "extension"],
)
def test_chunks_and_trailers_without_end(server: LocalServer, endless: bytes) -> None:
    before = peak_bytes(server.process.pid)
    with socket.create_connection(("127.0.0.1", server.http), timeout=5) as connection:
        connection.sendall(f"POST {INFER} HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            send_slowly(connection, endless)
    assert peak_bytes(server.process.pid) - before < 4 * MIB


def test_bodies_in_tiny_chunks_are_taken(server: LocalServer) -> None:
    body = json.dumps(infer_body(IDS)).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with socket.create_connection(("127.0.0.1", server.http), timeout=5) as connection:
        head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + chunks + b"0\r\ntrailer: x\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_connections_are_bounded(artifact: Path) -> None:
    with serving([artifact], "--max-connections", "20") as server:
        connections = [
            socket.create_connection(("127.0.0.1", server.http), timeout=5) for _ in range(60)
        ]
        time.sleep(1)
        assert descriptors(server) < 80
        assert connections[-1].recv(100).startswith(b"HTTP/1.1 503")
        for connection in connections:
            connection.close()
        time.sleep(0.2)
        assert post(server, json.dumps(infer_body(IDS)).encode())[0] == 200


def test_malformed_requests_are_not_logged_one_by_one(server: LocalServer) -> None:
    before = len(server.log)
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", server.http), timeout=5) as connection:
            connection.sendall(b"no HTTP at all\r\n\r\n")
            connection.recv(100)
        post(server, b"{")
    assert len(server.log) - before <= 1


def test_threads_do_not_grow(server: LocalServer) -> None:
    def threads() -> int:
        return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))

    body = json.dumps(infer_body(IDS)).encode()
    post(server, body)
    before = threads()
    clients = [threading.Thread(target=post, args=(server, body)) for _ in range(16)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert threads() - before < 8
