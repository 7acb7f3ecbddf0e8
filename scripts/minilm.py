"""Make a real sentence encoder faster: build, prune, compile, embed, compare with ONNX Runtime."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from rich.console import Console
from rich.table import Table

import sparse_tvm
from sparse_tvm.cli.console import stderr_console, stdout_console
from sparse_tvm.cli.progress import PhaseProgress
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import usable_cores
from sparse_tvm.errors import SparseTvmError
from sparse_tvm.interleave import interleave
from sparse_tvm.models import minilm
from sparse_tvm.reference import Reference
from sparse_tvm.report.tables import human_bytes
from sparse_tvm.runtime import Model

SENTENCES = (
    "A man is eating food.",
    "A man eats something.",
    "A woman is playing the violin.",
    "Someone plays a string instrument.",
    "The new compiler skips the zeros of pruned networks.",
    "A plane is taking off from the airport.",
)
SPARSITY, STRUCTURE = 0.9, "4x1"
LOWEST_COSINE = 0.9999
SECONDS = 3.0  # of timed runs per engine
WORKDIR = Path(__file__).resolve().parent.parent / "build" / "minilm"


def main(
    threads: Annotated[int, typer.Option(min=1, help="Of both engines.")] = usable_cores(),
    sequence: Annotated[int, typer.Option(min=8, max=512, help="Tokens per sentence.")] = 128,
    workdir: Annotated[Path, typer.Option(help="Where the models and model.so go.")] = WORKDIR,
) -> None:
    """Compile a pruned all-MiniLM-L6-v2 and compare it with ONNX Runtime, on real sentences."""
    workdir.mkdir(parents=True, exist_ok=True)
    dense, pruned = workdir / "minilm.onnx", workdir / "pruned.onnx"
    artifact = workdir / "model.so"

    with PhaseProgress(stderr_console()) as progress:
        progress("build all-MiniLM-L6-v2")
        onnx.save(minilm.build_minilm(sequence=sequence), dense)
        progress(f"prune {SPARSITY:.0%} in {STRUCTURE} blocks")
        sparse_tvm.prune(dense, pruned, sparsity=SPARSITY, structure=STRUCTURE)
        sparse_tvm.compile(
            pruned, artifact, threads=threads, progress=lambda name: progress(f"compile: {name}")
        )
        progress("embed sentences")
        model = sparse_tvm.load(artifact, threads=threads)
        reference = Reference(pruned, threads=threads)
        ours = embed_with(model, sequence)
        theirs = embed_with(reference, sequence)
        unpruned = embed_with(Reference(dense, threads=threads), sequence)

        progress("measure")
        feed = minilm.tokenize(SENTENCES[:1], sequence=sequence)
        times = interleave(
            {"ONNX Runtime": lambda: reference.run(feed), "sparse-tvm": lambda: model.run(feed)},
            duration=SECONDS,
        )

    console = stdout_console()
    console.print(
        f"all-MiniLM-L6-v2, {SPARSITY:.0%} pruned in {STRUCTURE} blocks, "
        f"1 x {sequence} tokens, {threads} threads"
    )
    console.print(speed_table(times, pruned, artifact))
    cosine = (ours * theirs).sum(axis=1)
    print_embeddings(console, cosine, (ours * unpruned).sum(axis=1))
    console.print(f"Compiled model: {artifact}", soft_wrap=True)
    if cosine.min() < LOWEST_COSINE:
        sys.exit(f"error: embeddings differ from ONNX Runtime's: cosine {cosine.min():.6f}")


def embed_with(model: Model | Reference, sequence: int) -> np.ndarray:
    return minilm.embed(
        lambda feed: model.run(feed)["last_hidden_state"], SENTENCES, sequence=sequence
    )


def speed_table(times: dict[str, list[float]], pruned: Path, artifact: Path) -> Table:
    theirs, ours = (1e3 * statistics.median(times[name]) for name in ("ONNX Runtime", "sparse-tvm"))
    sizes = [path.stat().st_size for path in (pruned, artifact)]
    table = plain_table(
        "same pruned model", *times, "gain", numbers=("ONNX Runtime", "sparse-tvm", "gain")
    )
    table.add_row(
        "latency p50", f"{theirs:.2f} ms", f"{ours:.2f} ms", f"{theirs / ours:.1f}x faster"
    )
    table.add_row(
        "file", *(human_bytes(size) for size in sizes), f"{sizes[0] / sizes[1]:.1f}x smaller"
    )
    return table


def print_embeddings(console: Console, same: np.ndarray, unpruned: np.ndarray) -> None:
    columns = ("same pruned model", "unpruned model")
    table = plain_table("sentence", *columns, numbers=columns)
    for sentence, *cosines in zip(SENTENCES, same, unpruned, strict=True):
        table.add_row(sentence, *(f"{cosine:.6f}" for cosine in cosines))
    console.print("Cosine similarity of our embeddings with ONNX Runtime's")
    console.print(table)
    console.print(
        "Pruning by magnitude without retraining costs accuracy (right column): "
        "the speed is real, these weights need fine-tuning."
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except SparseTvmError as error:
        sys.exit(f"error: {error}")
