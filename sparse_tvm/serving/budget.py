"""What the requests of all clients share: memory, and turns on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from sparse_tvm.serving.refusal import Kind, Refusal

_GRACE_SECONDS = 1.0
"""A body that has been coming in for longer gives way when memory is short."""

_LONG_STEP = 64 << 10
"""Bytes that are decoded in less than a millisecond: nobody need wait for a turn."""

_ROUNDS = 4
"""Of the event loop between two long steps: a new client connects, asks, and has its answer."""


class Budget:
    """Bytes that the requests of all clients together may occupy, and their turns.

    Parameters
    ----------
    limit : int
        The bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._arriving: dict[Hold, None] = {}
        self.steps = asyncio.Lock()

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        """Give a share that grows as needed and is given back at the end."""
        share = Hold(self)
        try:
            yield share
        finally:
            share.release()

    def take(self, size: int) -> None:
        """Use more bytes; the bodies that have been coming in for long give way to them.

        Raises
        ------
        Refusal
            When too many are in use.
        """
        while self.used + size > self.limit:
            oldest = next(iter(self._arriving), None)
            if oldest is None or monotonic() - oldest.begun < _GRACE_SECONDS:
                raise Refusal(
                    Kind.BUSY, "too many bytes of requests are waiting already", retry_after=1
                )
            oldest.give_way()
        self.used += size


class Hold:
    """One request's share of a budget."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._size = 0
        self._cancel: Callable[[], object] | None = None
        self.begun = monotonic()

    def grow(self, size: int) -> None:
        """Take `size` more bytes.

        Raises
        ------
        Refusal
            When the request alone needs more than there may be, or when too many are in use.
        """
        if self._size + size > self._budget.limit:
            raise Refusal(
                Kind.TOO_LARGE,
                f"the request and its results need {self._size + size} bytes of memory or more, "
                f"the limit is {self._budget.limit}",
            )
        self._budget.take(size)
        self._size += size

    def turn(self, size: int) -> Turn:
        """Return what to hold while `size` bytes are worked on in one step.

        Nothing on the event loop interrupts a step. Long ones, of whatever requests, are taken one
        at a time, and short requests get through between them.
        """
        return Turn(self._budget.steps if size >= _LONG_STEP else None)

    @contextmanager
    def arriving(self, cancel: Callable[[], object]) -> Iterator[None]:
        """While the request's body comes in, let it be given up by `cancel`."""
        self._cancel = cancel
        self.begun = monotonic()
        self._budget._arriving[self] = None
        try:
            yield
        finally:
            self._cancel = None
            self._budget._arriving.pop(self, None)

    def give_way(self) -> None:
        """Give up the request's body, for the sake of others."""
        self._budget._arriving.pop(self, None)
        self.release()
        if self._cancel is not None:
            self._cancel()

    def release(self) -> None:
        """Give everything back."""
        self._budget.used -= self._size
        self._size = 0


class Turn:
    """A step on the event loop; a class, since most are short and every request has several.

    Parameters
    ----------
    steps : asyncio.Lock | None
        Held by one long step at a time; None for a short one.
    """

    def __init__(self, steps: asyncio.Lock | None) -> None:
        self._steps = steps

    async def __aenter__(self) -> None:
        if self._steps is not None:
            await self._steps.acquire()

    async def __aexit__(self, *_: object) -> None:
        if self._steps is not None:
            try:
                for _round in range(_ROUNDS):
                    await asyncio.sleep(0)
            finally:
                self._steps.release()
