"""The bounded queue in front of a model's workers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from itertools import islice
from time import monotonic

import numpy as np

from sparse_tvm.serving.batching import Layout, Tensors
from sparse_tvm.serving.refusal import Kind, Refusal

_LOOK_AHEAD = 64
"""How many waiting requests are considered for a batch."""


class Request:
    """One request on its way; ``await request.result`` gives its outputs.

    Parameters
    ----------
    tensors : Tensors
        The checked inputs.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.result: asyncio.Future[list[np.ndarray]] = asyncio.get_running_loop().create_future()
        self.enqueued = monotonic()
        self.alone = False
        self.attempts = 0


class Queue:
    """Requests in the order of their arrival, handed out in batches.

    A request whose client has gone leaves the queue at once, so it takes neither a place nor time.

    Parameters
    ----------
    layout : Layout
        Which requests may join.
    max_requests, max_rows, max_delay : int, int, float
        As in :class:`~sparse_tvm.serving.options.Options`.
    """

    def __init__(self, layout: Layout, max_requests: int, max_rows: int, max_delay: float) -> None:
        self.layout = layout
        self._max_requests = max_requests
        self._max_rows = max_rows
        self._max_delay = max_delay
        self._waiting: dict[Request, None] = {}
        self._arrival = asyncio.Event()
        self._collecting = asyncio.Lock()
        self.seconds_per_request = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request: Request) -> None:
        """Add a request.

        Raises
        ------
        Refusal
            When the queue is full.
        """
        if len(self._waiting) >= self._max_requests:
            wait = len(self._waiting) * self.seconds_per_request
            raise Refusal(
                Kind.BUSY,
                f"{len(self._waiting)} requests are waiting already",
                retry_after=max(1, math.ceil(wait)),
            )
        self._waiting[request] = None
        request.result.add_done_callback(lambda _: self._waiting.pop(request, None))
        self._arrival.set()

    def put_back(self, requests: Sequence[Request]) -> None:
        """Return requests to the head of the queue, each to be run by itself."""
        for request in requests:
            request.alone = True
        self._waiting = {**dict.fromkeys(requests), **self._waiting}
        self._arrival.set()

    async def take(self) -> list[Request]:
        """Wait for a batch and take it out of the queue."""
        async with self._collecting:
            while True:
                while not self._waiting:
                    self._arrival.clear()
                    await self._arrival.wait()
                await self._gather()
                if self._waiting:
                    return self._pop()

    async def _gather(self) -> None:
        """Give the oldest request's batch time to fill."""
        if not self._max_delay or self.layout.batch is None:
            return
        while self._waiting and len(self._waiting) < self._max_rows:
            oldest = next(iter(self._waiting))
            left = oldest.enqueued + self._max_delay - monotonic()
            if left <= 0:
                return
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                return

    def _pop(self) -> list[Request]:
        batch = list(islice(self._waiting, _LOOK_AHEAD))
        if batch[0].alone:
            del batch[1:]
        else:
            mates = [request for request in batch if not request.alone]
            chosen = self.layout.choose([mate.tensors for mate in mates], self._max_rows)
            batch = [mates[index] for index in chosen]
        for request in batch:
            del self._waiting[request]
        return batch
