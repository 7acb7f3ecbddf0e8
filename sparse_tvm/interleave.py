"""Fair timing of engines that share the same cores in one process.

ONNX Runtime and TVM both keep worker threads that spin for a while after each run before they
sleep: ONNX Runtime's for about 50 ms. Timed in strict alternation, each engine would run against
the other's spinning threads; with spinning switched off, each would pay for waking its threads,
which no deployment does. So each engine runs as it ships, a block of runs at a time, round robin
(the machine's noise meets all engines alike), and before each block

- the process waits until it uses no CPU: the previous engine's threads have gone to sleep;
- one run is not counted: it wakes this engine's threads and refills the caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

BLOCK_S = 0.5
IDLE_SLICE_S = 0.005
IDLE_TIMEOUT_S = 0.5


def interleave(
    engines: Mapping[str, Callable[[], Any]], *, duration: float, block: float = BLOCK_S
) -> dict[str, list[float]]:
    """Time every engine for `duration` seconds of counted runs, at least one run each.

    Parameters
    ----------
    block
        Seconds of counted runs before it is the next engine's turn. Many short turns spread over
        all engines what slows the machine for seconds.

    Returns
    -------
    dict[str, list[float]]
        Seconds of every counted run, by engine.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    remaining = duration
    while True:
        for name, run in engines.items():
            _wait_until_idle()
            run()
            times[name] += time_runs(run, min(block, remaining))
        remaining -= block
        if remaining <= 0:
            return times


def time_runs(run: Callable[[], Any], duration: float) -> list[float]:
    """Return the seconds of each run until `duration` seconds are over, at least one."""
    times: list[float] = []
    end = time.perf_counter()
    deadline = end + duration
    while not times or end < deadline:
        run()
        previous, end = end, time.perf_counter()
        times.append(end - previous)
    return times


def _wait_until_idle() -> None:
    """Return when no thread of this process has run for a moment, or after half a second."""
    deadline = time.perf_counter() + IDLE_TIMEOUT_S
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(IDLE_SLICE_S)
        if time.process_time() - used < IDLE_SLICE_S / 10:
            return
