"""Prune all-MiniLM-L6-v2 in one shot by each method, and score its embeddings on held-out text."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import onnx
import typer
import wordnet
from embedding_scores import Scores
from tokenizers import Tokenizer

import sparse_tvm
from sparse_tvm.cpu import usable_cores
from sparse_tvm.errors import SparseTvmError
from sparse_tvm.models import minilm
from sparse_tvm.reference import Reference

METHODS, STRUCTURES, SPARSITIES = "magnitude,wanda,obs", "unstructured,4x1", "0.7,0.8,0.9"
CALIBRATION, BATCH, TOKENS = 512, 32, 64


def main(
    methods: Annotated[str, typer.Option()] = METHODS,
    structures: Annotated[str, typer.Option()] = STRUCTURES,
    sparsities: Annotated[str, typer.Option()] = SPARSITIES,
    directory: Annotated[Path, typer.Option("--wordnet")] = wordnet.DIRECTORY,
    threads: Annotated[int, typer.Option(min=1)] = usable_cores(),
) -> None:
    """Print the table of docs/pruning.md."""
    training, held_out = wordnet.glosses(directory)
    print("| structure | sparsity | method | error | Spearman | cosine | neighbours | seconds |")
    print("|---|---:|---|---:|---:|---:|---:|---:|", flush=True)
    with TemporaryDirectory() as folder:
        dense, pruned = Path(folder) / "dense.onnx", Path(folder) / "pruned.onnx"
        sentences = Path(folder) / "sentences.txt"
        onnx.save(minilm.build_minilm(batch="batch", sequence="sequence"), dense)
        sentences.write_text("\n".join(training[:CALIBRATION]), encoding="utf-8")
        reference = embed(dense, held_out, threads)
        for structure in structures.split(","):
            for sparsity in map(float, sparsities.split(",")):
                for method in methods.split(","):
                    start = time.perf_counter()
                    sparse_tvm.prune(
                        dense,
                        pruned,
                        sparsity=sparsity,
                        structure=structure,
                        method=method,
                        calibrate=None if method == "magnitude" else sentences,
                        samples=CALIBRATION,
                        tokenizer=minilm.model_directory() / "tokenizer.json",
                        threads=threads,
                    )
                    seconds = time.perf_counter() - start
                    vectors = embed(pruned, held_out, threads)
                    scores = Scores.of(reference, vectors)
                    error = float(np.square(vectors - reference).sum(axis=1).mean())
                    print(
                        f"| {structure} | {sparsity:.0%} | {method} | {error:.3f} "
                        f"| {scores.spearman:.3f} | {scores.cosine:.3f} "
                        f"| {scores.neighbours:.1%} | {seconds:.0f} |",
                        flush=True,
                    )


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
