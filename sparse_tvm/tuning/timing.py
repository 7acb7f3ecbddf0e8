"""Timing functions in turns.

A clock that moves by a quarter from one second to the next would decide more than the kernels do.
So a candidate and what it is held against take turns of a millisecond, and what counts is the
median of how many times as long the candidate took as its neighbours did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_PASS_SECONDS = 1e-3
"""Least length of a pass, whose mean is one sample."""

_LEAST_PASSES = 7
_LEAST_SECONDS = 1e-8
"""What a kernel takes at least: a difference of two timings may come out below zero."""

_CACHED_BYTES, _REFRESHED_SECONDS = 64 << 20, 5e-3
"""Of copies that a last cache may hold, and of the time to read all of them: if they take no more,
they are read again before each pass, for the other side has pushed them out."""


def compare(calls: Sequence[Calls], idle: Sequence[Calls], seconds: float) -> dict[str, float]:
    """Time functions in turns, and the last one against the first if there are two.

    Parameters
    ----------
    calls, idle : Sequence[Calls]
        Each function, and the same with nothing in it, whose time is taken off.
    seconds : float
        How long that may take.

    Returns
    -------
    dict[str, float]
        Of the last one ``seconds``, ``noise`` and, if there are two, ``relative``.
    """
    overhead = np.median(_in_turns(idle, seconds / 10), axis=0)
    return _summary(np.maximum(_in_turns(calls, seconds) - overhead, _LEAST_SECONDS))


class Calls:
    """Calls of a function with each of several lists of arguments in turn, many to a pass."""

    def __init__(
        self, run: Callable[..., Any], rotation: Sequence[Sequence[Any]], nbytes: int
    ) -> None:
        self._run, self._rotation, self._at = run, rotation, 0
        self._all(rotation)
        cached = nbytes <= _CACHED_BYTES and self._all(rotation) <= _REFRESHED_SECONDS
        self._refreshed = rotation if cached else ()
        self._per_pass = 1
        while (seconds := self() * self._per_pass) < _PASS_SECONDS / 2:
            more = int(self._per_pass * _PASS_SECONDS / max(seconds, 1e-6))
            self._per_pass = max(2 * self._per_pass, more)

    def __call__(self) -> float:
        """Mean seconds of a call in one pass."""
        rotation = self._rotation
        chosen = [rotation[(self._at + i) % len(rotation)] for i in range(self._per_pass)]
        self._at += self._per_pass
        self._all(self._refreshed)
        return self._all(chosen) / self._per_pass

    def _all(self, chosen: Sequence[Sequence[Any]]) -> float:
        """Seconds of a call with each of these lists."""
        run, started = self._run, time.perf_counter()
        for arguments in chosen:
            run(*arguments)
        return time.perf_counter() - started


def _in_turns(sides: Sequence[Calls], budget: float) -> np.ndarray:
    """Seconds of a call of each side, pass by pass: float64 ``[passes, sides]``."""
    samples: list[list[float]] = []
    deadline = time.perf_counter() + budget
    while len(samples) < _LEAST_PASSES or time.perf_counter() < deadline:
        order = list(enumerate(sides))
        taken = {place: side() for place, side in order[:: (-1) ** len(samples)]}
        samples.append([taken[place] for place, _ in order])
    return np.array(samples)


def _summary(samples: np.ndarray) -> dict[str, float]:
    """Of the last side, the first being what it is held against."""
    own = samples[:, -1]
    relative = samples[:, -1] / samples[:, 0] if samples.shape[1] > 1 else own
    low, middle, high = np.quantile(relative, (0.25, 0.5, 0.75))
    found = {"seconds": float(np.median(own)), "noise": float((high - low) / middle)}
    return {**found, "relative": float(middle)} if samples.shape[1] > 1 else found
