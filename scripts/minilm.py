"""Make a real sentence encoder faster: compile it pruned, embed, compare with ONNX Runtime.

The pruned weights are in the repository; scripts/prune_minilm.py makes such.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

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
from sparse_tvm.models.packed import load_packed
from sparse_tvm.reference import Reference
from sparse_tvm.report.content import human_threads
from sparse_tvm.report.tables import human_bytes
from sparse_tvm.runtime import Model

SENTENCES = (
    "A man is eating food.",
    "A man eats something.",
    "A woman is playing the violin.",
    "Someone plays a string instrument.",
    "The new compiler skips the zeros of pruned networks.",
    "Networks run faster when unused weights are left out.",
    "A plane is taking off from the airport.",
    "An aircraft leaves the runway.",
)
"""In pairs of similar ones."""
LOWEST_COSINE = 0.9999
SECONDS = 3.0  # of timed runs per engine
ROOT = Path(__file__).resolve().parent.parent
PRUNED = ROOT / "examples" / "minilm" / "90-4x1.npz"
WORKDIR = ROOT / "build" / "minilm"


def main(
    threads: Annotated[int, typer.Option(min=1, help="Of both engines.")] = usable_cores(),
    sequence: Annotated[int, typer.Option(min=8, max=512, help="Tokens per sentence.")] = 128,
    weights: Annotated[Path, typer.Option(help="Of scripts/prune_minilm.py.")] = PRUNED,
    workdir: Annotated[Path, typer.Option(help="Where the models and model.so go.")] = WORKDIR,
) -> None:
    """Compile a pruned all-MiniLM-L6-v2 and compare it with ONNX Runtime, on real sentences."""
    workdir.mkdir(parents=True, exist_ok=True)
    dense, pruned = workdir / "minilm.onnx", workdir / "pruned.onnx"
    artifact = workdir / "model.so"

    with PhaseProgress(stderr_console()) as progress:
        progress("build all-MiniLM-L6-v2, unpruned and pruned")
        onnx.save(minilm.build_minilm(sequence=sequence), dense)
        onnx.save(minilm.build_minilm(sequence=sequence, pruned=weights), pruned)
        _, facts = load_packed(weights)
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
        f"all-MiniLM-L6-v2, {facts['sparsity']:.0%} pruned in {facts['structure']} blocks, "
        f"1 x {sequence} tokens, {human_threads(threads)}"
    )
    console.print(speed_table(times, pruned, artifact))
    print_neighbours(console, ours, unpruned, facts)
    cosine = (ours * theirs).sum(axis=1).min()
    console.print(f"Lowest cosine similarity of our embeddings with ONNX Runtime's: {cosine:.6f}")
    console.print(f"Compiled model: {artifact}", soft_wrap=True)
    if cosine < LOWEST_COSINE:
        sys.exit(f"error: embeddings differ from ONNX Runtime's: cosine {cosine:.6f}")


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


def print_neighbours(
    console: Console, pruned: np.ndarray, unpruned: np.ndarray, facts: dict[str, Any]
) -> None:
    """Print each sentence's nearest other by both models, and how near their embeddings are."""
    numbers = ("", "pruned", "unpruned", "cosine")
    table = plain_table("", "sentence", *numbers[1:], numbers=numbers)
    cosines = (pruned * unpruned).sum(axis=1)
    rows = zip(SENTENCES, nearest(pruned), nearest(unpruned), cosines, strict=True)
    for number, (sentence, ours, theirs, cosine) in enumerate(rows, 1):
        table.add_row(str(number), sentence, str(ours + 1), str(theirs + 1), f"{cosine:.3f}")
    console.print(
        "Nearest sentence by pruned and unpruned model, and cosine similarity of their embeddings"
    )
    console.print(table)
    console.print(
        f"On 1,000 held-out glosses: Spearman of similarities {facts['spearman']:.2f}, "
        f"cosine {facts['cosine']:.2f}, same nearest {facts['neighbours']:.0%}"
    )


def nearest(vectors: np.ndarray) -> list[int]:
    """Return, for each unit vector ``[sentences, features]``, the most similar other one."""
    similarities = vectors @ vectors.T
    np.fill_diagonal(similarities, -2)
    return [int(index) for index in similarities.argmax(axis=1)]


if __name__ == "__main__":
    try:
        typer.run(main)
    except SparseTvmError as error:
        sys.exit(f"error: {error}")
