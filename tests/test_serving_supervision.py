"""Workers that cannot start, versions that cannot load, and clients that leave in the middle."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import resource
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gevent")  # of the extra for tests, beyond the server's own
pytest.importorskip("uvicorn")

import grpc
from serving_fixtures import expected, infer_body, write_encoder
from tritonclient.grpc import service_pb2 as pb

from sparse_tvm.artifact import read_manifest, rewrite_manifest
from sparse_tvm.serving.local import LocalServer, serving

IDS = np.array([[1, 2, 3, 99]])
MASK = np.ones_like(IDS)


def ask(server: LocalServer, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(server.url + path, data, timeout=20) as response:
            text = response.read()
            status = response.status
    except urllib.error.HTTPError as error:
        text, status = error.read(), error.code
    return status, json.loads(text) if text.startswith((b"{", b"[")) else text.decode()


def infer(server: LocalServer, name: str = "encoder") -> tuple[int, Any]:
    return ask(server, f"/v2/models/{name}/infer", infer_body(IDS))


def hidden(answer: Any) -> np.ndarray:
    [output] = answer["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it did not happen in time"
        sleep(0.05)


@contextmanager
def no_descriptors(pid: int) -> Iterator[None]:
    """Let a process open no further file."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("whose", ["server", "worker"])
def test_no_room_for_tensors_is_answered_with_503(tmp_path: Path, whose: str) -> None:
    with serving([write_encoder(tmp_path / "encoder.so")]) as server:
        [worker] = server.worker_pids()
        pid = worker if whose == "worker" else server.process.pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, before[1]))
        large = infer_body(np.ones((2, 500), int))
        status, answer = ask(server, "/v2/models/encoder/infer", large)
        assert status == 503
        assert "no room" in answer["error"]
        assert infer(server)[0] == 200
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        assert ask(server, "/v2/models/encoder/infer", large)[0] == 200
        assert server.worker_pids() == [worker]


def test_a_worker_that_dies_while_descriptors_are_short_comes_back(tmp_path: Path) -> None:
    with serving([write_encoder(tmp_path / "encoder.so")]) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.http, timeout=20)
        connection.request("GET", "/v2/health/live")  # the server has accepted it for sure then
        connection.getresponse().read()
        [worker] = server.worker_pids()
        with no_descriptors(server.process.pid):
            os.kill(worker, signal.SIGKILL)
            failed = server.wait_for("worker cannot be started", 2)
            assert "Too many open files" in failed["reason"]
            connection.request("GET", "/v2/health/ready")
            answer = connection.getresponse()
            assert answer.status == 503
            assert b"encoder: OSError: [Errno 24] Too many open files" in answer.read()
        wait_until(lambda: infer(server)[0] == 200)
        _, metrics = ask(server, "/metrics")
        failures = 'sparse_tvm_worker_start_failures_total{model="encoder"}'
        assert any(line.startswith(failures) for line in metrics.splitlines())


def version(root: Path, number: int, seed: int) -> Path:
    return write_encoder(root / "encoder" / str(number) / "model.so", seed)


def false_rank(path: Path) -> None:
    manifest = read_manifest(path)
    manifest["inputs"][0]["shape"] = ["batch"]
    rewrite_manifest(path, manifest)


def broken_config(path: Path) -> None:
    directory = path.with_suffix(".tokenizer")
    directory.mkdir()
    (directory / "config.json").write_text('{"vocab_size": ')


def broken_tokenizer(path: Path) -> None:
    directory = path.with_suffix(".tokenizer")
    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")


def flipped_bit(path: Path) -> None:
    """Change a weight: only its checksum tells."""
    data = bytearray(path.read_bytes())
    data[read_manifest(path)["weights"][0]["offset"] + 3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [false_rank, broken_config, broken_tokenizer, flipped_bit])
def test_a_version_that_fails_in_any_way_does_not_end_reloading(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    version(tmp_path, 1, 1)
    bad = version(tmp_path / "aside", 2, 2)
    damage(bad)
    with serving([tmp_path], "--poll", "0.2") as server:
        shutil.move(bad.parent, tmp_path / "encoder" / "2")
        server.wait_for("version cannot be loaded")
        _, index = ask(server, "/v2/repository/index", {})
        assert next(row["state"] for row in index if row["version"] == "2") == "UNAVAILABLE"
        version(tmp_path, 3, 3)
        server.wait_for("version replaced")
        np.testing.assert_allclose(hidden(infer(server)[1]), expected(IDS, MASK, 3), atol=1e-5)


def unload_with_deadline(server: LocalServer, seconds: float) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
        method = channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelUnload")
        request = pb.RepositoryModelUnloadRequest(model_name="encoder").SerializeToString()
        with pytest.raises(grpc.RpcError) as refused:
            method(request, timeout=seconds)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_an_unload_whose_client_leaves_during_a_run_leaves_no_process(tmp_path: Path) -> None:
    async def one() -> int:
        return (await asyncio.to_thread(infer, server))[0]

    async def scenario() -> int:
        running = asyncio.create_task(one())
        await asyncio.sleep(0.5)
        await asyncio.to_thread(unload_with_deadline, server, 0.5)
        os.kill(worker, signal.SIGCONT)
        return await running

    with serving([write_encoder(tmp_path / "encoder.so")]) as server:
        [worker] = server.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        assert asyncio.run(scenario()) == 200
        wait_until(lambda: server.worker_pids() == [])


def test_an_unload_while_a_worker_restarts_leaves_no_process(tmp_path: Path) -> None:
    with serving([write_encoder(tmp_path / "encoder.so")]) as server:
        [worker] = server.worker_pids()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: server.worker_pids() not in ([worker], []))  # the next one is loading
        assert ask(server, "/v2/repository/models/encoder/unload", {})[0] == 200
        wait_until(lambda: server.worker_pids() == [])
        assert ask(server, "/v2/repository/models/encoder/load", {})[0] == 200
        assert len(server.worker_pids()) == 1


def test_a_load_whose_client_leaves_still_loads(tmp_path: Path) -> None:
    with serving([write_encoder(tmp_path / "encoder.so")], "--workers", "2") as server:
        ask(server, "/v2/repository/models/encoder/unload", {})
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc}") as channel:
            method = channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelLoad")
            request = pb.RepositoryModelLoadRequest(model_name="encoder").SerializeToString()
            with pytest.raises(grpc.RpcError):
                method(request, timeout=0.05)
        wait_until(lambda: infer(server)[0] == 200)
        wait_until(lambda: len(server.worker_pids()) == 2)


def test_terminating_while_a_model_loads_leaves_no_process(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "encoder.so")
    server = LocalServer([path], "--workers", "2", "--drain", "0")
    wait_until(lambda: len(server.worker_pids()) > 0)
    workers = server.worker_pids()
    assert server.terminate() == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 5)


def test_a_killed_server_takes_stopped_workers_with_it(tmp_path: Path) -> None:
    with serving([write_encoder(tmp_path / "encoder.so")]) as server:
        [worker] = server.worker_pids()
        os.kill(worker, signal.SIGSTOP)
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), 5)


def test_a_restarted_worker_runs_the_version_that_it_belongs_to(tmp_path: Path) -> None:
    """Whatever lies at the path by then: versions must not mix."""
    path = write_encoder(tmp_path / "encoder.so", seed=1)
    other = write_encoder(tmp_path / "aside" / "other.so", seed=2)
    with serving([path], "--poll", "0", "--workers", "2") as server:
        other.replace(path)
        kill_all(server)
        wait_until(lambda: infer(server)[0] == 200, 10)  # one that meets two dead workers gets 500
        for _ in range(20):
            status, answer = infer(server)
            assert status == 200
            np.testing.assert_allclose(hidden(answer), expected(IDS, MASK, 1), atol=1e-5)


def test_writing_into_a_served_file_changes_no_answer(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "encoder.so", seed=1)
    with serving([path], "--poll", "0") as server:
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        os.truncate(path, 100)
        for _ in range(2):
            status, answer = infer(server)
            assert status == 200
            np.testing.assert_allclose(hidden(answer), expected(IDS, MASK, 1), atol=1e-5)
            kill_all(server)


def kill_all(server: LocalServer) -> None:
    for pid in server.worker_pids():
        os.kill(pid, signal.SIGKILL)


def test_links_out_of_a_directory_of_models_are_refused(tmp_path: Path) -> None:
    version(tmp_path / "models", 1, 1)
    secret = write_encoder(tmp_path / "aside" / "secret.so", seed=2)
    (tmp_path / "models" / "encoder" / "2").mkdir()
    (tmp_path / "models" / "encoder" / "2" / "model.so").symlink_to(secret)
    (tmp_path / "models" / "encoder" / "3").symlink_to("1")
    with serving([tmp_path / "models"]) as server:
        _, index = ask(server, "/v2/repository/index", {})
        assert [row["version"] for row in index if row["state"] == "READY"] == ["3"]
        (tmp_path / "models" / "encoder" / "3").unlink()
        ask(server, "/v2/repository/models/encoder/load", {})
        _, index = ask(server, "/v2/repository/index", {})
        assert any("outside" in row["reason"] for row in index if row["version"] == "2")


def test_names_that_nobody_can_say_are_passed_over(tmp_path: Path) -> None:
    version(tmp_path, 1, 1)
    bad = os.fsdecode(b"m\xff\x1b[31m")
    shutil.copytree(tmp_path / "encoder", tmp_path / bad)
    with serving([tmp_path]) as server:
        status, index = ask(server, "/v2/repository/index", {})
        assert status == 200
        assert [row["name"] for row in index] == ["encoder"]
        assert any("not UTF-8" in line["event"] for line in server.log)
