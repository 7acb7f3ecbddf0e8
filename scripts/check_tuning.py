"""Check tuning: how near the best of all candidates it comes, and what a model gains.

    python scripts/check_tuning.py work            # one kind of layer of each model: minutes
    python scripts/check_tuning.py work --whole    # every kernel: hours

Two models are tuned with at most so many trials per kernel, and then every candidate that is left
is measured too. Printed is how much slower than the best of all the tuned choice is, kernel by
kernel, and how long the whole model takes untuned and tuned, both taking turns in one run. What is
in the work directory is not measured again. The exit code is 1 where a kernel is over 5 % from the
best, or the tuned model is slower.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import onnx
import typer

import sparse_tvm
from sparse_tvm.cli.console import stderr_console, stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cli.tune import layout_name
from sparse_tvm.cpu import cpu_model
from sparse_tvm.interleave import interleave
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.models.convnets import build_mobilenet_v2
from sparse_tvm.random_inputs import random_inputs
from sparse_tvm.tuning.kernel import Kernel
from sparse_tvm.tuning.rest import ScheduleTrial
from sparse_tvm.tuning.throttling import Notice
from sparse_tvm.tuning.tuner import Trial, tune

NEAR = 0.05
"""How much slower than the best of all a tuned kernel may be."""

NOISE = 0.01
"""By how much the tuned model may seem slower where both artifacts are the same."""

EVERYTHING = 10_000


@dataclass(frozen=True)
class Subject:
    """A model, and a regular expression for a few of its layers."""

    title: str
    build: Callable[[], onnx.ModelProto]
    sparsity: float
    few: str


SUBJECTS = {
    "bert": Subject(
        "BERT-base, 90 % unstructured", partial(build_bert, BertConfig()), 0.9, "inter"
    ),
    "mobilenet_v2": Subject(
        "MobileNetV2", build_mobilenet_v2, 0.0, r"block1[12]\.(expand|project)"
    ),
}


def progress(trial: Trial | ScheduleTrial | Notice) -> None:
    if isinstance(trial, Notice):
        stderr_console().print(trial.text, soft_wrap=True)
        return
    assert isinstance(trial, Trial)
    kernel, layout = trial.kernel, trial.layout
    took = trial.records[0].seconds
    text = f"{kernel.layer.title}: {layout_name(layout)} {(took or 0) * 1e6:.4g} us"
    stderr_console().print(f"{text}; at most {trial.left} left", soft_wrap=True)


def model_of(subject: Subject, path: Path) -> Path:
    """The model's file, made if it is not there."""
    if not path.exists():
        onnx.save(subject.build(), path)
        if subject.sparsity:
            sparse_tvm.prune(path, path, sparsity=subject.sparsity)
    return path


def distances(
    model: Path, work: Path, trials: int, threads: int, layers: str | None
) -> list[tuple[Kernel, Kernel]]:
    """Every kernel after tuning, and after all its candidates were measured."""
    records, everything = work / f"{model.stem}.jsonl", work / f"{model.stem}-all.jsonl"
    search = partial(
        tune, model, layers=layers, threads=[threads], progress=progress, operators=False
    )
    tuned = search(records, trials=trials)
    if not everything.exists():
        shutil.copyfile(records, everything)
    exhaustive = search(everything, trials=EVERYTHING, exhaustive=True)
    return list(zip(tuned.kernels, exhaustive.kernels, strict=True))


def gain(model: Path, work: Path, threads: int, duration: float) -> float:
    """How many times as fast as untuned the tuned model is, in one run."""
    artifacts = {"untuned": [], "tuned": [work / f"{model.stem}.jsonl"]}
    engines = {}
    for name, records in artifacts.items():
        path = work / f"{model.stem}-{name}.so"
        sparse_tvm.compile(
            model, path, threads=threads, records=records, verify=False, shipped_records=False
        )
        engines[name] = sparse_tvm.load(path, threads=threads)
    inputs = random_inputs(engines["tuned"].inputs)
    runs = {name: partial(engine.run, inputs) for name, engine in engines.items()}
    times = {
        name: statistics.median(found)
        for name, found in interleave(runs, duration=duration).items()
    }
    stdout_console().print(", ".join(f"{name} {one * 1e3:.2f} ms" for name, one in times.items()))
    return times["untuned"] / times["tuned"]


def main(
    work: Annotated[Path, typer.Argument(help="Where models, records and artifacts are kept.")],
    models: Annotated[list[str] | None, typer.Argument(help="All by default.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Every kernel of the models.")] = False,
    trials: Annotated[int, typer.Option(help="Candidates of a kernel, at most.")] = 64,
    threads: int = 1,
    duration: Annotated[float, typer.Option(help="Seconds to time each artifact.")] = 5.0,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    console, failed = stdout_console(), False
    for name in models or SUBJECTS:
        subject = SUBJECTS[name]
        model = model_of(subject, work / f"{name}.onnx")
        columns = ("tried", "candidates", "slower than the best")
        table = plain_table(subject.title, "tuned", "best", *columns, numbers=columns)
        for tuned, everything in distances(
            model, work, trials, threads, None if whole else subject.few
        ):
            assert tuned.best is not None
            assert everything.best is not None
            lost = everything.slower(tuned.best) - 1
            failed |= lost > NEAR or tuned.tried > trials
            names = layout_name(tuned.best), layout_name(everything.best)
            counts = str(tuned.tried), str(everything.tried)
            table.add_row(tuned.layer.title, *names, *counts, f"{lost:.1%}")
        console.print(f"{cpu_model()}, {threads} threads", table)
        factor = gain(model, work, threads, duration)
        console.print(f"{subject.title}: {factor:.3f} times as fast tuned as untuned")
        failed |= factor < 1 - NOISE
    sys.exit(failed)


if __name__ == "__main__":
    typer.run(main)
