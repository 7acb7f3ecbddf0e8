from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gevent")  # of the extra for tests, beyond the server's own
pytest.importorskip("uvicorn")

import aiohttp
import tritonclient.grpc
import tritonclient.http
from serving_fixtures import expected, infer_body, write_encoder
from tritonclient.utils import InferenceServerException

from sparse_tvm.serving.local import LocalServer, serving
from sparse_tvm.serving.metrics import proportional_bytes

FLAVOURS = (tritonclient.http, tritonclient.grpc)
IDS = np.array([[1, 2, 3, 99], [4, 5, 6, 7]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    path = write_encoder(tmp_path_factory.mktemp("models") / "encoder.so")
    with serving([path]) as running:
        yield running


def client(flavour: Any, server: LocalServer) -> Any:
    port = server.http if flavour is tritonclient.http else server.grpc
    return flavour.InferenceServerClient(f"127.0.0.1:{port}")


def inputs(flavour: Any, ids: np.ndarray = IDS, mask: np.ndarray = MASK, **how: Any) -> list[Any]:
    tensors = []
    for name, array in (("input_ids", ids), ("attention_mask", mask)):
        tensor = flavour.InferInput(name, list(array.shape), "INT64")
        tensor.set_data_from_numpy(array, **how)
        tensors.append(tensor)
    return tensors


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_triton_client_health_and_metadata(server: LocalServer, flavour: Any) -> None:
    triton = client(flavour, server)
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("encoder")
    as_json = {"as_json": True} if flavour is tritonclient.grpc else {}
    assert triton.get_server_metadata(**as_json)["name"] == "sparse_tvm"
    metadata = triton.get_model_metadata("encoder", **as_json)
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["input_ids", "attention_mask"]
    assert [int(dim) for dim in metadata["outputs"][0]["shape"]] == [-1, -1, 16]
    index = triton.get_model_repository_index(**as_json)
    rows = index["models"] if flavour is tritonclient.grpc else index
    assert rows[0]["state"] == "READY"


@pytest.mark.parametrize("binary", [True, False])
def test_triton_client_http_infers(server: LocalServer, binary: bool) -> None:
    flavour = tritonclient.http
    wanted = [flavour.InferRequestedOutput("hidden", binary_data=binary)]
    result = client(flavour, server).infer(
        "encoder", inputs(flavour, binary_data=binary), outputs=wanted, request_id="7"
    )
    np.testing.assert_allclose(result.as_numpy("hidden"), expected(IDS, MASK), atol=1e-5)
    assert result.get_response()["id"] == "7"
    assert result.get_response()["model_version"] == "1"


def test_triton_client_grpc_infers(server: LocalServer) -> None:
    result = client(tritonclient.grpc, server).infer("encoder", inputs(tritonclient.grpc))
    np.testing.assert_allclose(result.as_numpy("hidden"), expected(IDS, MASK), atol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name": "none"}, "there is no model 'none'"),
        ({"model_version": "9"}, "serves version 1, not '9'"),
        ({"ids": IDS[:, :3]}, "sequence is 3 in another input"),
        ({"ids": IDS[0]}, r"has shape \[4\], the model takes \[batch, sequence\]"),
        ({"ids": IDS + 1}, "values outside 0 to 99"),
        ({"ids": IDS - 2}, "values outside 0 to 99"),
        ({"ids": np.zeros((1, 513), int), "mask": np.ones((1, 513), int)}, "from 1 to 512"),
        ({"outputs": ["nothing"]}, "no output 'nothing'; it returns hidden"),
        ({"drop": 1}, "input 'attention_mask' is missing"),
        ({"timeout": 1}, "no result within 1e-06 s"),
    ],
)
def test_triton_client_errors(server: LocalServer, flavour: Any, change: Any, message: str) -> None:
    change = dict(change)
    tensors = inputs(flavour, change.pop("ids", IDS), change.pop("mask", MASK))
    tensors = tensors[: -change.pop("drop", 0) or None]
    wanted = [flavour.InferRequestedOutput(name) for name in change.pop("outputs", ())]
    name = change.pop("model_name", "encoder")
    with pytest.raises(InferenceServerException, match=message):
        client(flavour, server).infer(name, tensors, outputs=wanted or None, **change)


def post(server: LocalServer, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def infer(server: LocalServer, ids: Any, mask: Any = None) -> np.ndarray:
    status, answer, _ = post(server, "/v2/models/encoder/infer", infer_body(ids, mask))
    assert status == 200, answer
    [output] = answer["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def test_metrics_count_what_happened(server: LocalServer) -> None:
    infer(server, IDS, MASK)
    with urllib.request.urlopen(server.url + "/metrics") as response:
        text = response.read().decode()
    assert 'sparse_tvm_requests_total{model="encoder",protocol="http",status="200"}' in text
    assert 'sparse_tvm_workers{model="encoder"} 1.0' in text
    assert "sparse_tvm_worker_proportional_bytes" in text
    assert "none" not in text  # a client's words never become labels


def test_an_embeddings_call_without_a_tokenizer_says_so(server: LocalServer) -> None:
    status, answer, _ = post(server, "/v1/embeddings", {"model": "encoder", "input": "x"})
    assert status == 400
    assert "no encoder.tokenizer/tokenizer.json" in answer["error"]["message"]


def test_joined_requests_get_what_they_get_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 120)
    texts = [rng.integers(0, 100, (1, length)) for length in lengths]

    async def ask_all(url: str) -> list[np.ndarray]:
        async with aiohttp.ClientSession(url) as session:

            async def ask(ids: np.ndarray) -> np.ndarray:
                async with session.post("/v2/models/encoder/infer", json=infer_body(ids)) as reply:
                    [output] = (await reply.json())["outputs"]
                return np.array(output["data"], np.float32).reshape(output["shape"])

            return await asyncio.gather(*map(ask, texts))

    with serving([write_encoder(tmp_path / "encoder.so")], "--max-delay-ms", "5") as server:
        together = asyncio.run(ask_all(server.url))
        alone = [infer(server, ids) for ids in texts]
        with urllib.request.urlopen(server.url + "/metrics") as response:
            metrics = response.read().decode()
    for ids, one, other in zip(texts, together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        np.testing.assert_allclose(one, expected(ids, np.ones_like(ids)), atol=1e-5)
    runs = float(
        next(line for line in metrics.splitlines() if "batch_rows_count" in line).split()[1]
    )
    assert runs < 120 + 60 + 5


def version(root: Path, number: int, seed: int) -> Path:
    return write_encoder(root / "encoder" / str(number) / "model.so", seed)


def test_versions_come_and_go_without_losing_a_request(tmp_path: Path) -> None:
    version(tmp_path, 1, 1)
    ids, mask = IDS[:1], MASK[:1]
    answers: list[tuple[int, Any]] = []
    ending = threading.Event()

    def load() -> None:
        while not ending.is_set():
            status, answer, _ = post(server, "/v2/models/encoder/infer", infer_body(ids))
            answers.append((status, answer))

    with serving([tmp_path], "--poll", "0.2") as server:
        clients = [threading.Thread(target=load) for _ in range(4)]
        for thread in clients:
            thread.start()
        np.testing.assert_allclose(infer(server, ids), expected(ids, mask, 1), atol=1e-5)
        version(tmp_path, 2, 2)
        server.wait_for("version replaced")
        np.testing.assert_allclose(infer(server, ids), expected(ids, mask, 2), atol=1e-5)

        broken = tmp_path / "encoder" / "3" / "model.so"
        broken.parent.mkdir()
        broken.write_bytes(Path(tmp_path / "encoder" / "2" / "model.so").read_bytes()[:-100])
        server.wait_for("version cannot be loaded")
        np.testing.assert_allclose(infer(server, ids), expected(ids, mask, 2), atol=1e-5)
        _, index, _ = post(server, "/v2/repository/index", {})
        assert {row["version"]: row["state"] for row in index} == {"2": "READY", "3": "UNAVAILABLE"}
        assert "truncated" in next(row["reason"] for row in index if row["version"] == "3")
        status, answer, _ = post(server, "/v2/repository/models/encoder/load", {})
        assert status == 400
        assert "truncated" in answer["error"]

        version(tmp_path, 3, 3)
        server.wait_for("version replaced", 2)
        np.testing.assert_allclose(infer(server, ids), expected(ids, mask, 3), atol=1e-5)
        ending.set()
        for thread in clients:
            thread.join()
        assert len(answers) > 20
        assert [answer for status, answer in answers if status != 200] == []

        triton = client(tritonclient.http, server)
        triton.unload_model("encoder")
        assert not triton.is_model_ready("encoder")
        assert post(server, "/v2/models/encoder/infer", infer_body(ids))[0] == 503
        triton_rpc = client(tritonclient.grpc, server)
        triton_rpc.load_model("encoder")
        assert triton_rpc.is_model_ready("encoder")
        assert len(server.worker_pids()) == 1


def test_models_that_never_loaded_keep_the_server_unready(tmp_path: Path) -> None:
    version(tmp_path, 1, 1)
    bad = tmp_path / "bad" / "1" / "model.so"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"nothing")
    with serving([tmp_path], "--poll", "0.2") as server:
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(server.url + "/v2/health/ready")
        infer(server, IDS)
        status, answer, headers = post(server, "/v2/models/bad/infer", infer_body(IDS))
        assert status == 503
        assert "not an ELF file" in answer["error"]
        assert int(headers["retry-after"]) >= 1


def test_workers_share_the_pages_of_the_weights(tmp_path: Path) -> None:
    path = write_encoder(tmp_path / "encoder.so")
    sizes = {}
    for workers in (1, 4):
        with serving([path], "--workers", str(workers)) as server:
            infer(server, IDS)
            pids = server.worker_pids()
            assert len(pids) == workers
            sizes[workers] = sum(proportional_bytes(pid) or 0 for pid in pids)
    assert sizes[4] < 4 * sizes[1]
