"""What the runtime promises on a GPU, tried on one, from artifacts that any machine compiled.

    python scripts/cuda_runtime.py build DIR           # where the compiler is; no GPU
    python scripts/cuda_runtime.py check DIR [--latency MODEL.so...] [--only NAME...]

Every check prints a line and what it measured; one that fails does not keep the others from
running. `serving` needs the server's packages, `tensors` and `streams` PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np

import sparse_tvm
from sparse_tvm.random_inputs import random_inputs, typical_sizes

SMALL = {"hidden": 128, "heads": 4, "intermediate": 256, "vocabulary": 1000}
SIZES = {"one": (1, 16), "two": (1, 16), "open": ("batch", "sequence"), "deep": (1, 128)}
"""Batch and tokens of the models; `two` has other weights than `one`."""

LAYERS = {"deep": 12}
"""Of a model, if not two."""

RUNS, TURNS, ROUNDS = 200, 100, 6
"""Timed runs, runs of each thread, and how often models are loaded and closed."""

VERSIONS, PAUSE = 4, 1.0
"""How many versions follow each other in a server, and seconds of load on each."""


def build(directory: Path, target: str = "cuda") -> None:
    """Compile the models that are checked."""
    from sparse_tvm.models.bert import BertConfig, build_bert

    directory.mkdir(exist_ok=True, parents=True)
    for name, (batch, sequence) in SIZES.items():
        config = BertConfig(layers=LAYERS.get(name, 2), max_positions=128, **SMALL)
        model = build_bert(config, batch=batch, sequence=sequence, seed=int(name == "two"))
        sparse_tvm.compile(model, directory / f"{name}.so", target=target, verify=False)
        print(directory / f"{name}.so", flush=True)


def feed_of(model: sparse_tvm.Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of usual sizes."""
    return random_inputs(model.inputs, seed, sizes=typical_sizes(model.inputs, model.bounds))


@contextmanager
def loaded(path: Path, **options: object) -> Iterator[tuple[sparse_tvm.Model, dict]]:
    """A model and inputs for it."""
    with sparse_tvm.load(path, **options) as model:
        yield model, feed_of(model)


def on_gpu(feed: dict[str, np.ndarray]) -> dict:
    """PyTorch's tensors on the GPU, of the same values."""
    import torch

    return {name: torch.from_numpy(array).cuda() for name, array in feed.items()}


def tensors(directory: Path) -> str:
    """PyTorch's tensors give what arrays give, and nothing of them is copied."""
    import torch

    for name in ("one", "open"):
        with loaded(directory / f"{name}.so") as (model, feed):
            expected = model.run(feed)
            on_device = on_gpu(feed)
            model.run(on_device)
            with _copies_counted(model) as copies:
                result = model.run(on_device)
            assert not copies, f"{len(copies)} copies"
            for key, tensor in result.items():
                found = torch.from_dlpack(tensor)
                assert found.is_cuda
                assert found.data_ptr() == tensor.data_ptr()
                np.testing.assert_array_equal(found.cpu().numpy(), expected[key])
    return "equal, no copies"


@contextmanager
def _copies_counted(model: sparse_tvm.Model) -> Iterator[list]:
    """The arguments of copies that a model makes meanwhile."""
    copies: list = []
    copy = model._device._copy

    def counted(*arguments: object) -> None:
        copies.append(arguments)
        copy(*arguments)

    model._device._copy = counted
    try:
        yield copies
    finally:
        model._device._copy = copy


def streams(directory: Path) -> str:
    """A run sees what is still being computed in another stream, and is seen in its own."""
    import torch

    with loaded(directory / "one.so", graphs=True) as (model, feed):
        (expected,) = model.run(feed).values()
        on_device = on_gpu(feed)
        busy = torch.randn(4096, 4096, device="cuda")
        torch.cuda.synchronize()
        for stream in (None, torch.cuda.Stream(), torch.cuda.current_stream()):
            late = {name: torch.zeros_like(tensor) for name, tensor in on_device.items()}
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    busy = torch.tanh(busy @ busy)
                for name, tensor in late.items():
                    tensor.copy_(on_device[name])
                (result,) = model.run(late, stream=stream, into=torch.from_dlpack).values()
            with torch.cuda.stream(stream or torch.cuda.current_stream()):
                found = result.clone().cpu().numpy()
            np.testing.assert_array_equal(found, expected)
    return "equal in the model's own, another, and the default stream"


def graphs(directory: Path) -> str:
    """Replayed graphs give what launches one by one give."""
    for name in ("one", "deep"):
        with (
            loaded(directory / f"{name}.so") as (model, _),
            loaded(directory / f"{name}.so", graphs=False) as (plain, _),
        ):
            for seed in range(5):
                feed = feed_of(model, seed)
                np.testing.assert_equal(model.run(feed), plain.run(feed))
            assert model.graphs == "graphs", model.graphs
            assert plain.graphs == "not wanted"
    return "equal over 5 inputs"


def latency(path: Path) -> str:
    """Medians of a run, with and without graphs, from the host, the device, and in a stream."""
    cells = []
    for wanted in (True, False):
        with loaded(path, graphs=wanted) as (model, feed):
            cells += _latencies(model, feed)
    return f"{path.name}, p50 of {RUNS}: {', '.join(cells)}"


def _latencies(model: sparse_tvm.Model, feed: dict[str, np.ndarray]) -> list[str]:
    model.run(feed)
    alone = _median(lambda: _calls(model)) / 20
    cells = [
        f"{model.graphs}: program alone {alone:.1f} us",
        f"host {_median(lambda: model.run(feed)):.1f} us",
    ]
    with suppress(ImportError):
        import torch

        on_device, stream = on_gpu(feed), torch.cuda.Stream()
        cells.append(f"device {_median(lambda: model.run(on_device)):.1f} us")
        submitted = _median(lambda: model.run(on_device, stream=stream), stream.synchronize)
        cells.append(f"in a stream {submitted:.1f} us")
    return cells


def _calls(model: sparse_tvm.Model, count: int = 20) -> None:
    """Runs of the program on its staged inputs, one after the other without waiting."""
    operands = [staged.buffer.tensor for staged in model._staged]
    with model._device.submitting():
        for _ in range(count):
            model._machine.main(*operands, model._weights)
    model._device.wait()


def _median(run: Callable[[], object], wait: Callable[[], object] | None = None) -> float:
    """Microseconds of a run; those that do not wait are timed by ten."""
    together = 1 if wait is None else 10
    times = []
    warm_up = RUNS // 20
    for _ in range(warm_up + RUNS // together):
        started = time.perf_counter()
        for _ in range(together):
            run()
        if wait is not None:
            wait()
        times.append((time.perf_counter() - started) / together)
    return median(times[warm_up:]) * 1e6


def memory(directory: Path) -> str:
    """What models took, they give back when they are closed."""
    found = []
    for _ in range(ROUNDS):
        before = free_memory()
        models = [sparse_tvm.load(directory / f"{name}.so") for name in ("one", "open", "deep")]
        for model in models:
            model.run(feed_of(model))
            model.run(feed_of(model), on_device=True)
        used = before - free_memory()
        for model in models:
            model.close()
        del models, model
        found.append((used >> 10, (before - free_memory()) >> 10))
    shown = ", ".join(f"{used} KiB used, {kept} kept" for used, kept in found)
    assert found[-1][1] <= 0, shown
    return shown


def free_memory() -> int:
    """Bytes that are free on the GPU, whoever has the rest."""
    from sparse_tvm.cuda_device import cuda_runtime

    return cuda_runtime().memory()[0]


def threads(directory: Path) -> str:
    """Four threads on two shared models, each of which is also run on the device."""
    with (
        loaded(directory / "one.so") as (one, _),
        loaded(directory / "two.so") as (two, _),
    ):
        feeds = [feed_of(one, seed) for seed in range(4)]
        models = (one, two)
        expected = [[model.run(feed)["last_hidden_state"] for feed in feeds] for model in models]
        wrong: list[object] = []

        def work(number: int) -> None:
            try:
                for turn in range(TURNS):
                    which, chosen = turn % 2, (number + turn) % 4
                    found = models[which].run(feeds[chosen])["last_hidden_state"]
                    if not np.array_equal(found, expected[which][chosen]):
                        wrong.append((number, turn))
            except Exception as error:
                wrong.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong, wrong[:3]
        assert {one.graphs, two.graphs} == {"graphs"}
    return f"{4 * TURNS} runs equal"


def devices(directory: Path) -> str:
    """Every GPU runs the model; without a second one, that there is none is said."""
    from sparse_tvm.errors import DeviceError

    found = []
    for index in range(8):
        try:
            with loaded(directory / "one.so", device=f"cuda:{index}") as (model, feed):
                found.append((model.hardware, model.run(feed)["last_hidden_state"]))
        except DeviceError as error:
            if not found:
                raise
            return f"{[name for name, _ in found]}, then: {error}"
        np.testing.assert_allclose(found[0][1], found[-1][1], atol=5e-3)
    return str([name for name, _ in found])


def cpp(directory: Path) -> str:
    """The C++ example prints what Python returns, where it was built into the directory."""
    program = directory / "run_model"
    if not program.exists():
        return "skipped: examples/cpp was not built into the directory"
    places = []
    for package, folder in (("tvm", "lib"), ("tvm_ffi", "lib"), ("nvidia", "cu13/lib")):
        spec = find_spec(package)
        found = () if spec is None else spec.submodule_search_locations or ()
        places += [str(Path(place) / folder) for place in found]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(places)}
    command = [program, directory / "one.so"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with sparse_tvm.load(directory / "one.so") as model:
        ones = {spec.name: np.ones(spec.shape, spec.dtype) for spec in model.inputs}
        expected = model.run(ones)["last_hidden_state"].ravel()[:4]
    printed = [float(number) for number in done.stdout.partition(":")[2].split()[:4]]
    np.testing.assert_allclose(printed, expected, rtol=1e-4)
    return done.stdout.strip()


def serving(directory: Path) -> str:
    """Two versions reload each other under load; a killed worker's memory comes back."""
    from sparse_tvm.serving.local import serving as running

    with (
        sparse_tvm.load(directory / "one.so") as one,
        sparse_tvm.load(directory / "two.so") as two,
    ):
        feed = feed_of(one)
        expected = [model.run(feed)["last_hidden_state"].ravel() for model in (one, two)]
    inputs = [
        {"name": n, "datatype": "INT64", "shape": a.shape, "data": a.ravel().tolist()}
        for n, a in feed.items()
    ]
    body = json.dumps({"inputs": inputs}).encode()
    with tempfile.TemporaryDirectory() as temporary:
        repository = Path(temporary) / "repository"
        served, names = 1, ("one", "two")
        _publish(directory / "one.so", repository / "bert" / "1")
        before = gpu_processes()
        options = ("--device", "cuda:0", "--poll", "0.2")
        with running([repository], *options) as server:
            url = f"{server.url}/v2/models/bert/infer"
            answered, wrong, stop = [0, 0], [], threading.Event()

            def ask() -> None:
                while not stop.is_set():
                    try:
                        with urllib.request.urlopen(url, body, timeout=60) as reply:
                            found = np.array(json.load(reply)["outputs"][0]["data"])
                    except Exception as error:
                        wrong.append(repr(error))
                        continue
                    near = [np.abs(found - each).max() < 1e-3 for each in expected]
                    if sum(near) == 1:
                        answered[near.index(True)] += 1
                    else:
                        wrong.append("neither version's answer")

            clients = [threading.Thread(target=ask) for _ in range(4)]
            for client in clients:
                client.start()
            while served < VERSIONS:
                time.sleep(PAUSE)
                served += 1
                source = directory / f"{names[(served - 1) % 2]}.so"
                _publish(source, repository / "bert" / str(served))
                server.wait_for("model loaded", served)
            time.sleep(2 * PAUSE)  # until the version before is gone
            (worker, *_) = server.worker_pids()
            with_worker, taken = gpu_processes(), free_memory()
            os.kill(worker, signal.SIGKILL)
            returned, killed = 0, time.monotonic()
            while time.monotonic() < killed + 2:  # another one takes its place meanwhile
                returned = max(returned, (free_memory() - taken) >> 20)
                time.sleep(0.005)
            time.sleep(2 * PAUSE)
            stop.set()
            for client in clients:
                client.join()
            after = gpu_processes()
        time.sleep(1)
        ended = gpu_processes()
    shown = (
        f"{served} versions, {answered} answers of one and two, {len(wrong)} wrong; nvidia-smi's"
        f" MiB by process: before {before}, with the worker {with_worker}; killing {worker}"
        f" returned {returned} MiB; with the next one {after}, after the server {ended}"
    )
    assert not wrong, f"{shown}: {wrong[:3]}"
    assert returned > 0, shown
    assert worker not in after, shown
    return shown


def _publish(source: Path, version: Path) -> None:
    """Put a version into a repository at once."""
    version.parent.mkdir(parents=True, exist_ok=True)
    hidden = version.with_name(f".{version.name}")
    hidden.mkdir()
    shutil.copy(source, hidden / "model.so")
    hidden.rename(version)


def gpu_processes() -> dict[int, int]:
    """MiB of GPU memory by process, as nvidia-smi has it, if it is there; key 0 is the GPU's."""
    found: dict[int, int] = {}
    if shutil.which("nvidia-smi") is None:
        return found
    for kind in ("--query-compute-apps=pid,used_memory", "--query-gpu=index,memory.used"):
        command = ["nvidia-smi", kind, "--format=csv,noheader,nounits"]
        for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
            key, used = line.split(",")[:2]
            found[int(key)] = int(used) if used.strip().isdecimal() else -1
    return found


CHECKS = (tensors, streams, graphs, threads, devices, memory, cpp, serving)


def check(directory: Path, timed: list[Path], only: list[str] | None = None) -> int:
    """Run the checks; return how many failed."""
    failed = 0
    pairs = [(each.__name__, directory, each) for each in CHECKS]
    pairs += [("latency", path, latency) for path in (directory / "deep.so", *timed)]
    for name, subject, function in pairs:
        if only and name not in only:
            continue
        started = time.perf_counter()
        try:
            found = function(subject)
        except Exception:
            failed += 1
            found = "FAILED\n" + traceback.format_exc(limit=-3)
        print(f"{name} ({time.perf_counter() - started:.1f} s): {found}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("verb", choices=["build", "check"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--latency", type=Path, nargs="*", default=[], help="also time these")
    parser.add_argument("--only", nargs="*", help="names of checks")
    options = parser.parse_args()
    if options.verb == "build":
        build(options.directory)
        return 0
    return check(options.directory, options.latency, options.only)


if __name__ == "__main__":
    sys.exit(main())
