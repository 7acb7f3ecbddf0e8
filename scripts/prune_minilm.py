"""Prune all-MiniLM-L6-v2 so that it stays good: by second order, then distillation.

The Optimal Brain Surgeon prunes on WordNet's glosses; training on them then brings the embeddings
of what is left near the unpruned model's, on two CPU cores. Only the encoder's layers, biases and
layer norms change; word embeddings stay the original's. An interrupted run goes on from its last
checkpoint.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import wordnet
from embedding_scores import Scores
from sentence_batches import BATCH, Batch, Encoder, pooled
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from sparse_tvm.errors import SparseTvmError
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
CHECKPOINT = 50
"""Steps between checkpoints."""
SEED = 0


def main(
    output: Annotated[Path, typer.Argument(help="The .npz of all that changed.")],
    structure: Annotated[str, typer.Option()] = "4x1",
    sparsity: Annotated[float, typer.Option()] = 0.9,
    steps: Annotated[int, typer.Option(min=1, help="Of distillation, all together.")] = 6000,
    directory: Annotated[Path, typer.Option("--wordnet")] = wordnet.DIRECTORY,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Prune MiniLM and write what changed."""
    torch.set_num_threads(threads)
    training, held_out = wordnet.glosses(directory)
    run = Run(training, held_out, output.with_suffix(".ckpt"))
    if not run.resumed:
        run.prune(Goal.parse(structure, sparsity))
    run.distil(steps)
    round_to_half(run.model)
    facts = {
        "structure": structure, "sparsity": sparsity, "steps": steps, "batch": BATCH, "seed": SEED,
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
        self._optimiser_state: dict[str, Any] = {}
        self.resumed = checkpoint.exists()
        if self.resumed:
            state = torch.load(checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            self._optimiser_state = state["optimiser"]
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

    def distil(self, steps: int) -> None:
        """Train the model to give its teacher's similarities and embeddings.

        The rate falls to zero at the end of so many steps.
        """
        targets = self._targets()
        shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(SEED))
        others = targets[shuffled[:OTHERS]]
        values = Values(self.model)
        optimiser = torch.optim.AdamW(
            values.trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        if self._optimiser_state:
            optimiser.load_state_dict(self._optimiser_state)
        batches = self._encoder.endless(self._training, SEED, skip=self.step)
        recent = []
        for step in range(self.step, steps):
            chosen, batch = next(batches)
            losses = self._losses(values.model, batch, targets[chosen], others)
            recent.append([each.item() for each in losses])
            values.take(torch.autograd.grad(sum(losses), values.computed))
            torch.nn.utils.clip_grad_norm_(values.trained, 1.0)
            optimiser.param_groups[0]["lr"] = rate(step, steps)
            optimiser.step()
            values.give(values.model)
            self.step = step + 1
            if self.step % CHECKPOINT == 0 or self.step == steps:
                values.give(self.model)
                shown = ", ".join(f"{each:.3f}" for each in np.mean(recent, axis=0))
                self.say(f"    {self.step}: losses {shown}")
                recent.clear()
                self._optimiser_state = optimiser.state_dict()
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
            "model": self.model.state_dict(), "optimiser": self._optimiser_state,
            "step": self.step, "seconds": self.cpu_seconds(),
        }  # fmt: skip
        partial = self._checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self._checkpoint)


class Values:
    """What trains: float32 values that an optimiser moves, for a bfloat16 model that computes.

    Of matrices only the values that are not zero: zeros are nowhere that training could move them,
    and the optimiser has a tenth of the work.
    """

    def __init__(self, model: BertModel) -> None:
        self.model = copy.deepcopy(model).bfloat16()
        self._names = [name for name, each in model.named_parameters() if each.requires_grad]
        self.computed = [self.model.get_parameter(name) for name in self._names]
        self.trained: list[torch.Tensor] = []
        self._places: list[torch.Tensor] = []
        for name in self._names:
            parameter = model.get_parameter(name).detach()
            trains = parameter != 0 if parameter.ndim == 2 else torch.ones_like(parameter)
            places = trains.flatten().nonzero().flatten()
            self._places.append(places)
            self.trained.append(parameter.flatten()[places].requires_grad_())

    def take(self, gradients: Iterable[torch.Tensor]) -> None:
        """Take the gradients of the parameters that computed."""
        for value, places, gradient in zip(self.trained, self._places, gradients, strict=True):
            value.grad = gradient.flatten()[places].float()

    def give(self, model: BertModel) -> None:
        """Write the values to a model of any precision."""
        with torch.no_grad():
            for name, value, places in zip(self._names, self.trained, self._places, strict=True):
                parameter = model.get_parameter(name)
                parameter.view(-1)[places] = value.to(parameter.dtype)


def rate(step: int, steps: int) -> float:
    """Return the learning rate of one of so many steps: it rises quickly, and falls at the end."""
    return RATE * min(1.0, (step + 1) / WARM_UP, (1 - step / steps) / FALLING)


if __name__ == "__main__":
    try:
        typer.run(main)
    except SparseTvmError as error:
        sys.exit(f"error: {error}")
