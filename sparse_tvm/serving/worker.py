"""The worker process: loads one model, warms it up, and runs batches for the server.

It ends when the server closes the socket, or ends, in whatever way. Signals that a terminal or an
orchestrator sends to the whole group are left to the server, which drains first.
"""

from __future__ import annotations

import ctypes
import json
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from sparse_tvm.errors import InputError, SparseTvmError
from sparse_tvm.random_inputs import random_inputs, typical_sizes
from sparse_tvm.serving.channel import LENGTH, Arena, NoRoom, pack
from sparse_tvm.serving.engines import Engine, open_engine
from sparse_tvm.vm import never_forks

_WARM_UP_RUNS = 2
_PR_SET_PDEATHSIG = 1
_FIRST_TO_KILL = "500"


def main(arguments: list[str]) -> None:
    """Serve the parent process until it closes the socket."""
    _follow_the_server()
    never_forks()
    with suppress(BrokenPipeError):  # a server that has no use for it any more
        _live(arguments)


def _live(arguments: list[str]) -> None:
    path, *numbers, device = arguments
    artifact, connection, inputs, outputs, threads, huge_pages, verify = map(int, numbers)
    with socket.socket(fileno=connection) as peer, peer.makefile("rb") as messages:
        copy = f"/proc/self/fd/{artifact}"
        try:
            started = perf_counter()
            engine = open_engine(
                Path(path),
                Path(copy),
                threads,
                device or None,
                huge_pages=bool(huge_pages),
                verify=bool(verify),
            )
            loaded = perf_counter()
            _warm_up(engine)
            ready = perf_counter()
        except Exception as error:  # TVM raises anything; all of it is why the model cannot serve
            known = isinstance(error, SparseTvmError)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            peer.sendall(pack({"error": reason.replace(copy, path)}))
            return
        peer.sendall(
            pack(
                {
                    "inputs": [spec.as_json() for spec in engine.inputs],
                    "outputs": [spec.as_json() for spec in engine.outputs],
                    "bounds": engine.manifest.get("bounds", {}),
                    "load_seconds": loaded - started,
                    "warm_up_seconds": ready - loaded,
                }
            )
        )
        _serve(engine, peer, messages, Arena(inputs), Arena(outputs))


def _follow_the_server() -> None:
    """Leave signals to the server; die with it, and before it when memory runs out."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(OSError):  # where /proc is read-only, the kernel chooses
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_KILL)


def _warm_up(engine: Engine) -> None:
    sizes = typical_sizes(engine.inputs, engine.manifest.get("bounds", {}))
    feed = random_inputs(engine.inputs, sizes=sizes)
    for _ in range(_WARM_UP_RUNS):
        engine.run(feed)


def _serve(
    engine: Engine, peer: socket.socket, messages: Any, inputs: Arena, outputs: Arena
) -> None:
    names = [spec.name for spec in engine.inputs]
    while header := messages.read(LENGTH.size):
        layout = json.loads(messages.read(LENGTH.unpack(header)[0]))["inputs"]
        try:
            arrays = inputs.read(layout)
            started = perf_counter()
            results = engine.run(dict(zip(names, arrays, strict=True)))
            seconds = perf_counter() - started
            described = [(array.dtype.str, array.shape) for array in results.values()]
            for place, array in zip(outputs.place(described), results.values(), strict=True):
                np.copyto(place, array)
        except Exception as error:  # whatever TVM or ONNX Runtime raise: it belongs to the client
            answer: dict[str, Any] = {
                "error": str(error) or type(error).__name__,
                "invalid": isinstance(error, InputError),
                "no_room": isinstance(error, NoRoom),
            }
        else:
            answer = {"outputs": described, "seconds": seconds}
        peer.sendall(pack(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
