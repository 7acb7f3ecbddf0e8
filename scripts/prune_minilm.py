"""Prune all-MiniLM-L6-v2 so that it stays good: by second order, then distillation.

The Optimal Brain Surgeon prunes on WordNet's glosses; training on them then brings what is left
near the unpruned model's hidden states and embeddings, on two CPU cores. Only the encoder's layers,
biases and layer norms change; embeddings stay the original's. An interrupted run goes on from its
last checkpoint.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import wordnet
from embedding_scores import Scores
from tokenizers import Tokenizer
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from sparse_tvm.errors import SparseTvmError
from sparse_tvm.models import minilm
from sparse_tvm.models.packed import save_packed
from sparse_tvm.sparsity.pattern import Goal
from sparse_tvm.torch import (
    Pruner,
    embedding_loss,
    hidden_state_loss,
    prune_with_data,
)

CALIBRATION, BATCH, TOKENS = 512, 64, 48
RATE, WARM_UP = 1e-3, 20
CHECKPOINT = 50
"""Steps between checkpoints."""
FALLING = 0.3
"""The share of steps, the last ones, in which the rate falls to zero."""
SEED = 0

Batch = dict[str, torch.Tensor]


def main(
    output: Annotated[Path, typer.Argument(help="The .npz of all that changed.")],
    structure: Annotated[str, typer.Option()] = "4x1",
    sparsity: Annotated[float, typer.Option()] = 0.9,
    steps: Annotated[int, typer.Option(min=1, help="Of distillation, all together.")] = 4000,
    directory: Annotated[Path, typer.Option("--wordnet")] = wordnet.DIRECTORY,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Prune MiniLM and write what changed."""
    torch.manual_seed(SEED)
    torch.set_num_threads(threads)
    training, held_out = wordnet.glosses(directory)
    encoder = Encoder()
    teacher, model = load(), load()
    for parameter in (*teacher.parameters(), *model.embeddings.parameters()):
        parameter.requires_grad_(False)
    pruner = Pruner(model, structure=structure, sparsity=sparsity, layers="^encoder")
    run = Run(model, teacher, encoder, training, held_out, output.with_suffix(".ckpt"))
    calibration = list(encoder.batches(training[:CALIBRATION]))
    if run.step == 0:
        goals = dict.fromkeys(pruner.layers, Goal.parse(structure, sparsity))
        errors = prune_with_data(model, teacher, goals, calibration, dtype=torch.bfloat16)
        pruner.keep_zeros()
        run.say(f"mean layer error {np.mean(list(errors.values())):.3f}")
        run.say(f"  pruned:    {run.scores()}")
    run.distil(steps)
    run.say(f"  distilled: {run.scores()}")
    pruner.finish()
    round_to_half(model)
    facts = {
        "structure": structure, "sparsity": sparsity, "steps": steps, "batch": BATCH, "seed": SEED,
        "cpu_minutes": round(run.cpu_seconds() / 60, 1), **vars(run.scores()),
    }  # fmt: skip
    changed = {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        if name.startswith("encoder.")
    }
    block = "1x1" if structure == "unstructured" else structure
    save_packed(output, changed, block, facts)
    run.say(json.dumps(facts))


def load() -> BertModel:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # PyTorch's fused attention has a slow backward pass for short sequences.
    return BertModel.from_pretrained(
        minilm.model_directory(), add_pooling_layer=False, attn_implementation="eager"
    ).eval()


def round_to_half(model: BertModel) -> None:
    """Round the matrices as the file does, so that the scores are those of the file."""
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.half())


class Run:
    """Distillation that can be interrupted: what a checkpoint holds, and how it goes on."""

    def __init__(
        self,
        model: BertModel,
        teacher: BertModel,
        encoder: Encoder,
        training: list[str],
        held_out: list[str],
        checkpoint: Path,
    ) -> None:
        self._model, self._encoder, self._held_out = model, encoder, held_out
        self._reference = encoder.embed(teacher, held_out)
        self._teacher = copy.deepcopy(teacher).bfloat16()
        self._batches = encoder.endless(training)
        self._checkpoint = checkpoint
        self._earlier = 0.0
        self.step = self._drawn = 0
        self._optimiser_state: dict[str, Any] | None = None
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            model.load_state_dict(state["model"])
            self._optimiser_state = state["optimiser"]
            self.step, self._earlier = state["step"], state["seconds"]
            for _ in range(state["drawn"]):
                self._next()

    def distil(self, steps: int) -> None:
        """Train the model to give its teacher's hidden states and embeddings."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(
            trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        if self._optimiser_state is not None:
            optimiser.load_state_dict(self._optimiser_state)
            self._optimiser_state = None
        low = copy.deepcopy(self._model).bfloat16()
        lowered = [p for p in low.parameters() if p.requires_grad]
        recent = []
        for step in range(self.step, steps):
            losses, gradients = self._gradients(low, lowered, self._next())
            recent.append(losses)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient.float()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.param_groups[0]["lr"] = rate(step, steps)
            optimiser.step()
            with torch.no_grad():
                torch._foreach_copy_(lowered, trained)
            self.step = step + 1
            if self.step % CHECKPOINT == 0:
                hidden, embedding = np.mean(recent, axis=0)
                self.say(f"    {self.step}: hidden {hidden:.3f}, cosine {1 - embedding:.3f}")
                recent.clear()
                self._save(optimiser)

    def _gradients(
        self, low: BertModel, lowered: list[torch.Tensor], batch: Batch
    ) -> tuple[list[float], tuple[torch.Tensor, ...]]:
        """Return the losses on a batch, and the gradients of their sum.

        `similarity_loss` is not among them: on batches this small its gradients are ten times
        those of the others and mostly noise: with it, embeddings hardly recover.
        """
        with torch.no_grad():
            theirs = self._teacher(**batch, output_hidden_states=True).hidden_states[1:]
        ours = low(**batch, output_hidden_states=True).hidden_states[1:]
        mask = batch["attention_mask"]
        left, right = pooled(ours[-1], mask), pooled(theirs[-1], mask)
        losses = (
            hidden_state_loss(ours, theirs, mask),
            embedding_loss(left, right),
        )
        return [each.item() for each in losses], torch.autograd.grad(sum(losses), lowered)

    def scores(self) -> Scores:
        return Scores.of(self._reference, self._encoder.embed(self._model, self._held_out))

    def say(self, text: str) -> None:
        print(f"{self.cpu_seconds() / 60:5.1f} min of CPU  {text}", flush=True)

    def cpu_seconds(self) -> float:
        return self._earlier + time.process_time()

    def _next(self) -> Batch:
        self._drawn += 1
        return next(self._batches)

    def _save(self, optimiser: torch.optim.Optimizer) -> None:
        state = {
            "model": self._model.state_dict(), "optimiser": optimiser.state_dict(),
            "step": self.step, "drawn": self._drawn,
            "seconds": self.cpu_seconds(),
        }  # fmt: skip
        partial = self._checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self._checkpoint)


def rate(step: int, steps: int) -> float:
    """Return the learning rate of one of so many steps: it rises quickly, and falls at the end."""
    return RATE * min(1.0, (step + 1) / WARM_UP, (1 - step / steps) / FALLING)


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask[:, :, None].float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)


class Encoder:
    """Sentences to batches, batches to embeddings."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.from_file(str(minilm.model_directory() / "tokenizer.json"))
        self._tokenizer.enable_truncation(TOKENS)
        self._tokenizer.no_padding()

    def batches(self, sentences: list[str]) -> Iterator[Batch]:
        """Yield batches of sentences of similar lengths."""
        ids = sorted((each.ids for each in self._tokenizer.encode_batch(sentences)), key=len)
        for start in range(0, len(ids), BATCH):
            yield padded(ids[start : start + BATCH])

    def endless(self, sentences: list[str]) -> Iterator[Batch]:
        """Yield such batches in random order, again and again."""
        ids = [each.ids for each in self._tokenizer.encode_batch(sentences)]
        generator = random.Random(SEED)
        while True:
            # A little noise on the lengths, so that other sentences meet each time.
            keys = [len(each) + generator.random() * 3 for each in ids]
            order = sorted(range(len(ids)), key=keys.__getitem__)
            starts = list(range(0, len(ids) - BATCH + 1, BATCH))
            generator.shuffle(starts)
            for start in starts:
                yield padded([ids[i] for i in order[start : start + BATCH]])

    @torch.no_grad()
    def embed(self, model: BertModel, sentences: list[str]) -> np.ndarray:
        """Return unit vectors, in the order of the sentences."""
        training = model.training
        model.eval()
        ids = [each.ids for each in self._tokenizer.encode_batch(sentences)]
        found = np.zeros((len(ids), model.config.hidden_size), np.float32)
        order = np.argsort([len(each) for each in ids], kind="stable")
        for start in range(0, len(ids), BATCH):
            chosen = order[start : start + BATCH]
            batch = padded([ids[i] for i in chosen])
            vectors = pooled(model(**batch).last_hidden_state, batch["attention_mask"])
            found[chosen] = torch.nn.functional.normalize(vectors).numpy()
        model.train(training)
        return found


def padded(rows: list[list[int]]) -> Batch:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


if __name__ == "__main__":
    try:
        typer.run(main)
    except SparseTvmError as error:
        sys.exit(f"error: {error}")
