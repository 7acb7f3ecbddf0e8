"""``/v1/embeddings`` in OpenAI's shape, for artifacts with a tokenizer beside them.

Beside ``model.so`` lies ``model.tokenizer/`` with ``tokenizer.json`` and, where the model has
them, ``config.json``, ``sentence_bert_config.json``, ``1_Pooling/config.json`` and
``modules.json``.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tvm.serving.core import Core
from sparse_tvm.serving.refusal import Kind, Refusal, invalid
from sparse_tvm.serving.version import Version
from sparse_tvm.spec import TensorSpec

_MAX_TEXTS = 2048
_INLINE_CHARACTERS = 2000
"""Longer texts are tokenized in a thread, so that other requests need not wait."""

_POOLINGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")


class TextModel:
    """Text in, unit vectors out: what an artifact's tokenizer directory describes.

    Parameters
    ----------
    directory : Path
        Holds ``tokenizer.json`` and the pooling's configuration.
    inputs : sequence of TensorSpec
        The model's inputs.
    """

    def __init__(self, directory: Path, inputs: Sequence[TensorSpec]) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._inputs = list(inputs)
        self._pooling = _pooling(_read(directory / "1_Pooling" / "config.json"))
        modules = json.dumps(_read(directory / "modules.json"))
        self._normalize = "Normalize" in modules or modules == "{}"
        config = _read(directory / "config.json")
        self.vocabulary = int(config.get("vocab_size", self._tokenizer.get_vocab_size()))
        self._sizes = [dim for spec in inputs for dim in spec.shape[1:] if isinstance(dim, int)]
        self.max_length = self._longest(directory, config)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.max_length)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, cut to the longest the model takes."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def feed(self, ids: Sequence[int]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Return the model's inputs, and the sizes of its symbolic dimensions, for one text."""
        length = self._sizes[0] if self._sizes else len(ids)
        columns = {
            "input_ids": [*ids, *[0] * (length - len(ids))],
            "attention_mask": [1] * len(ids) + [0] * (length - len(ids)),
        }
        arrays = {
            spec.name: np.array([columns.get(spec.name, [0] * length)], spec.dtype)
            for spec in self._inputs
        }
        sizes: dict[str, int] = {}
        for spec in self._inputs:
            for dim, size in zip(spec.shape, (1, length), strict=True):
                if isinstance(dim, str):
                    sizes[dim] = size
        return arrays, sizes

    def pool(self, outputs: Mapping[str, np.ndarray], tokens: int) -> np.ndarray:
        """Return the text's vector: float32, of unit length where the model says so."""
        hidden = next(iter(outputs.values()))[0].astype(np.float32)
        if hidden.ndim == 2:
            hidden = _pooled(hidden[:tokens], self._pooling)
        if self._normalize:
            hidden = hidden / max(float(np.linalg.norm(hidden)), 1e-12)
        return np.ascontiguousarray(hidden, np.float32)

    def _longest(self, directory: Path, config: Mapping[str, Any]) -> int:
        sentence = _read(directory / "sentence_bert_config.json")
        truncation = self._tokenizer.truncation or {}
        lengths = (
            sentence.get("max_seq_length") or truncation.get("max_length"),
            config.get("max_position_embeddings"),
            *self._sizes,
        )
        return min((int(length) for length in lengths if length), default=512)


async def embeddings(document: Mapping[str, Any], core: Core) -> dict[str, Any]:
    """Answer an OpenAI embeddings request."""
    name = document.get("model")
    if not isinstance(name, str):
        raise invalid("model must be a string")
    base64_wanted = _base64_wanted(document.get("encoding_format", "float"))
    with core.repository.use(name) as version:
        texts = _texts(document.get("input"))
        model = await asyncio.to_thread(_text_model, version)
        token_ids = [await _ids(model, text) for text in texts]
        vectors = await _embed(version, model, token_ids, core)
    if document.get("dimensions") not in (None, vectors[0].size):
        raise invalid(f"the model's embeddings have {vectors[0].size} dimensions, no others")
    tokens = sum(map(len, token_ids))
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.tobytes()).decode()
                if base64_wanted
                else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ],
        "model": name,
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


def _text_model(version: Version) -> TextModel:
    directory = version.tokenizer
    if not (directory / "tokenizer.json").is_file():
        raise Refusal(
            Kind.INVALID,
            f"model {version.model!r} takes no text: there is no {directory.name}/tokenizer.json "
            "beside the artifact",
        )
    return _cached(
        directory, (directory / "tokenizer.json").stat().st_mtime_ns, tuple(version.inputs)
    )


@lru_cache(maxsize=32)
def _cached(directory: Path, _modified: int, inputs: tuple[TensorSpec, ...]) -> TextModel:
    return TextModel(directory, inputs)


def _texts(value: Any) -> list[str | list[int]]:
    """Return the request's texts, each a string or a list of token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_ids(value)):
        value = [value]
    if not isinstance(value, list) or not value or len(value) > _MAX_TEXTS:
        raise invalid(f"input must be a text or a list of 1 to {_MAX_TEXTS} texts")
    for text in value:
        if text == "" or text == [] or not (isinstance(text, str) or _is_ids(text)):
            raise invalid("every input must be a text or a list of token ids, and not empty")
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


async def _ids(model: TextModel, text: str | list[int]) -> list[int]:
    if isinstance(text, str):
        if len(text) <= _INLINE_CHARACTERS:
            return model.encode(text)
        return await asyncio.to_thread(model.encode, text)
    if len(text) > model.max_length or not all(0 <= token < model.vocabulary for token in text):
        raise invalid(
            f"token ids must be at most {model.max_length}, each from 0 to {model.vocabulary - 1}"
        )
    return text


def _base64_wanted(value: Any) -> bool:
    if value not in ("float", "base64"):
        raise invalid("encoding_format must be float or base64")
    return bool(value == "base64")


def _pooling(config: Mapping[str, Any]) -> str:
    wanted = [name for name in _POOLINGS if config.get(f"pooling_mode_{name}")]
    return wanted[0] if wanted else "mean_tokens"


def _pooled(hidden: np.ndarray, pooling: str) -> np.ndarray:
    """Reduce ``[tokens, features]`` to ``[features]``."""
    if pooling == "cls_token":
        return np.asarray(hidden[0])
    if pooling == "max_tokens":
        return np.asarray(hidden.max(axis=0))
    total = hidden.sum(axis=0)
    return np.asarray(total / (len(hidden) if pooling == "mean_tokens" else len(hidden) ** 0.5))


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else {}
