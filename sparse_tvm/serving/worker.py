"""The worker process: loads one model, warms it up, and runs batches for the server.

It ends when the server closes the socket, in whatever way. Signals that a terminal or an
orchestrator sends to the whole group are left to the server, which drains first.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from sparse_tvm.errors import InputError, SparseTvmError
from sparse_tvm.random_inputs import random_inputs, typical_sizes
from sparse_tvm.serving.channel import LENGTH, Arena, pack
from sparse_tvm.serving.engines import Engine, open_engine

_WARM_UP_RUNS = 2


def main(arguments: list[str]) -> None:
    """Serve the parent process until it closes the socket."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, inputs, outputs, threads = map(int, arguments[1:])
    with socket.socket(fileno=connection) as peer, peer.makefile("rb") as messages:
        try:
            started = perf_counter()
            engine = open_engine(Path(arguments[0]), threads)
            loaded = perf_counter()
            _warm_up(engine)
            ready = perf_counter()
        except SparseTvmError as error:
            peer.sendall(pack({"error": str(error)}))
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
        arrays = inputs.read(layout)
        started = perf_counter()
        try:
            results = engine.run(dict(zip(names, arrays, strict=True)))
        except Exception as error:  # whatever TVM or ONNX Runtime raise: it belongs to the client
            answer: dict[str, Any] = {
                "error": str(error) or type(error).__name__,
                "invalid": isinstance(error, InputError),
            }
        else:
            described = [(array.dtype.str, array.shape) for array in results.values()]
            for place, array in zip(outputs.place(described), results.values(), strict=True):
                np.copyto(place, array)
            answer = {"outputs": described, "seconds": perf_counter() - started}
        peer.sendall(pack(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
