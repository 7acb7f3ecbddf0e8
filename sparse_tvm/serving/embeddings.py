"""``/v1/embeddings`` in OpenAI's shape, for models with a tokenizer beside them."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import numpy as np

from sparse_tvm.serving.budget import Hold
from sparse_tvm.serving.core import Core
from sparse_tvm.serving.refusal import invalid
from sparse_tvm.serving.text_model import TextModel, tokenizer_of
from sparse_tvm.serving.version import Version

MAX_BODY = 8 << 20
"""Bytes of a request: 2048 texts of 4 KB."""

_MAX_TEXTS = 2048
_MAX_CHARACTERS = 1 << 17
"""Characters of one text, and of those that are tokenized at a time: about 0.2 s and 40 MB."""

_INLINE_CHARACTERS = 2000
"""More are tokenized in a thread, so that other requests need not wait."""

_DECODED_RATIO = 16
"""Bytes that a byte of JSON becomes at most: a character and a comma, or a token id."""

_Decoded = TypeVar("_Decoded")

_tokenizing = ThreadPoolExecutor(2, "tokenize")


class _Request(msgspec.Struct):
    model: str
    input: msgspec.Raw
    encoding_format: str = "float"
    dimensions: int | None = None


async def parse(body: bytes | bytearray, held: Hold) -> tuple[str, _Request]:
    """Return the name of the model that is asked for, and the request."""
    held.grow(_DECODED_RATIO * len(body))
    async with held.turn(len(body)):
        request = _decoded(body, _Request)
    return request.model, request


async def embeddings(request: _Request, core: Core, held: Hold) -> dict[str, Any]:
    """Answer an OpenAI embeddings request."""
    if request.encoding_format not in ("float", "base64"):
        raise invalid("encoding_format must be float or base64")
    with core.repository.use(request.model) as version:
        model = version.text
        if model is None:
            raise invalid(
                f"model {version.model!r} takes no text: there is no "
                f"{tokenizer_of(version.path).name}/tokenizer.json beside the artifact"
            )
        async with held.turn(len(memoryview(request.input))):
            texts = _texts(request.input)
        token_ids = [ids async for ids in _token_ids(model, texts)]
        vectors = await _embed(version, model, token_ids, core)
    if request.dimensions not in (None, vectors[0].size):
        raise invalid(f"the model's embeddings have {vectors[0].size} dimensions, no others")
    tokens = sum(map(len, token_ids))
    base64_wanted = request.encoding_format == "base64"
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.tobytes()).decode()
                if base64_wanted
                else vector,
            }
            for index, vector in enumerate(vectors)
        ],
        "model": request.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def _embed(
    version: Version, model: TextModel, token_ids: Sequence[Sequence[int]], core: Core
) -> list[np.ndarray]:
    """Embed every text as a request of its own, so that they join with those of others."""
    # One client's thousand texts leave room in the queue for others.
    places = asyncio.Semaphore(max(1, core.options.max_queue // 4))
    timeout = core.timeout(None)

    async def one(ids: Sequence[int]) -> np.ndarray:
        async with places:
            outputs = await version.infer(*model.feed(ids), timeout)
        return model.pool(outputs, len(ids))

    tasks = [asyncio.ensure_future(one(ids)) for ids in token_ids]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _texts(raw: msgspec.Raw) -> list[str] | list[list[int]]:
    """Return the request's texts, each a string or a list of token ids.

    How the JSON begins says which, so that nothing is decoded that is not wanted.
    """
    text = bytes(raw)
    start = text[:64].translate(None, b" \t\r\n")
    texts: list[str] | list[list[int]]
    if start.startswith(b'"'):
        texts = [_decoded(text, str)]
    elif start.startswith(b'["'):
        texts = _decoded(text, list[str])
    elif start.startswith(b"[["):
        if text.count(b"[") > _MAX_TEXTS + 1:
            raise _wrong_count()
        texts = _decoded(text, list[list[int]])
    else:
        texts = [_decoded(text, list[int])]
    if not texts or len(texts) > _MAX_TEXTS:
        raise _wrong_count()
    for text_or_ids in texts:
        if not text_or_ids:
            raise invalid("every input must be a text or a list of token ids, and not empty")
        if isinstance(text_or_ids, str) and len(text_or_ids) > _MAX_CHARACTERS:
            raise invalid(
                f"a text has {len(text_or_ids)} characters, the limit is {_MAX_CHARACTERS}"
            )
    return texts


def _wrong_count() -> Exception:
    return invalid(f"input must be a text or a list of 1 to {_MAX_TEXTS} texts")


async def _token_ids(
    model: TextModel, texts: list[str] | list[list[int]]
) -> AsyncIterator[Sequence[int]]:
    """Give the token ids of every text, without holding up others for long."""
    if not isinstance(texts[0], str):
        for ids in texts:
            yield model.checked(ids)
        return
    for batch in _batches(texts):
        if sum(map(len, batch)) <= _INLINE_CHARACTERS:
            encoded = model.encode(batch)
        else:
            loop = asyncio.get_running_loop()
            encoded = await loop.run_in_executor(_tokenizing, model.encode, batch)
        for ids in encoded:
            yield ids


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Cut a list of texts into parts of few characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and characters + len(text) > _MAX_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    yield batch


def _decoded(body: bytes | bytearray, kind: type[_Decoded]) -> _Decoded:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is no embeddings request: {error}") from None
