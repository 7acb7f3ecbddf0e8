"""Load a server for long and plot what it takes: all must be flat at the end.

The rate is a share of what the server does at most with these clients, measured beforehand, so that
the load is the same on any machine.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import typer
from serving_load import UNSENT, feeds, fixed_rate, request_of, saturated

from sparse_tvm.artifact import read_manifest
from sparse_tvm.cli.console import stdout_console
from sparse_tvm.serving.local import LocalServer, serving
from sparse_tvm.serving.metrics import proportional_bytes
from sparse_tvm.spec import TensorSpec

MAX_GROWTH = 1.02  # of memory, from the second quarter to the last
MAX_SLOWER = 1.5  # of the median latency
MAX_MORE = 2  # threads, or descriptors
MAX_UNSENT = 1e-3  # of all requests: their sender shares the cores with the server
_WIDTH, _HEIGHT, _MARGIN = 720, 150, 46


@dataclass
class Sample:
    """What one slice of the soak showed."""

    minutes: float
    memory: float  # MiB, proportional, server and workers
    p50: float  # ms
    p99: float  # ms
    threads: int
    descriptors: int
    answered: int
    errors: Counter


def main(
    artifact: Annotated[Path, typer.Argument(help="model.so")],
    minutes: Annotated[float, typer.Option(help="How long.")] = 30.0,
    share: Annotated[float, typer.Option(help="Rate, of the most that the server does.")] = 0.7,
    clients: Annotated[int, typer.Option(help="Connections.")] = 8,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    longest: Annotated[int, typer.Option(help="Tokens of the longest request.")] = 128,
    plot: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path("build/soak.svg"),
) -> None:
    """Fail if memory, threads, descriptors or latency grow."""
    specs = [
        TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"]))
        for entry in read_manifest(artifact)["inputs"]
    ]
    requests = [request_of(feed) for feed in feeds(specs, 256, longest)]
    path = f"/v2/models/{artifact.stem}/infer"
    slice_seconds = max(1.0, minutes * 60 / 60)
    samples = []
    with serving([artifact], "--workers", str(workers)) as server:
        most = asyncio.run(saturated(server.url, path, requests, seconds=10, clients=clients))
        rate = share * most.throughput
        stdout_console().print(f"{rate:.0f} requests/s, {share:.0%} of {most.throughput:.0f}")
        started = perf_counter()
        while (elapsed := perf_counter() - started) < minutes * 60:
            result = asyncio.run(
                fixed_rate(
                    server.url, path, requests, rate=rate, seconds=slice_seconds, clients=clients
                )
            )
            samples.append(
                Sample(
                    elapsed / 60,
                    memory(server),
                    1e3 * result.percentile(50),
                    1e3 * result.percentile(99),
                    *counts(server),
                    result.statuses[200],
                    result.errors_by_kind,
                )
            )
    plot.parent.mkdir(parents=True, exist_ok=True)
    plot.write_text(svg(samples))
    sys.exit(report(samples, plot))


def memory(server: LocalServer) -> float:
    pids = [server.process.pid, *server.worker_pids()]
    return sum(proportional_bytes(pid) or 0 for pid in pids) / 2**20


def counts(server: LocalServer) -> tuple[int, int]:
    """Return how many threads and open files server and workers have."""
    pids = [server.process.pid, *server.worker_pids()]
    threads, files = (
        sum(sum(1 for _ in Path(f"/proc/{pid}/{kind}").iterdir()) for pid in pids)
        for kind in ("task", "fd")
    )
    return threads, files


def report(samples: list[Sample], plot: Path) -> int:
    """Print what came out and return the exit code."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    growth = median(late, "memory") / median(early, "memory")
    slower = median(late, "p50") / median(early, "p50")
    errors = sum((sample.errors for sample in samples), Counter())
    stdout_console().print(
        f"{sum(sample.answered for sample in samples)} answered, errors: {dict(errors) or 'none'}; "
        f"memory {median(early, 'memory'):.1f} -> {median(late, 'memory'):.1f} MiB, "
        f"p50 {median(early, 'p50'):.2f} -> {median(late, 'p50'):.2f} ms, "
        f"p99 {median(early, 'p99'):.2f} -> {median(late, 'p99'):.2f} ms, "
        f"{median(early, 'threads'):.0f} -> {median(late, 'threads'):.0f} threads, "
        f"{median(early, 'descriptors'):.0f} -> {median(late, 'descriptors'):.0f} descriptors; "
        f"plot: {plot}",
        soft_wrap=True,
    )
    more = max(median(late, name) - median(early, name) for name in ("threads", "descriptors"))
    unsent = errors.pop(UNSENT, 0) / sum(sample.answered for sample in samples)
    failed = growth > MAX_GROWTH or slower > MAX_SLOWER or more > MAX_MORE or unsent > MAX_UNSENT
    return int(failed or bool(errors))


def median(samples: list[Sample], name: str) -> float:
    return float(np.median([getattr(sample, name) for sample in samples]))


def svg(samples: list[Sample]) -> str:
    """Draw memory, p50 and p99 over time, one below the other."""
    panels = [
        panel(samples, name, f"{label}", 20 + index * (_HEIGHT + _MARGIN))
        for index, (name, label) in enumerate(
            [("memory", "memory, MiB"), ("p50", "latency p50, ms"), ("p99", "latency p99, ms")]
        )
    ]
    height = 20 + 3 * (_HEIGHT + _MARGIN)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH + 2 * _MARGIN} {height}" '
        f'font-family="sans-serif" font-size="12">\n{"".join(panels)}</svg>\n'
    )


def panel(samples: list[Sample], name: str, label: str, top: float) -> str:
    values = [getattr(sample, name) for sample in samples]
    highest, longest = 1.1 * max(values), max(samples[-1].minutes, 1e-9)
    points = " ".join(
        f"{_MARGIN + _WIDTH * sample.minutes / longest:.1f},"
        f"{top + _HEIGHT * (1 - value / highest):.1f}"
        for sample, value in zip(samples, values, strict=True)
    )
    bottom = top + _HEIGHT
    return (
        f'<text x="{_MARGIN}" y="{top - 6}">{label}</text>\n'
        f'<rect x="{_MARGIN}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" '
        f'stroke="#bbb"/>\n<polyline points="{points}" fill="none" stroke="#1560bd"/>\n'
        f'<text x="4" y="{top + 10}">{highest:.3g}</text><text x="30" y="{bottom}">0</text>\n'
        f'<text x="{_MARGIN + _WIDTH}" y="{bottom + 16}" text-anchor="end">'
        f"{longest:.1f} min</text>\n"
    )


if __name__ == "__main__":
    typer.run(main)
