"""What `bench_classifiers.py` prunes: a task is a small network, its data, and how to train it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
import wordnet
from tokenizers import Tokenizer
from torch import nn
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from sparse_tvm.models import minilm

SEED = 0


@dataclass(frozen=True)
class Examples:
    """Samples of a task: the network's inputs, each ``[samples, ...]``, and their classes."""

    inputs: tuple[torch.Tensor, ...]
    classes: torch.Tensor

    def __getitem__(self, chosen: slice | torch.Tensor) -> Examples:
        return Examples(tuple(each[chosen] for each in self.inputs), self.classes[chosen])


class Task(Protocol):
    """A classification.

    Attributes
    ----------
    batch, epochs, rate
        Of all trainings: samples of a step, passes over the data, the highest learning rate.
    timed
        Samples of a timed run.
    sparsity
        Of every structure that does not imply its own.
    exclude
        The layers that stay dense, as `Pruner` takes it.
    """

    batch: int
    epochs: int
    rate: float
    timed: int
    sparsity: float
    exclude: str

    def network(self) -> nn.Module:
        """Return the network, untrained or as it was trained for something else."""

    def data(self) -> tuple[Examples, Examples]:
        """Return what to train with, and what is held out."""


class Digits:
    """scikit-learn's handwritten digits, a third of them held out, and a small CNN."""

    batch, epochs, rate = 64, 15, 2e-3
    timed, sparsity, exclude = 64, 0.9, "first|last"

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 32, 3, padding=1)
            self.second = nn.Conv2d(32, 64, 3, padding=1)
            self.third = nn.Conv2d(64, 128, 3, padding=1)
            self.hidden = nn.Linear(128 * 4, 256)
            self.last = nn.Linear(256, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Return logits of images ``[samples, 1, 8, 8]``."""
            x = nn.functional.max_pool2d(self.second(self.first(x).relu()).relu(), 2)
            x = nn.functional.max_pool2d(self.third(x).relu(), 2)
            return self.last(self.hidden(x.flatten(1)).relu())

    def network(self) -> nn.Module:
        return self.Network()

    def data(self) -> tuple[Examples, Examples]:
        from sklearn.datasets import load_digits

        images, classes = load_digits(return_X_y=True)
        order = np.random.default_rng(SEED).permutation(len(classes))
        x = torch.from_numpy(images[order].reshape(-1, 1, 8, 8) / 16).float()
        examples = Examples((x,), torch.from_numpy(classes[order]).long())
        count = len(classes) // 3
        return examples[count:], examples[:count]


class Glosses:
    """The lexicographer file of a gloss of WordNet, 45 classes, told by a BERT of six layers.

    The encoder begins as all-MiniLM-L6-v2; the classes hang on the mean of its hidden states.
    """

    batch, epochs, rate = 64, 1, 3e-4
    timed, sparsity, exclude = 16, 0.8, "^classes"
    tokens: ClassVar[int] = 32
    training: ClassVar[int] = 32_000
    held_out: ClassVar[int] = 2_000

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
            # PyTorch's fused attention has a slow backward pass for short sequences.
            self.bert = BertModel.from_pretrained(
                minilm.model_directory(), add_pooling_layer=False, attn_implementation="eager"
            )
            self.classes = nn.Linear(self.bert.config.hidden_size, wordnet.FIELDS)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            """Return logits of tokens ``[samples, tokens]``."""
            hidden = self.bert(input_ids, attention_mask).last_hidden_state
            counted = attention_mask[:, :, None].to(hidden.dtype)
            return self.classes((hidden * counted).sum(1) / counted.sum(1))

    def network(self) -> nn.Module:
        return self.Network()

    def data(self) -> tuple[Examples, Examples]:
        fields = wordnet.fields_of_glosses()
        glosses = np.array(sorted(fields), object)
        order = np.random.default_rng(SEED).permutation(len(glosses))
        chosen = glosses[order[: self.held_out + self.training]].tolist()
        tokenizer = Tokenizer.from_file(str(minilm.model_directory() / "tokenizer.json"))
        tokenizer.enable_truncation(self.tokens)
        tokenizer.enable_padding(length=self.tokens)
        encoded = tokenizer.encode_batch(chosen)
        ids = torch.tensor([each.ids for each in encoded])
        mask = torch.tensor([each.attention_mask for each in encoded])
        examples = Examples((ids, mask), torch.tensor([fields[gloss] for gloss in chosen]))
        return examples[self.held_out :], examples[: self.held_out]


TASKS: dict[str, Task] = {"digits": Digits(), "glosses": Glosses()}
