"""A small convolutional network dense, pruned, and trained on: accuracy beside latency.

On scikit-learn's handwritten digits. Training and timing are two commands, so that timing can have
the machine to itself:

    python scripts/bench_digits.py train
    python scripts/bench_digits.py table
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from sklearn.datasets import load_digits
from torch import nn

import sparse_tvm
from sparse_tvm.cpu import usable_cores
from sparse_tvm.errors import SparseTvmError
from sparse_tvm.interleave import interleave
from sparse_tvm.reference import Reference
from sparse_tvm.sparsity.pattern import Goal
from sparse_tvm.torch import Pruner, logit_loss

GOALS = {"2:4": None, "4x1": 0.9, "unstructured": 0.9}
"""Sparsity by structure; 2:4 implies it."""
EXCLUDE = "first|last"
BATCH, EPOCHS, RATE = 64, 15, 2e-3
SECONDS, SEED = 2.0, 0
WORKDIR = Path(__file__).resolve().parent.parent / "build" / "digits"

app = typer.Typer(add_completion=False)


class Digits(nn.Module):
    """A small convolutional network for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 64, 3, padding=1)
        self.third = nn.Conv2d(64, 128, 3, padding=1)
        self.hidden = nn.Linear(128 * 4, 256)
        self.last = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x = nn.functional.max_pool2d(self.second(self.first(x).relu()).relu(), 2)
        x = nn.functional.max_pool2d(self.third(x).relu(), 2)
        return self.last(self.hidden(x.flatten(1)).relu())


Data = tuple[torch.Tensor, torch.Tensor]


def data() -> tuple[Data, Data]:
    """Return images ``[samples, 1, 8, 8]`` and classes to train with, and a third held out."""
    images, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(classes))
    x = torch.from_numpy(images[order].reshape(-1, 1, 8, 8) / 16).float()
    y = torch.from_numpy(classes[order]).long()
    count = len(y) // 3
    return (x[count:], y[count:]), (x[:count], y[:count])


@torch.no_grad()
def accuracy(model: nn.Module, test: Data) -> float:
    return float((model.eval()(test[0]).argmax(1) == test[1]).float().mean())


def fit(model: nn.Module, training: Data, teacher: nn.Module | None = None) -> None:
    """Train with labels, and to give a teacher's logits if there is one."""
    images, classes = training
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    steps = EPOCHS * -(-len(classes) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps)
    model.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(classes)).split(BATCH):
            logits = model(images[chosen])
            loss = nn.functional.cross_entropy(logits, classes[chosen])
            if teacher is not None:
                with torch.no_grad():
                    theirs = teacher(images[chosen])
                loss = loss + logit_loss(logits, theirs)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


@app.command()
def train(
    threads: Annotated[int, typer.Option(min=1)] = usable_cores(),
    workdir: Annotated[Path, typer.Option()] = WORKDIR,
) -> None:
    """Train, prune, train on and compile."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    workdir.mkdir(parents=True, exist_ok=True)
    training, test = data()
    inputs = (test[0][:BATCH],)
    dense = Digits()
    fit(dense, training)
    rows = {"dense": {"dense": accuracy(dense, test)}}
    torch.onnx.export(dense, inputs, workdir / "dense.onnx", verbose=False)
    sparse_tvm.compile(dense, workdir / "dense.so", example_inputs=inputs, threads=threads)
    for structure, sparsity in GOALS.items():
        model = copy.deepcopy(dense)
        pruner = Pruner(model, structure=structure, sparsity=sparsity, exclude=EXCLUDE)
        pruner.prune_to(1.0)
        rows[structure] = {"pruned": accuracy(model, test)}
        fit(model, training, dense)
        pruner.finish()
        rows[structure]["trained"] = accuracy(model, test)
        artifact = workdir / f"{structure}.so"
        sparse_tvm.compile(model, artifact, example_inputs=inputs, threads=threads)
        print(structure, rows[structure], flush=True)
    (workdir / "scores.json").write_text(json.dumps(rows))


@app.command()
def table(
    threads: Annotated[int, typer.Option(min=1)] = usable_cores(),
    workdir: Annotated[Path, typer.Option()] = WORKDIR,
) -> None:
    """Time what `train` left and print the table of docs/pruning.md."""
    rows = json.loads((workdir / "scores.json").read_text())
    images = data()[1][0][:BATCH].numpy()
    reference = Reference(workdir / "dense.onnx", threads=threads)
    engines = {"ONNX Runtime": partial(reference.run, {reference.inputs[0]: images})}
    for row in rows:
        model = sparse_tvm.load(workdir / f"{row}.so", threads=threads)
        engines[row] = partial(model.run, images)
    times = interleave(engines, duration=SECONDS)
    base = statistics.median(times["ONNX Runtime"])
    print("| structure | sparsity | dense | pruned | trained on | p50 | gain |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row, scores in {"ONNX Runtime": {}, **rows}.items():
        p50 = statistics.median(times[row])
        sparsity = Goal.parse(row, GOALS[row]).sparsity if row in GOALS else 0
        stages = ("dense", "pruned", "trained")
        cells = [f"{scores[stage]:.1%}" if stage in scores else "" for stage in stages]
        print(
            f"| {row} | {sparsity:.0%} | {' | '.join(cells)} "
            f"| {1e3 * p50:.2f} ms | {base / p50:.1f}x |"
        )


if __name__ == "__main__":
    try:
        app()
    except SparseTvmError as error:
        sys.exit(f"error: {error}")
