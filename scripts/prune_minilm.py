"""Prune all-MiniLM-L6-v2 so that it stays good: by second order, then distillation.

The Optimal Brain Surgeon prunes on WordNet's glosses; training on them then brings the embeddings
of what is left near the unpruned model's, on two CPU cores. What is to be very sparse is pruned
further while it trains: `--start` is how far the Surgeon goes, and `--growth` lets blocks return.
Only the encoder's layers, biases and layer norms change; word embeddings stay the original's. An
interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import wordnet
from embedding_scores import Scores
from sentence_batches import BATCH, Batch, Encoder, pooled
from sparse_values import Values
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from sparse_tvm.errors import OptionError, SparseTvmError
from sparse_tvm.models import minilm
from sparse_tvm.models.packed import save_packed
from sparse_tvm.sparsity.pattern import Goal
from sparse_tvm.torch import (
    embedding_loss,
    prune_with_data,
    similarity_loss,
)
from sparse_tvm.torch.pruner import find_layers

CALIBRATION = 512
"""Glosses that the Optimal Brain Surgeon sees."""
OTHERS = 4096
"""Glosses whose similarities with each batch count."""
RATE, WARM_UP = 1.5e-3, 20
FALLING = 0.7
"""The share of steps, the last ones, in which the rate falls to zero."""
EVERY, GATHERED = 100, 10
"""Steps between moves of blocks, and the first of each round, whose gradients say what returns."""
PRUNED, SETTLED = 0.4, 0.6
"""The shares of steps after which the sparsity is reached, and after which no block moves."""
CHECKPOINT = 50
"""Steps between checkpoints."""
SEED = 0


def main(
    output: Annotated[Path, typer.Argument(help="The .npz of all that changed.")],
    structure: Annotated[str, typer.Option()] = "4x1",
    sparsity: Annotated[float, typer.Option()] = 0.9,
    steps: Annotated[int, typer.Option(min=1, help="Of distillation, all together.")] = 6000,
    start: Annotated[
        float | None, typer.Option(help="Sparsity at which training begins; all by default.")
    ] = None,
    growth: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of blocks that are exchanged at first.")
    ] = 0.0,
    directory: Annotated[Path, typer.Option("--wordnet")] = wordnet.DIRECTORY,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Prune MiniLM and write what changed."""
    torch.set_num_threads(threads)
    goal = Goal.parse(structure, sparsity)
    start = sparsity if start is None else start
    if (start != sparsity or growth) and (goal.pattern.n_m or goal.pattern.block[1] != 1):
        raise OptionError(
            f"blocks of {structure} cannot move while training",
            hint="leave out --start and --growth, or give unstructured or Rx1",
        )
    training, held_out = wordnet.glosses(directory)
    run = Run(training, held_out, output.with_suffix(".ckpt"))
    if not run.resumed:
        run.prune(Goal.parse(structure, start))
    run.distil(Course(steps, start, sparsity, growth), goal.pattern.block[0])
    round_to_half(run.model)
    facts = {
        "structure": structure, "sparsity": sparsity, "start": start, "growth": growth,
        "steps": steps, "batch": BATCH, "seed": SEED,
        "cpu_minutes": round(run.cpu_seconds() / 60, 1), **vars(run.scores()),
    }  # fmt: skip
    changed = {
        name: tensor.numpy()
        for name, tensor in run.model.state_dict().items()
        if name.startswith("encoder.")
    }
    save_packed(output, changed, "1x1" if structure == "unstructured" else structure, facts)
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


@dataclass(frozen=True)
class Course:
    """What happens at which step of distillation.

    `start` and `end` are sparsities; `exchanged` is the share of blocks that make room for others
    at the first move.
    """

    steps: int
    start: float
    end: float
    exchanged: float

    def rate(self, step: int) -> float:
        """Return the learning rate: it rises quickly, and falls at the end."""
        return RATE * min(1.0, (step + 1) / WARM_UP, (1 - step / self.steps) / FALLING)

    def gathers(self, step: int) -> bool:
        """Whether a step's gradients count for the next move."""
        anything = self.exchanged > 0 or self.start != self.end
        first, last = EVERY, self.steps * SETTLED + EVERY
        return anything and first <= step < last and step % EVERY < GATHERED

    def moves(self, step: int) -> bool:
        """Whether blocks move before the values do in a step."""
        return self.gathers(step) and step % EVERY == GATHERED - 1

    def sparsity(self, step: int) -> float:
        """Return the sparsity after a step's move: cubic, most at first."""
        left = max(0.0, 1 - step / (self.steps * PRUNED))
        return self.end + (self.start - self.end) * left**3

    def growth(self, step: int) -> float:
        """Return the share of blocks that are to be others after a step's move."""
        done = min(1.0, step / (self.steps * SETTLED))
        return self.exchanged * (1 + math.cos(math.pi * done)) / 2


class Run:
    """Pruning and distillation that can be interrupted.

    A checkpoint holds the model, the optimiser and the step, which says what data come next.
    """

    def __init__(self, training: list[str], held_out: list[str], checkpoint: Path) -> None:
        self._training, self._held_out, self._checkpoint = training, held_out, checkpoint
        self._encoder = Encoder()
        self._teacher, self.model = load(), load()
        for parameter in (*self._teacher.parameters(), *self.model.embeddings.parameters()):
            parameter.requires_grad_(False)
        self._reference = self._encoder.embed(self._teacher, held_out)
        self._earlier = 0.0
        self.step = 0
        self._values_state: dict[str, Any] = {}
        self.resumed = checkpoint.exists()
        if self.resumed:
            state = torch.load(checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            self._values_state = state["values"]
            self.step, self._earlier = state["step"], state["seconds"]

    def prune(self, goal: Goal) -> None:
        """Prune the encoder's layers, in one shot."""
        goals = dict.fromkeys(find_layers(self.model, "^encoder"), goal)
        calibration = list(self._encoder.batches(self._training[:CALIBRATION]))
        errors = prune_with_data(
            self.model, self._teacher, goals, calibration, dtype=torch.bfloat16
        )
        self.say(f"mean layer error {np.mean(list(errors.values())):.3f}")
        self.say(f"  pruned:    {self.scores()}")
        self._save()

    def distil(self, course: Course, rows: int) -> None:
        """Train the model to give its teacher's similarities and embeddings.

        Parameters
        ----------
        course : Course
            What happens when.
        rows : int
            Of a block of weights.
        """
        targets = self._targets()
        shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(SEED))
        others = targets[shuffled[:OTHERS]]
        values = Values(self.model, rows, self._values_state)
        batches = self._encoder.endless(self._training, SEED, skip=self.step)
        recent = []
        for step in range(self.step, course.steps):
            chosen, batch = next(batches)
            losses = self._losses(values.model, batch, targets[chosen], others)
            recent.append([each.item() for each in losses])
            gradients = torch.autograd.grad(sum(losses), values.computed)
            if course.gathers(step):
                values.gather(gradients)
            if course.moves(step):
                values.move(course.sparsity(step), course.growth(step))
            values.step(gradients, course.rate(step))
            self.step = step + 1
            if self.step % CHECKPOINT == 0 or self.step == course.steps:
                values.give(self.model)
                shown = ", ".join(f"{each:.3f}" for each in np.mean(recent, axis=0))
                self.say(f"    {self.step}: losses {shown}")
                recent.clear()
                self._values_state = values.state()
                self._save()
        self.say(f"  distilled: {self.scores()}")

    def _targets(self) -> torch.Tensor:
        """Return the teacher's embeddings of all glosses, which are computed once."""
        path = self._checkpoint.with_suffix(".teacher.npy")
        if not path.exists():
            teacher = copy.deepcopy(self._teacher).bfloat16()
            with path.with_suffix(".part").open("wb") as file:
                np.save(file, self._encoder.embed(teacher, self._training).astype(np.float16))
            path.with_suffix(".part").replace(path)
        return torch.from_numpy(np.load(path).astype(np.float32))

    @staticmethod
    def _losses(
        student: BertModel, batch: Batch, targets: torch.Tensor, others: torch.Tensor
    ) -> list[torch.Tensor]:
        """Return the losses on a batch: of similarities and of embeddings.

        Hidden states are not among them: so few weights cannot follow each layer, and where only
        the last counts, training gets further in less time.
        """
        hidden = student(**batch).last_hidden_state
        embeddings = pooled(hidden, batch["attention_mask"])
        return [similarity_loss(embeddings, targets, others), embedding_loss(embeddings, targets)]

    def scores(self) -> Scores:
        return Scores.of(self._reference, self._encoder.embed(self.model, self._held_out))

    def say(self, text: str) -> None:
        print(f"{self.cpu_seconds() / 60:5.1f} min of CPU  {text}", flush=True)

    def cpu_seconds(self) -> float:
        return self._earlier + time.process_time()

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(), "values": self._values_state,
            "step": self.step, "seconds": self.cpu_seconds(),
        }  # fmt: skip
        partial = self._checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self._checkpoint)


if __name__ == "__main__":
    try:
        typer.run(main)
    except SparseTvmError as error:
        sys.exit(f"error: {error}")
