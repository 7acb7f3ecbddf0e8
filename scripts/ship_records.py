"""Tune the layers whose records come with the package, on a CPU of the family they are for.

    python scripts/ship_records.py work     # half an hour; measures nothing in work/ again

Every kernel of the models below is tuned on one thread, with nothing else running. Of each the
fastest layouts, and those that they have to beat, come into ``schedules/records/``, in a file that
is named as LLVM names the CPU: if the whole model is faster by them, both artifacts taking turns.
What a kernel gains alone, a few per cent, it may not gain in a model. To be run again when kernels
change.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import onnx
import typer
from check_tuning import gain, progress

import sparse_tvm
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.operators import Layout
from sparse_tvm.tuning.kernel import Kernel
from sparse_tvm.tuning.records import Record, append_record, read_records, tidy
from sparse_tvm.tuning.shipped import shipped_file
from sparse_tvm.tuning.tuner import tune

MODELS = {"bert-base": partial(build_bert, BertConfig())}
PRUNING = tuple(
    (sparsity, structure) for sparsity in (0.9, 0.8, 0.95) for structure in ("unstructured", "4x1")
)
TRIALS = 64
WORTH = 1.02
"""How many times as fast by its records a model has to be."""

FASTEST = 4
"""How many of the fastest layouts of a kernel are kept."""


def pruned(name: str, sparsity: float, structure: str, work: Path) -> Path:
    """A model's file, made if it is not there."""
    path = work / f"{name}-{sparsity:.0%}-{structure}.onnx"
    if not path.exists():
        unpruned = work / f"{name}.onnx"
        onnx.save(MODELS[name](), unpruned)
        sparse_tvm.prune(unpruned, path, sparsity=sparsity, structure=structure)
    return path


def kept(kernel: Kernel) -> set[Layout]:
    """Layouts of a kernel that a choice is made among."""
    fastest = sorted(kernel.measured, key=kernel.slower)
    usual = sorted(kernel.compared, key=lambda layout: kernel.predicted[layout][0])
    found = {kernel.untuned, *fastest[:FASTEST]}
    for sparse in (False, True):
        for order in (fastest, usual):
            found |= set([one for one in order if one.sparse == sparse][:1])
    return found & kernel.measured.keys()


def shipped(kernels: list[Kernel], records: Path) -> Iterator[Record]:
    """The records of what is kept of tuned kernels."""
    for record in read_records([records]):
        if any(
            record.problem == kernel.layer.problem and record.layout in kept(kernel)
            for kernel in kernels
        ):
            yield record


def main(
    work: Annotated[Path, typer.Argument(help="Where models and all records are kept.")],
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    file = shipped_file()
    file.unlink(missing_ok=True)  # what is worth it no more goes
    for name in MODELS:
        for sparsity, structure in PRUNING:
            model = pruned(name, sparsity, structure, work)
            records = model.with_suffix(".jsonl")
            tuned = tune(
                model, records, trials=TRIALS, threads=[1], operators=False, progress=progress
            )
            factor = gain(model, work, threads=1, duration=5.0)
            stdout_console().print(f"{model.stem}: {factor:.3f} times as fast as untuned")
            if factor < WORTH:
                continue
            file.parent.mkdir(exist_ok=True)
            for record in shipped(list(tuned.kernels), records):
                append_record(file, record)
            tidy(file)


if __name__ == "__main__":
    typer.run(main)
