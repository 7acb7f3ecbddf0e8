"""Compile BERT at several sparsities and time all of them against ONNX Runtime in one run.

Every variant is pruned from the same random weights and compiled in a process of its own, whose
wall time and peak memory are measured; the compile verifies its result. Loading is timed in a
fresh process too, imports included. Then this process times ONNX Runtime (on the unpruned model:
zeros do not change its time) and all artifacts in one run, interleaved as
:mod:`sparse_tvm.interleave` explains.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnxruntime
import typer

import sparse_tvm
from sparse_tvm.artifact import read_manifest
from sparse_tvm.cli.console import stderr_console, stdout_console
from sparse_tvm.cli.progress import PhaseProgress
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import cpu_model
from sparse_tvm.interleave import interleave
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.reference import Reference
from sparse_tvm.report.tables import human_bytes
from sparse_tvm.runtime import Model

VARIANTS = ["90%:4x1", "95%:unstructured", "80%:unstructured", "0%"]
TOLERANCE = 1e-4
REFERENCE = "ONNX Runtime"
HEADER = ("model", "compile", "memory", "file", "file/needed", "load", "max diff", "p50", "gain")

# A process between this one and the compiler: a child's peak memory counts from its fork, when it
# still is its parent, and this one holds whole models.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({"code": code, "seconds": time.perf_counter() - start, "peak_bytes": peak}))
"""
CLI = "import sys; from sparse_tvm.cli import main; sys.exit(main())"
LOAD = """
import json, pathlib, sys, time
start = time.perf_counter()
import sparse_tvm
sparse_tvm.load(sys.argv[1], threads=int(sys.argv[2]))
seconds = time.perf_counter() - start
compiler = "libtvm_compiler" in pathlib.Path("/proc/self/maps").read_text()
print(json.dumps({"seconds": seconds, "maps_compiler": compiler}))
"""


@dataclass
class Variant:
    """One pruned model, and what was measured of it (seconds, bytes)."""

    name: str
    sparsity: float
    structure: str
    compile_seconds: float = 0.0
    compile_peak_bytes: int = 0
    file_bytes: int = 0
    needed_bytes: int = 0
    load_seconds: float = 0.0
    max_abs_diff: float = 0.0
    times: list[float] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str) -> Variant:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)%(?::(.+))?", text)
        if match is None:
            raise typer.BadParameter(f"{text!r} is not of the form 90%:4x1 or 0%")
        return cls(text, float(match[1]) / 100, match[2] or "unstructured")


def main(
    variant: Annotated[list[str], typer.Option(help="SPARSITY%:STRUCTURE, repeatable.")] = VARIANTS,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    layers: int = 12,
    hidden: int = 768,
    heads: int = 12,
    intermediate: int = 3072,
    sequence: int = 128,
    seed: int = 0,
    duration: Annotated[float, typer.Option(min=0, help="Seconds of runs per engine.")] = 10.0,
    workdir: Annotated[
        Path | None, typer.Option(help="Where the models go (2 GB); a temporary folder by default.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures here.")
    ] = None,
) -> None:
    """Compare compiled BERT encoders with ONNX Runtime, batch 1."""
    variants = [Variant.parse(text) for text in variant]
    config = BertConfig(layers=layers, hidden=hidden, heads=heads, intermediate=intermediate)
    with tempfile.TemporaryDirectory() as temporary, PhaseProgress(stderr_console()) as progress:
        directory = workdir or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        progress("build the model")
        dense = directory / "bert.onnx"
        onnx.save(build_bert(config, sequence=sequence, seed=seed), dense)
        feed = random_feed(config, sequence, seed)
        runs = {}
        for each in variants:
            stem = re.sub(r"[^\w.]+", "-", each.name).strip("-")
            pruned, artifact = directory / f"{stem}.onnx", directory / f"{stem}.so"
            progress(f"{each.name}: prune")
            sparse_tvm.prune(dense, pruned, sparsity=each.sparsity, structure=each.structure)
            progress(f"{each.name}: compile")
            compile_model(each, pruned, artifact, threads)
            progress(f"{each.name}: load and compare")
            measure_load(each, artifact, threads)
            model = sparse_tvm.load(artifact, threads=threads)
            each.max_abs_diff = largest_difference(model, pruned, feed, threads)
            runs[each.name] = lambda model=model: model.run(feed)
        progress("measure")
        reference = Reference(dense, threads=threads)
        engines = {REFERENCE: lambda: reference.run(feed), **runs}
        times = interleave(engines, duration=duration)
    for each in variants:
        each.times = times[each.name]
    report(variants, times[REFERENCE], config, threads, sequence, markdown, json_file)
    if not all(each.max_abs_diff <= TOLERANCE for each in variants):  # a NaN fails too
        sys.exit(f"error: outputs differ from {REFERENCE}'s by more than {TOLERANCE}")


def random_feed(config: BertConfig, sequence: int, seed: int) -> dict[str, np.ndarray]:
    """Random tokens, the last eighth of them padding."""
    ids = np.random.default_rng(seed).integers(0, config.vocabulary, (1, sequence))
    mask = np.ones((1, sequence), np.int64)
    mask[:, sequence - sequence // 8 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def compile_model(variant: Variant, model: Path, artifact: Path, threads: int) -> None:
    arguments = ["compile", model, "-o", artifact, "--threads", str(threads), "--quiet"]
    measured = run_python(MEASURE, sys.executable, "-c", CLI, *arguments)
    if measured["code"]:
        sys.exit(f"error: {variant.name} does not compile")
    variant.compile_seconds = measured["seconds"]
    variant.compile_peak_bytes = measured["peak_bytes"]
    variant.file_bytes = artifact.stat().st_size
    variant.needed_bytes = needed_bytes(model, read_manifest(artifact)["layers"])


def needed_bytes(model: Path, layers: list[dict]) -> int:
    """Every layer at 8 bytes per non-zero or dense, what is less, and all else as it is."""
    total = sum(len(initializer.raw_data) for initializer in onnx.load(model).graph.initializer)
    for layer in layers:
        dense = 4 * layer["shape"][0] * layer["shape"][1]
        total += min(8 * layer["nnz"], dense) - dense
    return total


def measure_load(variant: Variant, artifact: Path, threads: int) -> None:
    measured = run_python(LOAD, artifact, str(threads))
    variant.load_seconds = measured["seconds"]
    if measured["maps_compiler"]:
        sys.exit(f"error: loading {artifact} loads TVM's compiler")


def run_python(code: str, *arguments: str | Path) -> dict:
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, *arguments]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(output.splitlines()[-1])


def largest_difference(
    model: Model, pruned: Path, feed: dict[str, np.ndarray], threads: int
) -> float:
    reference = Reference(pruned, threads=threads)
    return max(reference.max_abs_differences(feed, model.run(feed)).values())


def report(
    variants: list[Variant],
    reference: list[float],
    config: BertConfig,
    threads: int,
    sequence: int,
    markdown: Path | None,
    json_file: Path | None,
) -> None:
    median = statistics.median(reference)
    rows = [
        (f"{REFERENCE} {onnxruntime.__version__}", *[""] * 6, f"{median * 1e3:.1f} ms", "1.00x")
    ]
    rows += [row(variant, median) for variant in variants]
    title = (
        f"BERT, {config.layers} layers, hidden {config.hidden}, 1 x {sequence} tokens, "
        f"{threads} threads, {cpu_model()}"
    )
    table = plain_table(*HEADER, numbers=HEADER[1:])
    for cells in rows:
        table.add_row(*cells)
    stdout_console().print(title, table, sep="\n")
    if markdown:
        lines = [f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *rows)]
        markdown.write_text("\n".join([title, "", *lines, ""]), encoding="utf-8")
    if json_file:
        figures = {
            "title": title,
            "reference_seconds": reference,
            "variants": [asdict(variant) for variant in variants],
        }
        json_file.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def row(variant: Variant, reference: float) -> tuple[str, ...]:
    median = statistics.median(variant.times)
    return (
        variant.name,
        f"{variant.compile_seconds:.1f} s",
        human_bytes(variant.compile_peak_bytes),
        human_bytes(variant.file_bytes),
        f"{variant.file_bytes / variant.needed_bytes:.3f}",
        f"{variant.load_seconds:.2f} s",
        f"{variant.max_abs_diff:.1e}",
        f"{median * 1e3:.1f} ms",
        f"{reference / median:.2f}x",
    )


if __name__ == "__main__":
    typer.run(main)
