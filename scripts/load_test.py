"""Measure a server under load: with and without dynamic batching, and beside ONNX Runtime.

Every server runs alone, one after the other, in one call of this script. The clients take part of
the machine, so throughput is lower than from another machine.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import typer
from serving_load import Result, feeds, fixed_rate, request_of, saturated

import sparse_tvm
from sparse_tvm.cli.console import stderr_console, stdout_console
from sparse_tvm.cli.tables import plain_table
from sparse_tvm.cpu import usable_cores
from sparse_tvm.serving.local import serving

CLIENTS = (1, 8, 64)
_COLUMNS = ("clients", "rate", "answered", "p50", "p99", "errors", "saturated", "its p50")


@dataclass
class Case:
    name: str
    source: Path
    options: tuple[str, ...]


def main(
    artifact: Annotated[Path, typer.Argument(help="model.so")],
    against: Annotated[Path | None, typer.Option(help="The same model as ONNX.")] = None,
    seconds: Annotated[float, typer.Option(help="Per measurement.")] = 5.0,
    share: Annotated[float, typer.Option(help="Rate, as a share of the bare artifact's.")] = 0.5,
    longest: Annotated[int, typer.Option(help="Tokens of the longest request.")] = 128,
    max_batch: Annotated[int, typer.Option(help="With dynamic batching.")] = 8,
    threads: Annotated[int, typer.Option(help="Of the model.")] = usable_cores(),
) -> None:
    """Print a table of throughput, latencies and errors."""
    console, progress = stdout_console(), stderr_console()
    model = sparse_tvm.load(artifact, threads=threads)
    inputs = feeds(model.inputs, 256, longest)
    bare = bare_seconds(model, inputs, seconds)
    del model
    rate = share / statistics.mean(bare)
    requests = [request_of(feed) for feed in inputs]
    console.print(
        f"bare artifact, {threads} threads, no server: p50 {1e3 * np.percentile(bare, 50):.2f} ms, "
        f"p99 {1e3 * np.percentile(bare, 99):.2f} ms, {1 / statistics.mean(bare):.0f} runs/s"
    )
    tables = []
    with tempfile.TemporaryDirectory() as directory:
        for case in cases(artifact, against, Path(directory), max_batch, threads):
            table = plain_table(case.name, *_COLUMNS, numbers=_COLUMNS)
            with serving([case.source], *case.options) as server:
                path = "/v2/models/model/infer"
                asyncio.run(saturated(server.url, path, requests, seconds=1, clients=4))
                for clients in CLIENTS:
                    progress.print(f"{case.name}: {clients} clients")
                    at_rate = asyncio.run(
                        fixed_rate(
                            server.url, path, requests, rate=rate, seconds=seconds, clients=clients
                        )
                    )
                    full = asyncio.run(
                        saturated(server.url, path, requests, seconds=seconds, clients=clients)
                    )
                    table.add_row("", *row(clients, rate, at_rate, full))
            tables.append(table)
    for table in tables:
        console.print(table)


def cases(
    artifact: Path, against: Path | None, directory: Path, max_batch: int, threads: int
) -> list[Case]:
    common = ("--threads", str(threads), "--poll", "0", "--max-queue", "1024")
    found = []
    for name, source in (("sparse-tvm", artifact), ("ONNX Runtime", against)):
        if source is None:
            continue
        link = directory / f"model{source.suffix}"
        link.symlink_to(source.resolve())
        for batch in (1, max_batch):
            label = f"{name}, batching {'off' if batch == 1 else f'up to {batch}'}"
            found.append(Case(label, link, (*common, "--max-batch", str(batch))))
    return found


def bare_seconds(
    model: sparse_tvm.runtime.Model, inputs: list[dict[str, np.ndarray]], seconds: float
) -> list[float]:
    """Return the seconds of single runs without a server."""
    for feed in inputs[:20]:
        model.run(feed)
    times = []
    ending = perf_counter() + seconds
    while perf_counter() < ending:
        for feed in inputs:
            started = perf_counter()
            model.run(feed)
            times.append(perf_counter() - started)
    return times


def row(clients: int, rate: float, at_rate: Result, full: Result) -> list[str]:
    return [
        str(clients),
        f"{rate:.0f}/s",
        f"{at_rate.throughput:.0f}/s",
        f"{1e3 * at_rate.percentile(50):.2f} ms",
        f"{1e3 * at_rate.percentile(99):.2f} ms",
        str(at_rate.errors + full.errors),
        f"{full.throughput:.0f}/s",
        f"{1e3 * full.percentile(50):.2f} ms",
    ]


if __name__ == "__main__":
    typer.run(main)
