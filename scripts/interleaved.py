"""Fair timing of engines that share the same cores in one process.

ONNX Runtime and TVM both keep worker threads that spin for a while after each run before they
sleep. Timed in strict alternation, each engine would run against the other's spinning threads; with
spinning switched off, each would pay for waking its threads, which no deployment does. So each
engine runs as it ships, a block of runs at a time, round robin (the machine's noise meets all
engines alike), and before each block

- the process waits until it uses no CPU: the previous engine's threads have gone to sleep;
- one run is not counted: it wakes this engine's threads and refills the caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime

IDLE_SLICE_S = 0.005
IDLE_TIMEOUT_S = 0.5


def interleave(
    engines: Mapping[str, Callable[[], Any]], *, rounds: int, block: int = 5
) -> dict[str, list[float]]:
    """Time each engine ``rounds * block`` times.

    Returns
    -------
    dict
        Seconds of every counted run, by engine.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, run in engines.items():
            wait_until_idle()
            run()
            for _ in range(block):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    return times


def wait_until_idle() -> None:
    """Return when no thread of this process has run for a moment, or after half a second."""
    deadline = time.perf_counter() + IDLE_TIMEOUT_S
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(IDLE_SLICE_S)
        if time.process_time() - used < IDLE_SLICE_S / 10:
            return


def onnx_runtime_session(model: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a model in ONNX Runtime as it ships, on a number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
