"""A small text encoder with symbolic sizes, and servers to put it behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Any

import numpy as np
from artifacts import manifest

VOCABULARY, FEATURES = 100, 16
READY_SECONDS = 30.0


@cache
def _code() -> bytes:
    """Compile an embedding whose rows also see the mean of the positions that count."""
    import tvm
    from tvm import relax
    from tvm.script import ir as I
    from tvm.script import relax as R

    from sparse_tvm.linker import fcompile

    @I.ir_module
    class Encoder:
        @R.function
        def main(
            input_ids: R.Tensor(("batch", "sequence"), "int64"),
            attention_mask: R.Tensor(("batch", "sequence"), "int64"),
            table: R.Tensor((VOCABULARY, FEATURES), "float32"),
        ):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                embedded = R.take(table, input_ids, axis=0)
                mask = R.astype(R.expand_dims(attention_mask, axis=[2]), "float32")
                total = R.sum(embedded * mask, axis=[1], keepdims=True)
                hidden = embedded + total / R.sum(mask, axis=[1], keepdims=True)
                R.output(hidden)
            return hidden

    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    executable = tvm.compile(relax.transform.BundleModelParams()(Encoder), target=target)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "library.so"
        executable.export_library(str(path), fcompile=fcompile)
        return path.read_bytes()


def table(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((VOCABULARY, FEATURES), np.float32)


def expected(ids: np.ndarray, mask: np.ndarray, seed: int = 0) -> np.ndarray:
    embedded = table(seed)[ids]
    counted = mask[:, :, None].astype(np.float32)
    return embedded + (embedded * counted).sum(1, keepdims=True) / counted.sum(1, keepdims=True)


def write_encoder(path: Path, seed: int = 0, longest: int = 512) -> Path:
    """Write the encoder, with random weights from `seed`, to `path`, in one step."""
    from sparse_tvm.artifact import write_artifact

    path.parent.mkdir(parents=True, exist_ok=True)
    code = path.with_suffix(".elf")
    code.write_bytes(_code())
    ids = [
        {"name": name, "dtype": "int64", "shape": ["batch", "sequence"]}
        for name in ("input_ids", "attention_mask")
    ]
    ids[0]["values"] = [0, VOCABULARY - 1]
    hidden = {"name": "hidden", "dtype": "float32", "shape": ["batch", "sequence", FEATURES]}
    write_artifact(
        path,
        code,
        {"table": table(seed)},
        manifest(inputs=ids, outputs=[hidden], sizes={"sequence": [1, longest]}),
    )
    code.unlink()
    return path


class Server:
    """A running ``sparse-tvm serve``."""

    def __init__(self, sources: Sequence[Path], *options: str) -> None:
        self.log: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", "import sys; from sparse_tvm.cli import main; main()"),
                *("serve", *map(str, sources), "--port", "0", "--grpc-port", "0"),
                *("--drain", "0.3", "--poll", "0.2", *options),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        listening = self.wait_for("listening")
        self.http, self.grpc = listening["http"], listening["grpc"]
        self.url = f"http://127.0.0.1:{self.http}"

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        deadline = monotonic() + READY_SECONDS
        while monotonic() < deadline:
            found = [line for line in list(self.log) if line.get("event") == event]
            if len(found) >= count:
                return found[count - 1]
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            sleep(0.01)
        raise AssertionError(f"no {event!r} in the log: {self.log}")

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(READY_SECONDS)

    def worker_pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [
            int(pid)
            for pid in children.split()
            if b"sparse_tvm.serving.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                self.log.append(json.loads(line))
            except json.JSONDecodeError:
                self.log.append({"event": "not JSON", "line": line})


@contextmanager
def serving(sources: Sequence[Path], *options: str, ready: bool = True) -> Iterator[Server]:
    server = Server(sources, *options)
    try:
        if ready:
            server.wait_for("ready")
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def infer_body(ids: Any, mask: Any = None) -> dict[str, Any]:
    """Return the JSON of an inference request to the encoder."""
    ids = np.asarray(ids)
    mask = np.ones_like(ids) if mask is None else np.asarray(mask)
    return {
        "inputs": [
            {
                "name": name,
                "datatype": "INT64",
                "shape": list(array.shape),
                "data": array.reshape(-1).tolist(),
            }
            for name, array in (("input_ids", ids), ("attention_mask", mask))
        ]
    }
