"""Small classifiers dense, pruned, and trained on: accuracy beside latency.

A convolutional network for scikit-learn's handwritten digits, and a BERT that sorts WordNet's
glosses. Training and timing are two commands, so that timing can have the machine to itself:

    python scripts/bench_classifiers.py train glosses
    python scripts/bench_classifiers.py table glosses
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from classification_tasks import SEED, TASKS, Examples, Task
from torch import nn

import sparse_tvm
from sparse_tvm.cpu import cpu_model
from sparse_tvm.errors import SparseTvmError
from sparse_tvm.interleave import interleave
from sparse_tvm.reference import Reference
from sparse_tvm.report.content import human_threads
from sparse_tvm.sparsity.pattern import Goal, Pattern
from sparse_tvm.torch import Pruner, logit_loss

STRUCTURES = ("2:4", "4x1", "unstructured")
PRUNED = 0.5
"""The share of the steps after which the sparsity is reached."""
SECONDS = 2.0
"""Of timed runs of each engine."""
WORKDIR = Path(__file__).resolve().parent.parent / "build" / "classifiers"

Name = Annotated[Literal["digits", "glosses"], typer.Argument(help="What is classified.")]
Threads = Annotated[
    int, typer.Option(min=1, help="By default one: small batches gain little by more.")
]
Workdir = Annotated[Path, typer.Option()]

app = typer.Typer(add_completion=False)


def goal_of(task: Task, structure: str) -> Goal:
    return Goal.parse(structure, None if Pattern.parse(structure).n_m else task.sparsity)


@torch.no_grad()
def accuracy(network: nn.Module, held_out: Examples, batch: int) -> float:
    network.eval()
    found = [network(*held_out[chosen].inputs).argmax(1) for chosen in slices(held_out, batch)]
    return float((torch.cat(found) == held_out.classes).float().mean())


def slices(examples: Examples, batch: int) -> list[torch.Tensor]:
    return list(torch.arange(len(examples.classes)).split(batch))


def steps_of(task: Task, training: Examples) -> int:
    return task.epochs * len(slices(training, task.batch))


def fit(
    network: nn.Module,
    task: Task,
    training: Examples,
    teacher: nn.Module | None = None,
    pruner: Pruner | None = None,
) -> None:
    """Train with labels, and to give a teacher's logits if there is one; prune on the way."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=task.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, task.rate, steps_of(task, training))
    network.train()
    for _ in range(task.epochs):
        for chosen in torch.randperm(len(training.classes)).split(task.batch):
            examples = training[chosen]
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(*examples.inputs).float()
                loss = nn.functional.cross_entropy(logits, examples.classes)
                if teacher is not None:
                    with torch.no_grad():
                        theirs = teacher(*examples.inputs)
                    loss = loss + logit_loss(logits, theirs)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if pruner is not None:
                pruner.step()


@app.command()
def train(name: Name, threads: Threads = 1, workdir: Workdir = WORKDIR) -> None:
    """Train, prune, train on and compile."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    task, directory = TASKS[name], workdir / name
    directory.mkdir(parents=True, exist_ok=True)
    training, held_out = task.data()
    inputs = held_out[: task.timed].inputs
    scored = partial(accuracy, held_out=held_out, batch=task.batch)
    dense = task.network()
    fit(dense, task, training)
    rows = {"dense": {"dense": scored(dense)}}
    say(f"dense {rows['dense']}")
    torch.onnx.export(dense, inputs, directory / "dense.onnx", verbose=False)
    sparse_tvm.compile(dense, directory / "dense.so", example_inputs=inputs, threads=threads)
    for structure in STRUCTURES:
        network, pruner = pruned_copy(dense, task, structure)
        pruner.prune_to(1.0)
        rows[structure] = {"pruned": scored(network)}
        steps = int(PRUNED * steps_of(task, training))
        network, pruner = pruned_copy(dense, task, structure, steps=steps)
        fit(network, task, training, dense, pruner)
        pruner.finish()
        rows[structure]["trained"] = scored(network)
        artifact = directory / f"{structure}.so"
        sparse_tvm.compile(network, artifact, example_inputs=inputs, threads=threads)
        say(f"{structure} {rows[structure]}")
    (directory / "scores.json").write_text(json.dumps(rows))


def pruned_copy(
    dense: nn.Module, task: Task, structure: str, **schedule: Any
) -> tuple[nn.Module, Pruner]:
    """Return a copy of a network, and the pruner of it that `schedule` has options for."""
    network, goal = copy.deepcopy(dense), goal_of(task, structure)
    pruner = Pruner(
        network, structure=structure, sparsity=goal.sparsity, exclude=task.exclude, **schedule
    )
    return network, pruner


def say(text: str) -> None:
    print(f"{time.process_time() / 60:5.1f} min of CPU  {text}", flush=True)


@app.command()
def table(name: Name, threads: Threads = 1, workdir: Workdir = WORKDIR) -> None:
    """Time what `train` left and print the table of docs/pruning.md."""
    task, directory = TASKS[name], workdir / name
    rows = json.loads((directory / "scores.json").read_text())
    samples = task.data()[1][: task.timed].inputs
    reference = Reference(directory / "dense.onnx", threads=threads)
    feed = {name: each.numpy() for name, each in zip(reference.inputs, samples, strict=True)}
    engines = {"ONNX Runtime": partial(reference.run, feed)}
    for row in rows:
        model = sparse_tvm.load(directory / f"{row}.so", threads=threads)
        engines[row] = partial(model.run, feed)
    times = interleave(engines, duration=SECONDS)
    base = statistics.median(times["ONNX Runtime"])
    print(f"{cpu_model()}, {human_threads(threads)}, {task.timed} samples\n")
    print("| structure | sparsity | dense | pruned | trained on | p50 | gain |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row, scores in {"ONNX Runtime": {}, **rows}.items():
        p50 = statistics.median(times[row])
        sparsity = goal_of(task, row).sparsity if row in STRUCTURES else 0
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
