"""Load for a server: requests made beforehand, sent by real HTTP clients at a fixed rate."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import aiohttp
import numpy as np

from sparse_tvm.random_inputs import random_inputs
from sparse_tvm.spec import TensorSpec

_SHORTEST = 8

UNSENT = "too late to send"
"""What becomes of requests whose sender could not keep the rate."""


@dataclass
class Result:
    """What came back: latencies in seconds, statuses, and seconds it all took."""

    latencies: list[float] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def throughput(self) -> float:
        return self.statuses[200] / self.seconds

    @property
    def errors_by_kind(self) -> Counter:
        return Counter({status: n for status, n in self.statuses.items() if status != 200})

    @property
    def errors(self) -> int:
        return sum(self.errors_by_kind.values())

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.latencies, percent)) if self.latencies else float("nan")


def feeds(
    specs: Sequence[TensorSpec], count: int, longest: int, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Return inputs of one row; symbolic lengths are drawn log-uniformly from 8 to `longest`."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(np.log(_SHORTEST), np.log(longest + 1), count)).astype(int)
    result = []
    for number, length in enumerate(lengths):
        shaped = [
            TensorSpec(
                spec.name,
                spec.dtype,
                tuple(_size(axis, dim, int(length)) for axis, dim in enumerate(spec.shape)),
            )
            for spec in specs
        ]
        result.append(random_inputs(shaped, seed + number))
    return result


def request_of(feed: dict[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of an inference request with binary tensors."""
    entries = [
        {
            "name": name,
            "datatype": {"int64": "INT64", "int32": "INT32", "float32": "FP32"}[array.dtype.name],
            "shape": array.shape,
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in feed.items()
    ]
    document = {"inputs": entries, "parameters": {"binary_data_output": True}}
    header = json.dumps(document).encode()
    body = b"".join([header, *(array.tobytes() for array in feed.values())])
    return body, {"Inference-Header-Content-Length": str(len(header))}


async def fixed_rate(
    url: str,
    path: str,
    requests: Sequence[tuple[bytes, dict[str, str]]],
    *,
    rate: float,
    seconds: float,
    clients: int,
) -> Result:
    """Send `rate` requests a second over `clients` connections, whatever comes back.

    A latency counts from the moment a request was due, so that a server that falls behind cannot
    hide it.
    """
    result = Result()
    queue: asyncio.Queue[tuple[float, int] | None] = asyncio.Queue()

    async def client(session: aiohttp.ClientSession) -> None:
        while (item := await queue.get()) is not None:
            due, number = item
            if perf_counter() > last:
                result.statuses[UNSENT] += 1
                continue
            result.statuses[await _send(session, path, requests[number % len(requests)])] += 1
            result.latencies.append(perf_counter() - due)

    async with _session(url, clients) as session:
        started = perf_counter()
        last = started + 1.5 * seconds
        tasks = [asyncio.create_task(client(session)) for _ in range(clients)]
        for number in range(int(rate * seconds)):
            due = started + number / rate
            if (pause := due - perf_counter()) > 0:
                await asyncio.sleep(pause)
            queue.put_nowait((due, number))
        for _ in tasks:
            queue.put_nowait(None)
        await asyncio.gather(*tasks)
        result.seconds = perf_counter() - started
    return result


async def saturated(
    url: str,
    path: str,
    requests: Sequence[tuple[bytes, dict[str, str]]],
    *,
    seconds: float,
    clients: int,
) -> Result:
    """Let every client send its next request as soon as it has an answer."""
    result = Result()

    async def client(session: aiohttp.ClientSession, first: int) -> None:
        number = first
        while perf_counter() < ending:
            started = perf_counter()
            result.statuses[await _send(session, path, requests[number % len(requests)])] += 1
            result.latencies.append(perf_counter() - started)
            number += clients

    async with _session(url, clients) as session:
        started = perf_counter()
        ending = started + seconds
        await asyncio.gather(*(client(session, first) for first in range(clients)))
        result.seconds = perf_counter() - started
    return result


def _session(url: str, clients: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=clients),
        timeout=aiohttp.ClientTimeout(total=60),
    )


async def _send(
    session: aiohttp.ClientSession, path: str, request: tuple[bytes, dict[str, str]]
) -> int | str:
    body, headers = request
    try:
        async with session.post(path, data=body, headers=headers) as response:
            await response.read()
            return response.status
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        return type(error).__name__


def _size(axis: int, dim: int | str, length: int) -> int:
    if isinstance(dim, int):
        return dim
    return 1 if axis == 0 else length
