"""Prune all-MiniLM-L6-v2 so that it stays good: second-order rounds with distillation between.

Each round prunes a part by the Optimal Brain Surgeon on WordNet's glosses, then trains what is
left to give the unpruned model's hidden states and similarities, on two CPU cores. Only the
encoder's layers, biases and layer norms change; embeddings stay the original's.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

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
from sparse_tvm.sparsity.pattern import Goal
from sparse_tvm.torch import (
    Pruner,
    embedding_loss,
    hidden_state_loss,
    prune_with_data,
    similarity_loss,
)

ROUNDS = ((0.75, 0.25), (1.0, 0.75))
"""How far each round goes on the way (as a share of the final sparsity), and its share of steps.

The first goes furthest, while there is much to spare.
"""
CALIBRATION, BATCH, TOKENS = 512, 64, 48
RATE, WARM_UP = 5e-4, 50
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
    started = time.perf_counter()
    torch.manual_seed(SEED)
    torch.set_num_threads(threads)
    training, held_out = wordnet.glosses(directory)
    encoder = Encoder()
    teacher, model = load(), load()
    for parameter in (*teacher.parameters(), *model.embeddings.parameters()):
        parameter.requires_grad_(False)
    reference = encoder.embed(teacher, held_out)
    calibration = list(encoder.batches(training[:CALIBRATION]))
    pruner = Pruner(model, structure=structure, sparsity=sparsity, layers="^encoder")
    batches = encoder.endless(training)
    for index, (share, part) in enumerate(ROUNDS):
        goals = {n: Goal.parse(structure, share * sparsity) for n in pruner.layers}
        model.eval()
        errors = prune_with_data(model, teacher, goals, calibration, dtype=torch.bfloat16)
        pruner.keep_zeros()
        mean = np.mean(list(errors.values()))
        say(started, f"{share * sparsity:.0%}: mean layer error {mean:.3f}")
        say(started, f"  pruned:    {Scores.of(reference, encoder.embed(model, held_out))}")
        last = index == len(ROUNDS) - 1
        distil(model, teacher, batches, round(part * steps), decays=last, started=started)
        say(started, f"  distilled: {Scores.of(reference, encoder.embed(model, held_out))}")
    pruner.finish()
    scores = Scores.of(reference, encoder.embed(model.eval(), held_out))
    facts = {
        "structure": structure, "sparsity": sparsity, "steps": steps, "seed": SEED,
        "minutes": round((time.perf_counter() - started) / 60, 1), **vars(scores),
    }  # fmt: skip
    changed = {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        if name.startswith("encoder.")
    }
    np.savez(output, **changed, facts=np.array(json.dumps(facts)))
    say(started, json.dumps(facts))


def load() -> BertModel:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # PyTorch's fused attention has a slow backward pass for short sequences.
    return BertModel.from_pretrained(
        minilm.model_directory(), add_pooling_layer=False, attn_implementation="eager"
    ).eval()


def say(started: float, text: str) -> None:
    minutes = (time.perf_counter() - started) / 60
    print(f"{minutes:5.1f} min, {time.process_time() / 60:4.1f} of CPU  {text}", flush=True)


def distil(
    model: BertModel,
    teacher: BertModel,
    batches: Iterator[Batch],
    steps: int,
    *,
    decays: bool,
    started: float,
) -> None:
    """Train a model to give its teacher's hidden states, embeddings and similarities."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * (1 - step / steps if decays else 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    for step in range(steps):
        batch = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                theirs = teacher(**batch, output_hidden_states=True).hidden_states[1:]
            ours = model(**batch, output_hidden_states=True).hidden_states[1:]
        mask = batch["attention_mask"]
        left, right = pooled(ours[-1], mask), pooled(theirs[-1], mask)
        hidden = hidden_state_loss(ours, theirs, mask)
        similar = similarity_loss(left, right)
        loss = hidden + similar + embedding_loss(left, right)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            say(started, f"    {step + 1}: hidden {hidden:.3f}, similarity {similar:.3f}")


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
