"""Load whose every answer is known beforehand."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import numpy as np
from serving_load import feeds, request_of
from tritonclient.grpc import service_pb2 as pb

import sparse_tvm
from sparse_tvm.serving.local import LocalServer

PATH = "/v2/models/model/infer"
_FEEDS = 24
_SAME = 2e-3
"""Of the largest output: by so much may joined and padded runs differ from runs alone."""

DOCUMENTED = {"200", "429", "503", "504", "OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
DOCUMENTED |= {"DEADLINE_EXCEEDED"}

_OF_EVENT = {
    "kill": {"500", "INTERNAL"},  # a request that lost two workers
    "stop": {"500", "INTERNAL"},
    "memory": {"500", "INTERNAL"},
    "descriptors": {"ServerDisconnectedError", "ClientOSError", "ClientConnectorError"},
}
"""What may come beside in the time of an event of such a name, and shortly after."""


class Truth:
    """What each of two artifacts answers.

    Parameters
    ----------
    artifacts : sequence of Path
        The two.
    longest : int
        Tokens of the longest request.
    """

    def __init__(self, artifacts: Sequence[Path], longest: int, seed: int) -> None:
        models = [sparse_tvm.load(path, threads=1) for path in artifacts]
        self.feeds = feeds(models[0].inputs, _FEEDS, longest, seed)
        self.names = [spec.name for spec in models[0].outputs]
        self._answers = [[model.run(feed) for feed in self.feeds] for model in models]
        for one, other in zip(*self._answers, strict=True):
            if self._same(one, other):
                raise SystemExit("the two models answer alike; nothing could be told from that")

    def is_right(self, number: int, outputs: dict[str, np.ndarray]) -> bool:
        """Whether these are the outputs that one of the two models has for a feed."""
        return any(self._same(answers[number], outputs) for answers in self._answers)

    def _same(self, expected: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> bool:
        return all(
            array.shape == outputs[name].shape
            and float(np.abs(array - outputs[name]).max()) <= _SAME * float(np.abs(array).max())
            for name, array in expected.items()
        )


class Load:
    """Clients that ask without a pause, over HTTP and gRPC, and what they got.

    Attributes
    ----------
    event : str
        What is happening to the server.
    """

    def __init__(self, server: LocalServer, truth: Truth, seed: int) -> None:
        self._server = server
        self._truth = truth
        self._rng = random.Random(seed)
        self._requests = [request_of(feed) for feed in truth.feeds]
        self._messages = [_message(feed) for feed in truth.feeds]
        self._recent: list[str] = []
        self._event = ""
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.undocumented: list[str] = []

    @property
    def event(self) -> str:
        """What is happening to the server."""
        return self._event

    @event.setter
    def event(self, name: str) -> None:
        self._event = name
        if name:
            self._recent = [*self._recent[-3:], name]

    @asynccontextmanager
    async def running(self, clients: int) -> AsyncIterator[None]:
        """Keep up the load."""
        ending = asyncio.Event()
        timeout = aiohttp.ClientTimeout(total=20)
        async with (
            aiohttp.ClientSession(self._server.url, timeout=timeout) as session,
            grpc.aio.insecure_channel(f"127.0.0.1:{self._server.grpc}") as channel,
        ):
            call = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                response_deserializer=pb.ModelInferResponse.FromString,
            )

            async def client(number: int) -> None:
                while not ending.is_set():
                    outcome = await (self.call(call) if number % 3 == 0 else self.post(session))
                    self._note(outcome)
                    if outcome not in ("200", "OK"):
                        await asyncio.sleep(0.1)

            tasks = [asyncio.create_task(client(number)) for number in range(clients)]
            yield
            ending.set()
            await asyncio.gather(*tasks)

    async def post(self, session: aiohttp.ClientSession) -> str:
        """Send a request over HTTP; return its status, or what became of the connection."""
        number = self._rng.randrange(len(self._requests))
        body, headers = self._requests[number]
        try:
            async with session.post(PATH, data=body, headers=headers) as response:
                data = await response.read()
        except (TimeoutError, aiohttp.ClientError) as error:
            return type(error).__name__
        if response.status == 200:
            head = int(response.headers["Inference-Header-Content-Length"])
            self._check(number, json.loads(data[:head]), data[head:])
        return str(response.status)

    async def call(self, call: grpc.aio.UnaryUnaryMultiCallable) -> str:
        """Send a request over gRPC; return its status."""
        number = self._rng.randrange(len(self._messages))
        try:
            answer = await call(self._messages[number], timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        outputs = {
            output.name: np.frombuffer(raw, np.float32).reshape(output.shape)
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
        self._judge(number, answer.model_version, outputs)
        return "OK"

    def _check(self, number: int, head: dict, tail: bytes) -> None:
        outputs = {}
        for entry in head["outputs"]:
            size = entry["parameters"]["binary_data_size"]
            outputs[entry["name"]] = np.frombuffer(tail[:size], np.float32).reshape(entry["shape"])
            tail = tail[size:]
        self._judge(number, head["model_version"], outputs)

    def _judge(self, number: int, version: str, outputs: dict[str, np.ndarray]) -> None:
        if not self._truth.is_right(number, outputs):
            self.wrong.append(f"a wrong answer of version {version} while: {self._recent}")

    def _note(self, outcome: str) -> None:
        self.outcomes[outcome] += 1
        allowed = set(DOCUMENTED)
        for event in self._recent:
            for word, more in _OF_EVENT.items():
                allowed |= more if word in event else set()
        if outcome not in allowed:
            self.undocumented.append(f"{outcome} while: {self._recent}")


def _message(feed: dict[str, np.ndarray]) -> bytes:
    request = pb.ModelInferRequest(model_name="model")
    for name, array in feed.items():
        request.inputs.add(name=name, datatype="INT64", shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    data: bytes = request.SerializeToString()
    return data
