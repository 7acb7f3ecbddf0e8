"""Prune all-MiniLM-L6-v2 by each method, score its embeddings on held-out text, and time it."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import onnx
import typer
import wordnet
from embedding_scores import Scores
from tokenizers import Tokenizer

import sparse_tvm
from sparse_tvm.cpu import usable_cores
from sparse_tvm.errors import SparseTvmError
from sparse_tvm.interleave import interleave
from sparse_tvm.models import minilm
from sparse_tvm.models.packed import load_packed
from sparse_tvm.reference import Reference

METHODS, STRUCTURES, SPARSITIES = "magnitude,wanda,obs", "unstructured,4x1", "0.7,0.8,0.9"
BATCH, TOKENS = 32, 64
SEQUENCE, SECONDS = 128, 2.0
"""Tokens of the sentence that is timed, and for how long each model is."""


def main(
    methods: Annotated[str, typer.Option()] = METHODS,
    structures: Annotated[str, typer.Option()] = STRUCTURES,
    sparsities: Annotated[str, typer.Option()] = SPARSITIES,
    distilled: Annotated[str, typer.Option(help="Files of prune_minilm.py, too.")] = "",
    speed: Annotated[
        bool, typer.Option("--speed", help="Only time: values do not matter.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Glosses to calibrate with.")] = 512,
    directory: Annotated[Path, typer.Option("--wordnet")] = wordnet.DIRECTORY,
    threads: Annotated[int, typer.Option(min=1)] = usable_cores(),
) -> None:
    """Print the tables of docs/pruning.md."""
    wanted = [
        (structure, float(sparsity))
        for structure in structures.split(",")
        for sparsity in sparsities.split(",")
    ]
    packed = [Path(name) for name in distilled.split(",") if name]
    if speed:
        return print_speed(wanted, threads)
    training, held_out = wordnet.glosses(directory)
    print("| structure | sparsity | method | error | Spearman | cosine | neighbours | seconds |")
    print("|---|---:|---|---:|---:|---:|---:|---:|", flush=True)
    with TemporaryDirectory() as folder:
        dense, pruned = Path(folder) / "dense.onnx", Path(folder) / "pruned.onnx"
        sentences = Path(folder) / "sentences.txt"
        onnx.save(minilm.build_minilm(batch="batch", sequence="sequence"), dense)
        sentences.write_text("\n".join(training[:samples]), encoding="utf-8")
        reference = embed(dense, held_out, threads)
        for structure, sparsity in wanted:
            for method in filter(None, methods.split(",")):
                start = time.perf_counter()
                sparse_tvm.prune(
                    dense,
                    pruned,
                    sparsity=sparsity,
                    structure=structure,
                    method=method,
                    calibrate=None if method == "magnitude" else sentences,
                    samples=samples,
                    tokenizer=minilm.model_directory() / "tokenizer.json",
                    threads=threads,
                )
                seconds = time.perf_counter() - start
                vectors = embed(pruned, held_out, threads)
                print_scores(structure, sparsity, method, seconds, reference, vectors)
        for path in packed:
            onnx.save(minilm.build_minilm(batch="batch", sequence="sequence", pruned=path), pruned)
            _, facts = load_packed(path)
            print_scores(
                facts["structure"],
                facts["sparsity"],
                "obs, distilled",
                60 * facts["cpu_minutes"],
                reference,
                embed(pruned, held_out, threads),
            )
    return None


def print_scores(
    structure: str,
    sparsity: float,
    method: str,
    seconds: float,
    reference: np.ndarray,
    vectors: np.ndarray,
) -> None:
    """Print a row of the table."""
    scores = Scores.of(reference, vectors)
    error = float(np.square(vectors - reference).sum(axis=1).mean())
    print(
        f"| {structure} | {sparsity:.0%} | {method} | {error:.3f} "
        f"| {scores.spearman:.3f} | {scores.cosine:.3f} "
        f"| {scores.neighbours:.1%} | {seconds:.0f} |",
        flush=True,
    )


def print_speed(wanted: list[tuple[str, float]], threads: int) -> None:
    """Print how fast each structure is, in one interleaved run, on models pruned by magnitude."""
    engines: dict[str, Callable[[], Any]] = {}
    feed = minilm.tokenize(("A man is eating food.",), sequence=SEQUENCE)
    with TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        onnx.save(minilm.build_minilm(sequence=SEQUENCE), dense)
        reference = Reference(dense, threads=threads)
        engines["ONNX Runtime"] = lambda: reference.run(feed)
        for structure, sparsity in wanted:
            name = f"{structure} {sparsity:.0%}"
            pruned, artifact = (Path(folder) / f"{name}.{end}" for end in ("onnx", "so"))
            sparse_tvm.prune(dense, pruned, sparsity=sparsity, structure=structure)
            sparse_tvm.compile(pruned, artifact, threads=threads)  # and verify its outputs
            engines[name] = partial(sparse_tvm.load(artifact, threads=threads).run, feed)
        times = {
            name: 1e3 * statistics.median(each)
            for name, each in interleave(engines, duration=SECONDS).items()
        }
    print("| model | p50 | gain |\n|---|---:|---:|")
    for name, milliseconds in times.items():
        gain = times["ONNX Runtime"] / milliseconds
        print(f"| {name} | {milliseconds:.2f} ms | {gain:.1f}x |")


def embed(model: Path, sentences: list[str], threads: int) -> np.ndarray:
    """Return unit vectors, in the order of the sentences."""
    tokenizer = Tokenizer.from_file(str(minilm.model_directory() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding()
    session = Reference(model, threads=threads)
    order = np.argsort([len(sentence) for sentence in sentences], kind="stable")
    parts = []
    for start in range(0, len(order), BATCH):
        rows = tokenizer.encode_batch([sentences[i] for i in order[start : start + BATCH]])
        feed = {
            "input_ids": np.array([row.ids for row in rows], np.int64),
            "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
            "token_type_ids": np.array([row.type_ids for row in rows], np.int64),
        }
        (hidden,) = session.run(feed).values()
        parts.append(minilm.mean_pool(hidden, feed["attention_mask"]))
    vectors = np.concatenate(parts)
    found = np.empty_like(vectors)
    found[order] = vectors
    return found


if __name__ == "__main__":
    try:
        typer.run(main)
    except SparseTvmError as error:
        sys.exit(f"error: {error}")
