"""Make a real sentence encoder faster: build, prune, compile, embed, compare with ONNX Runtime."""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnxruntime
import typer
from interleaved import interleave, onnx_runtime_session
from rich.console import Console
from rich.table import Table

import sparse_tvm
from sparse_tvm.cli.console import stderr_console, stdout_console
from sparse_tvm.cli.progress import PhaseProgress
from sparse_tvm.models import minilm

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
WORKDIR = Path(__file__).resolve().parent.parent / "build" / "minilm"


def main(
    threads: Annotated[int, typer.Option(min=1, help="Of both engines.")] = len(
        os.sched_getaffinity(0)
    ),
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
        session = onnx_runtime_session(pruned, threads)
        ours = minilm.embed(
            lambda feed: model.run(feed)["last_hidden_state"], SENTENCES, sequence=sequence
        )
        theirs = embed_with(session, sequence)
        unpruned = embed_with(onnx_runtime_session(dense, threads), sequence)

        progress("measure")
        feed = minilm.tokenize(SENTENCES[:1], sequence=sequence)
        times = interleave(
            {
                "ONNX Runtime": lambda: session.run(None, feed),
                "sparse-tvm": lambda: model.run(feed),
            },
            rounds=20,
        )

    console = stdout_console()
    console.print(speed_table(times, pruned, artifact, threads, sequence))
    cosine = (ours * theirs).sum(axis=1)
    print_embeddings(console, cosine, (ours * unpruned).sum(axis=1))
    console.print(f"Compiled model: {artifact}", soft_wrap=True)
    if cosine.min() < LOWEST_COSINE:
        sys.exit(f"error: embeddings differ from ONNX Runtime's: cosine {cosine.min():.6f}")


def embed_with(session: onnxruntime.InferenceSession, sequence: int) -> np.ndarray:
    return minilm.embed(lambda feed: session.run(None, feed)[0], SENTENCES, sequence=sequence)


def speed_table(
    times: dict[str, list[float]], pruned: Path, artifact: Path, threads: int, sequence: int
) -> Table:
    theirs, ours = (1e3 * statistics.median(times[name]) for name in ("ONNX Runtime", "sparse-tvm"))
    sizes = [path.stat().st_size / 1e6 for path in (pruned, artifact)]
    table = Table(
        title=f"all-MiniLM-L6-v2, {SPARSITY:.0%} pruned in {STRUCTURE} blocks, "
        f"1 x {sequence} tokens, {threads} threads"
    )
    table.add_column("same pruned model")
    for column in ("ONNX Runtime", "sparse-tvm", "gain"):
        table.add_column(column, justify="right")
    table.add_row("latency p50", f"{theirs:.2f} ms", f"{ours:.2f} ms", f"{theirs / ours:.1f}x")
    table.add_row(
        "file", f"{sizes[0]:.1f} MB", f"{sizes[1]:.1f} MB", f"{sizes[0] / sizes[1]:.1f}x smaller"
    )
    return table


def print_embeddings(console: Console, same: np.ndarray, unpruned: np.ndarray) -> None:
    table = Table(title="cosine similarity of our embeddings with ONNX Runtime's")
    table.add_column("sentence")
    table.add_column("same pruned model", justify="right")
    table.add_column("unpruned model", justify="right")
    for sentence, *cosines in zip(SENTENCES, same, unpruned, strict=True):
        table.add_row(sentence, *(f"{cosine:.6f}" for cosine in cosines))
    console.print(table)
    console.print(
        "Pruning by magnitude without retraining costs accuracy (right column): "
        "the speed is real, these weights need fine-tuning."
    )


if __name__ == "__main__":
    typer.run(main)
