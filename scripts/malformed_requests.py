"""Send malformed requests, HTTP and gRPC, and see that they cost nothing but an answer.

Prints what came back, the longest that health took meanwhile, and the server's memory.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import aiohttp
import grpc
import typer
from health_watch import Watch
from hostile import hostile_json, hostile_message
from serving_load import feeds
from tritonclient.grpc import service_pb2 as pb

from sparse_tvm.artifact import read_manifest
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.serving.local import LocalServer, serving
from sparse_tvm.serving.metrics import proportional_bytes
from sparse_tvm.spec import TensorSpec

LONGEST_STALL = 0.5  # seconds of health
MOST_GROWTH = 1.05  # of memory, from the first tenth to the end
_AT_ONCE = 32
_ANSWER_SECONDS = 0.5  # some bytes may still become a request, and get no answer
_RAW_SHARE = 100  # one in so many HTTP requests is no HTTP at all


def main(
    artifact: Annotated[Path, typer.Argument(help="model.so, with integer inputs")],
    http: Annotated[int, typer.Option(help="HTTP requests.")] = 100_000,
    rpc: Annotated[int, typer.Option(help="gRPC requests.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Other seeds give other requests.")] = 0,
) -> None:
    """Fail on a 5xx but 503, a stall of health, or growing memory."""
    entries = read_manifest(artifact)["inputs"]
    specs = [TensorSpec.from_json(entry) for entry in entries]
    feed = feeds(specs, 1, 16, seed)[0]
    with serving([artifact]) as server:
        attack = Attack(server, artifact.stem, feed, seed)
        started = perf_counter()
        asyncio.run(attack.run(http // 10, rpc // 10))
        early = memory(server)
        asyncio.run(attack.run(http - http // 10, rpc - rpc // 10))
        late = memory(server)
        workers_died = sum(line["event"] == "worker died" for line in server.log)
        lines = len(server.log)
    console = stdout_console()
    console.print(f"HTTP: {dict(attack.by_status)}", soft_wrap=True)
    console.print(f"gRPC: {dict(attack.by_code)}", soft_wrap=True)
    console.print(
        f"{http + rpc} requests in {perf_counter() - started:.0f} s; "
        f"health took {1e3 * attack.longest:.0f} ms at most; memory {early / 2**20:.1f} -> "
        f"{late / 2**20:.1f} MiB; {workers_died} workers died; {lines} lines of log",
        soft_wrap=True,
    )
    internal = [s for s in attack.by_status if isinstance(s, int) and s >= 500 and s != 503]
    unknown = {"INTERNAL", "UNKNOWN"} & set(attack.by_code)
    sys.exit(
        int(
            bool(internal or unknown or workers_died)
            or attack.longest > LONGEST_STALL
            or late > MOST_GROWTH * early
        )
    )


def memory(server: LocalServer) -> float:
    """Return the proportional set size of server and workers, in bytes."""
    pids = [server.process.pid, *server.worker_pids()]
    return sum(proportional_bytes(pid) or 0 for pid in pids)


class Attack:
    """Hostile requests to one server, and what came of them."""

    def __init__(self, server: LocalServer, model: str, feed: dict[str, Any], seed: int) -> None:
        self._server = server
        self._path = f"/v2/models/{model}/infer"
        self._rng = random.Random(seed)
        self._json = {
            "inputs": [
                {
                    "name": name,
                    "datatype": "INT64",
                    "shape": list(array.shape),
                    "data": array.reshape(-1).tolist(),
                }
                for name, array in feed.items()
            ]
        }
        self._message = pb.ModelInferRequest(model_name=model)
        for name, array in feed.items():
            tensor = self._message.inputs.add(name=name, datatype="INT64", shape=array.shape)
            tensor.contents.int64_contents.extend(array.reshape(-1).tolist())
        self.by_status: Counter[int | str] = Counter()
        self.by_code: Counter[str] = Counter()
        self.longest = 0.0

    async def run(self, http: int, rpc: int) -> None:
        """Send so many requests of each kind while health is watched."""
        with Watch(self._server) as health:
            async with (
                aiohttp.ClientSession(self._server.url) as session,
                grpc.aio.insecure_channel(f"127.0.0.1:{self._server.grpc}") as channel,
            ):
                call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
                await flood(http, lambda number: self._post(session, number))
                await flood(rpc, lambda _: self._call(call))
        self.longest = max(self.longest, health.longest)

    async def _post(self, session: aiohttp.ClientSession, number: int) -> None:
        if number % _RAW_SHARE == 0:
            self.by_status[await self._talk()] += 1
            return
        headers = {}
        if number % 7 == 0:
            length = self._rng.choice(["7", "-1", "9" * 4301, "x", "", "1e3", "99999999"])
            headers = {"Inference-Header-Content-Length": length}
        path = self._path if number % 11 else "/v1/embeddings"
        body = hostile_json(self._rng, self._json)
        try:
            async with session.post(path, data=body, headers=headers) as response:
                await response.read()
                self.by_status[response.status] += 1
        except aiohttp.ClientError as error:
            self.by_status[type(error).__name__] += 1

    async def _talk(self) -> str | int:
        """Send bytes that are no HTTP, and return the status of the answer, if there is one."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.http)
        head = f"POST {self._path} HTTP/1.1\r\nhost: x\r\n".encode()
        writer.write(
            self._rng.choice(
                [
                    self._rng.randbytes(100) + b"\r\n\r\n",
                    head + b"content-length: -4\r\n\r\n",
                    head + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n\r\n",
                    head + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n\r\n",
                    head + self._rng.randbytes(50) + b"\r\n\r\n",
                    b"GET /%00%ff/../\xff HTTP/9.9\r\n\r\n",
                ]
            )
        )
        try:
            line = await asyncio.wait_for(reader.readline(), _ANSWER_SECONDS)
        except (TimeoutError, OSError):
            return "no answer"
        finally:
            writer.transport.abort()
        return int(line.split()[1]) if line.startswith(b"HTTP/") else "closed"

    async def _call(self, call: Callable[[bytes], Awaitable[Any]]) -> None:
        try:
            await call(hostile_message(self._rng, self._message))
        except grpc.aio.AioRpcError as error:
            self.by_code[error.code().name] += 1
        else:
            self.by_code["OK"] += 1


async def flood(count: int, send: Callable[[int], Awaitable[None]]) -> None:
    """Send `count` requests, some at a time."""
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await send(number)

    await asyncio.gather(*(client() for _ in range(_AT_ONCE)))


if __name__ == "__main__":
    typer.run(main)
