"""Transformers pruned, compiled and timed against ONNX Runtime, OpenVINO and PyTorch.

    python scripts/bench_models.py                 # five models at their usual sparsities
    python scripts/bench_models.py --sweep         # BERT's speed-up from 0 to 99 % zeros
    python scripts/bench_models.py --shapes        # one artifact at many batches and lengths
    python scripts/bench_models.py --precision     # BERT in bf16 and int8, beside others' int8
    python scripts/bench_models.py --precision --variant 90%:4x1@fp32 --variant 90%:4x4@int8

Every model is pruned from the same weights and compiled; every output must agree with ONNX
Runtime's on the same pruned weights. All engines that run one model are timed in one run,
interleaved as :mod:`sparse_tvm.interleave` explains, on the same number of threads. OpenVINO and
PyTorch take part when installed (``pip install -e '.[bench]'``); they, like ONNX Runtime,
run the unpruned model: zeros do not change their time. Tables and plots go to ``--workdir``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated

import bench_low_precision
import numpy as np
import onnx
import typer
from bench_engines import ONNX_RUNTIME, WORKLOADS, Feed, Run, dense_engines, of, text_feed
from bench_tables import STRUCTURES, Measurement, Variant, curves, plot, save, speed_ups

import sparse_tvm
from sparse_tvm.cli.console import stderr_console
from sparse_tvm.cli.progress import PhaseProgress
from sparse_tvm.cpu import cpu_model, usable_cores
from sparse_tvm.errors import SparseTvmError
from sparse_tvm.interleave import interleave
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.reference import Reference

MODELS = list(WORKLOADS)
THREADS = [1, usable_cores()]
TOLERANCE = 1e-4
NOISE = 0.95
"""A sparser model may be measured this much slower and still count as not slower."""

SWEEP = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99)
SHAPES = ((1, 1), (1, 4), (1, 7), (1, 16), (1, 37), (1, 128), (1, 384), (8, 128), (32, 64))
MIXED_LENGTHS = (5, 17, 37, 64, 64, 90, 113, 128)
BUILD = Path(__file__).resolve().parent.parent / "build" / "bench"


def main(
    model: Annotated[list[str], typer.Option(help="Repeatable.")] = MODELS,
    threads: Annotated[list[int], typer.Option(min=1, help="Repeatable.")] = THREADS,
    sweep: Annotated[bool, typer.Option("--sweep", help="Speed-up of BERT by sparsity.")] = False,
    shapes: Annotated[bool, typer.Option("--shapes", help="One artifact at any size.")] = False,
    precision: Annotated[bool, typer.Option("--precision", help="BERT in low precision.")] = False,
    layers: Annotated[int, typer.Option(help="Of BERT in --sweep and --shapes.")] = 12,
    duration: Annotated[float, typer.Option(help="Seconds of runs per engine.")] = 5.0,
    workdir: Annotated[Path, typer.Option(help="Where models and results go.")] = BUILD,
    reuse: Annotated[bool, typer.Option("--reuse", help="Time what is compiled there.")] = False,
    variant: Annotated[list[str] | None, typer.Option(help="Of --precision; repeatable.")] = None,
    only_prepare: Annotated[bool, typer.Option(help="With --precision, time nothing.")] = False,
) -> None:
    """Compare compiled models with ONNX Runtime, OpenVINO and PyTorch."""
    for name in model:
        if name not in WORKLOADS:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(WORKLOADS)}")
    workdir.mkdir(parents=True, exist_ok=True)
    with PhaseProgress(stderr_console()) as progress:
        bench = Bench(workdir, list(dict.fromkeys(threads)), duration, progress, reuse)
        if sweep:
            failures = bench.sweep(layers)
        elif precision:
            chosen = [Variant(text) for text in variant or ()]
            failures = bench.precision(chosen or bench_low_precision.variants(), only_prepare)
        elif shapes:
            failures = bench.shapes(layers)
        else:
            failures = bench.models(model)
    if failures:
        sys.exit("\n".join(f"error: {failure}" for failure in failures))


class Bench:
    """The three benchmarks; each saves its results and returns what is wrong with them."""

    def __init__(
        self,
        workdir: Path,
        threads: Sequence[int],
        duration: float,
        progress: PhaseProgress,
        reuse: bool,
    ) -> None:
        self.workdir, self.threads, self.duration = workdir, threads, duration
        self.progress, self.reuse = progress, reuse

    def models(self, names: Sequence[str]) -> list[str]:
        measured: list[Measurement] = []
        for name in names:
            workload = WORKLOADS[name]
            dense = self.build(name, workload.build())
            compiled = self.compile_all(name, dense, [Variant(text) for text in workload.variants])
            for threads in self.threads:
                engines = dense_engines(workload, dense, threads)
                measured += self.compare(
                    workload.title, workload.feed(), engines, compiled, threads
                )
        self.save("models", measured, f"Median latency, {cpu_model()}")
        bert = [m for m in measured if m.model == WORKLOADS["bert"].title]
        self.plot("models", bert, "BERT-base, 1 x 128 tokens")
        return list(wrong_outputs(measured))

    def sweep(self, layers: int) -> list[str]:
        workload = WORKLOADS["bert"]
        dense = self.build(f"bert-{layers}", build_bert(BertConfig(layers=layers)))
        variants = [Variant("0%"), *(Variant(f"{s}%:{st}") for st in STRUCTURES for s in SWEEP)]
        compiled = self.compile_all(f"bert-{layers}", dense, variants)
        title = f"{layers} layers of BERT-base, 1 x 128 tokens"
        measured: list[Measurement] = []
        for threads in self.threads:
            engines = {ONNX_RUNTIME: of(Reference(dense, threads=threads))}
            measured += self.compare(title, workload.feed(), engines, compiled, threads)
        self.save("sweep", measured, f"Median latency, {cpu_model()}")
        self.plot("sweep", measured, title)
        return [*wrong_outputs(measured), *dips(measured)]

    def precision(self, variants: Sequence[Variant], only_prepare: bool) -> list[str]:
        workload = WORKLOADS["bert"]
        dense = self.build("bert", workload.build())
        compiled = self.compile_all("bert", dense, variants)
        if only_prepare:
            bench_low_precision.engines(workload, dense, 1, workload.feed())  # others' int8 models
            return []
        measured: list[Measurement] = []
        for threads in self.threads:
            engines = bench_low_precision.engines(workload, dense, threads, workload.feed())
            measured += self.compare(workload.title, workload.feed(), engines, compiled, threads)
        self.save("precision", measured, f"Median latency, {cpu_model()}")
        return [f"{m.engine} differs by {m.difference:.2g}" for m in measured if m.difference > 1]

    def shapes(self, layers: int) -> list[str]:
        name = f"bert-{layers}-symbolic"
        config = BertConfig(layers=layers)
        dense = self.build(name, build_bert(config, batch="batch", sequence="sequence"))
        ((pruned, artifact),) = self.compile_all(name, dense, [Variant("90%:4x1")]).values()
        measured: list[Measurement] = []
        for threads in self.threads:
            model = sparse_tvm.load(artifact, threads=threads)
            engines = {
                ONNX_RUNTIME: of(Reference(pruned, threads=threads)),
                "sparse-tvm": of(model),
            }
            for title, feed in shape_feeds().items():
                expected = dict.fromkeys(engines, engines[ONNX_RUNTIME](feed))
                measured += self.measure(title, engines, feed, threads, expected)
        alone = difference_alone(of(model), padded_batch())
        note = f"Alone, a padded sequence differs from itself in the batch by up to {alone:.1e}."
        title = f"{layers} layers of BERT-base, 90 % in 4x1 blocks, one artifact, {cpu_model()}"
        self.save("shapes", measured, title, note)
        failures = list(wrong_outputs(measured))
        return failures if alone <= TOLERANCE else [*failures, "padding changes results"]

    def build(self, name: str, model: onnx.ModelProto) -> Path:
        path = self.workdir / f"{name}.onnx"
        if not (self.reuse and path.exists()):
            onnx.save(model, path)
        return path

    def compile_all(
        self, name: str, dense: Path, variants: Sequence[Variant]
    ) -> dict[str, tuple[Path, Path]]:
        """Prune and compile; return the pruned model and the artifact by the variant's title."""
        compiled = {}
        for variant in variants:
            self.progress(f"{name}: prune and compile {variant.text}")
            stem = self.workdir / f"{name}-{variant.percent}-{variant.structure}"
            stem = stem.with_name(f"{stem.name}-{variant.precision}")
            pruned, artifact = stem.with_suffix(".onnx"), stem.with_suffix(".so")
            compiled[variant.title] = pruned, artifact
            if self.reuse and artifact.exists():
                continue
            sparsity = float(variant.percent) / 100
            sparse_tvm.prune(dense, pruned, sparsity=sparsity, structure=variant.structure)
            # Measuring compares outputs.
            sparse_tvm.compile(pruned, artifact, precision=variant.precision, verify=False)
        return compiled

    def compare(
        self,
        title: str,
        feed: Feed,
        engines: dict[str, Run],
        compiled: Mapping[str, tuple[Path, Path]],
        threads: int,
    ) -> list[Measurement]:
        """Time engines with the unpruned model, and our artifacts."""
        self.progress(f"{title}: compare outputs")
        expected = dict.fromkeys(engines, engines[ONNX_RUNTIME](feed))
        for name, (pruned, artifact) in compiled.items():
            engines[name] = of(sparse_tvm.load(artifact, threads=threads))
            expected[name] = of(Reference(pruned, threads=threads))(feed)
        return self.measure(title, engines, feed, threads, expected)

    def measure(
        self,
        title: str,
        engines: Mapping[str, Run],
        feed: Feed,
        threads: int,
        expected: Mapping[str, np.ndarray],
    ) -> list[Measurement]:
        """Time the engines on one input, interleaved, and compare their outputs."""
        self.progress(f"{title}: measure with {threads} threads")
        differences = {
            name: float(np.abs(run(feed) - expected[name]).max()) for name, run in engines.items()
        }
        runs = {name: lambda run=run: run(feed) for name, run in engines.items()}
        times = interleave(runs, duration=self.duration)
        return [
            Measurement(title, name, threads, median(times[name]), differences[name])
            for name in engines
        ]

    def save(self, stem: str, measured: Sequence[Measurement], title: str, note: str = "") -> None:
        save(measured, title, self.workdir / f"{stem}.md", note)

    def plot(self, stem: str, measured: Sequence[Measurement], title: str) -> None:
        plot(measured, title, self.workdir / f"{stem}.svg")


def shape_feeds() -> dict[str, Feed]:
    rng = np.random.default_rng(0)
    feeds = {f"{batch} x {length}": text_feed(rng, batch, length) for batch, length in SHAPES}
    batch, length = len(MIXED_LENGTHS), max(MIXED_LENGTHS)
    return {**feeds, f"{batch} x {length}, padded": padded_batch()}


def padded_batch() -> dict[str, np.ndarray]:
    """Sequences of different lengths."""
    feed = text_feed(np.random.default_rng(1), len(MIXED_LENGTHS), max(MIXED_LENGTHS))
    positions, lengths = np.arange(max(MIXED_LENGTHS)), np.array(MIXED_LENGTHS)[:, None]
    feed["attention_mask"] = (positions < lengths).astype(np.int64)
    return feed


def difference_alone(run: Run, batch: Feed) -> float:
    """How much a sequence in a padded batch differs from the same sequence alone."""
    together = run(batch)
    differences = []
    for row, length in enumerate(MIXED_LENGTHS):
        alone = run({name: array[row : row + 1, :length] for name, array in batch.items()})
        differences.append(np.abs(alone[0] - together[row, :length]).max())
    return float(np.max(differences))


def wrong_outputs(measured: Sequence[Measurement]) -> Iterator[str]:
    for m in measured:
        if not m.difference <= TOLERANCE:  # a NaN is wrong too
            yield f"{m.model}: {m.engine} differs from {ONNX_RUNTIME} by {m.difference:.2g}"


def dips(measured: Sequence[Measurement]) -> Iterator[str]:
    """Where we are slower than ONNX Runtime, or slower for more zeros."""
    for m, gain in speed_ups(measured).items():
        if gain < 1:
            yield f"{m.engine}, {m.threads} threads: {gain:.2f}x"
    for threads in dict.fromkeys(m.threads for m in measured):
        for structure, curve in curves(measured, threads).items():
            for (less, before), (more, after) in pairwise(curve.items()):
                if after < NOISE * before:
                    yield (
                        f"{structure}, {threads} threads: {after:.2f}x at {more:g} %, "
                        f"{before:.2f}x at {less:g} %"
                    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except SparseTvmError as error:
        sys.exit(f"error: {error}")
