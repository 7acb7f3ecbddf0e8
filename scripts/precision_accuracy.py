"""How near MiniLM's embeddings of real sentences stay to float32's, by precision and pruning.

Prints, as a Markdown table, the least cosine of any sentence's embedding with the float32 one of
the same weights, for all-MiniLM-L6-v2's real weights as they are, and pruned to 90 % in 4x1 blocks.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from minilm import SENTENCES

import sparse_tvm
from sparse_tvm.cpu import cpu_model
from sparse_tvm.models import minilm
from sparse_tvm.reference import Reference

OUTPUT = "last_hidden_state"


def main(
    precision: Annotated[list[str], typer.Option(help="Repeatable.")] = ["bf16", "int8"],  # noqa: B006
    target: Annotated[str, typer.Option(help="As sparse-tvm compile --target.")] = "native",
    sequence: Annotated[int, typer.Option(min=8, max=512, help="Tokens per sentence.")] = 64,
) -> None:
    """Compile MiniLM in each precision and compare embeddings."""
    print(f"{cpu_model()}, target {target}\n")
    print("| weights | precision | least cosine | mean cosine |")
    print("| --- | --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        dense, pruned = Path(folder) / "dense.onnx", Path(folder) / "pruned.onnx"
        onnx.save(minilm.build_minilm(sequence=sequence), dense)
        sparse_tvm.prune(dense, pruned, sparsity=0.9, structure="4x1")
        for name, model in (("as they are", dense), ("90 % in 4x1 blocks", pruned)):
            reference = Reference(model, threads=1)
            expected = embeddings(reference, sequence)
            for wanted in precision:
                artifact = Path(folder) / f"{wanted}.so"
                sparse_tvm.compile(model, artifact, precision=wanted, target=target, verify=False)
                found = embeddings(sparse_tvm.load(artifact, threads=1), sequence)
                cosines = (found * expected).sum(axis=1)
                print(f"| {name} | {wanted} | {cosines.min():.5f} | {cosines.mean():.5f} |")


def embeddings(model: Reference | sparse_tvm.Model, sequence: int) -> np.ndarray:
    return minilm.embed(lambda feed: model.run(feed)[OUTPUT], SENTENCES, sequence=sequence)


if __name__ == "__main__":
    typer.run(main)
