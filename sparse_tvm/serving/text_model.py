"""What turns text into a model's inputs, and its outputs into vectors.

Beside ``model.so`` lies ``model.tokenizer/`` with ``tokenizer.json`` and, where the model has
them, ``config.json``, ``sentence_bert_config.json``, ``1_Pooling/config.json`` and
``modules.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_tvm.errors import ArtifactError
from sparse_tvm.serving.limits import Limits, read_config
from sparse_tvm.serving.refusal import invalid
from sparse_tvm.spec import TensorSpec

_POOLINGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")


def tokenizer_of(artifact: Path) -> Path:
    """Return the directory that holds an artifact's tokenizer, if it has one."""
    return artifact.with_suffix(".tokenizer")


def load_text_model(
    directory: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    limits: Limits,
) -> TextModel | None:
    """Return the text model in `directory`, or None when the model takes no text.

    Raises
    ------
    ArtifactError
        When there is one that cannot be used.
    """
    takes_rows = all(len(spec.shape) == 2 for spec in inputs)
    gives_vectors = bool(outputs) and len(outputs[0].shape) in (2, 3)
    if not (takes_rows and gives_vectors and (directory / "tokenizer.json").is_file()):
        return None
    return TextModel(directory, inputs, limits)


class TextModel:
    """Text in, unit vectors out: what an artifact's tokenizer directory describes.

    Parameters
    ----------
    directory : Path
        Holds ``tokenizer.json`` and the pooling's configuration.
    inputs : sequence of TensorSpec
        The model's inputs.
    limits : Limits
        What the model takes.

    Raises
    ------
    ArtifactError
        When it cannot be used.
    """

    def __init__(self, directory: Path, inputs: Sequence[TensorSpec], limits: Limits) -> None:
        # The cores are the workers'.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer

        file = directory / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more precise
            raise ArtifactError(f"{file}: {error}") from error
        self._inputs = list(inputs)
        self._pooling = _pooling(read_config(directory / "1_Pooling" / "config.json"))
        modules = json.dumps(read_config(directory / "modules.json"))
        self._normalize = "Normalize" in modules or modules == "{}"
        known = self._tokenizer.get_vocab_size()
        self.vocabulary = limits.values.get("input_ids", (0, known - 1))[1] + 1
        lengths = [dim for spec in inputs for dim in spec.shape[1:]]
        self._sizes = [dim for dim in lengths if isinstance(dim, int)]
        bounds = [high for dim, (_, high) in limits.sizes.items() if dim in lengths]
        self.max_length = self._longest(directory, [*self._sizes, *bounds])
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.max_length)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's token ids, cut to the longest the model takes.

        Other threads run meanwhile.
        """
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        return [self.checked(encoding.ids) for encoding in encodings]

    def checked(self, ids: list[int]) -> list[int]:
        """Return token ids that the model takes.

        Raises
        ------
        Refusal
            When there are none, too many, or ids that it does not know.
        """
        if not 0 < len(ids) <= self.max_length or min(ids) < 0 or max(ids) >= self.vocabulary:
            raise invalid(
                f"a text must be at least 1 and at most {self.max_length} token ids, each from 0 "
                f"to {self.vocabulary - 1}"
            )
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

    def _longest(self, directory: Path, limits: Sequence[int]) -> int:
        sentence = read_config(directory / "sentence_bert_config.json").get("max_seq_length")
        truncation = (self._tokenizer.truncation or {}).get("max_length")
        return min(
            (int(length) for length in (sentence or truncation, *limits) if length), default=512
        )


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
