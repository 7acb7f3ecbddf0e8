"""Sentences to batches of tokens, and batches to embeddings of all-MiniLM-L6-v2."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import BertModel

from sparse_tvm.models import minilm

BATCH, TOKENS = 128, 48

Batch = dict[str, torch.Tensor]


class Encoder:
    """Sentences to batches, batches to embeddings."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.from_file(str(minilm.model_directory() / "tokenizer.json"))
        self._tokenizer.enable_truncation(TOKENS)
        self._tokenizer.no_padding()

    def batches(self, sentences: list[str]) -> Iterator[Batch]:
        """Yield batches of sentences of similar lengths."""
        ids = sorted(self._ids(sentences), key=len)
        for start in range(0, len(ids), BATCH):
            yield padded(ids[start : start + BATCH])

    def endless(
        self, sentences: list[str], seed: int, *, skip: int = 0
    ) -> Iterator[tuple[list[int], Batch]]:
        """Yield such batches in random order, again and again, with which sentences they hold.

        The first `skip` are left out.
        """
        ids = self._ids(sentences)
        generator = random.Random(seed)
        while True:
            # A little noise on the lengths, so that other sentences meet each time.
            keys = [len(each) + generator.random() * 3 for each in ids]
            order = sorted(range(len(ids)), key=keys.__getitem__)
            starts = list(range(0, len(ids) - BATCH + 1, BATCH))
            generator.shuffle(starts)
            for start in starts[skip:]:
                chosen = order[start : start + BATCH]
                yield chosen, padded([ids[i] for i in chosen])
            skip = max(0, skip - len(starts))

    @torch.no_grad()
    def embed(self, model: BertModel, sentences: list[str]) -> np.ndarray:
        """Return unit vectors, in the order of the sentences."""
        ids = self._ids(sentences)
        found = np.zeros((len(ids), model.config.hidden_size), np.float32)
        order = np.argsort([len(each) for each in ids], kind="stable")
        for start in range(0, len(ids), BATCH):
            chosen = order[start : start + BATCH]
            batch = padded([ids[i] for i in chosen])
            vectors = pooled(model(**batch).last_hidden_state, batch["attention_mask"])
            found[chosen] = torch.nn.functional.normalize(vectors).numpy()
        return found

    def _ids(self, sentences: list[str]) -> list[list[int]]:
        return [each.ids for each in self._tokenizer.encode_batch(sentences)]


def padded(rows: list[list[int]]) -> Batch:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of the hidden states of all tokens but padding: float32."""
    weights = mask[:, :, None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)
