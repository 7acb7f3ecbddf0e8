"""What Prometheus scrapes from ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The server's metrics. Labels take the names of loaded models only, never a client's words."""

    content_type = "text/plain; version=1.0.0; charset=utf-8"

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "sparse_tvm_requests",
            "Answered inference requests by HTTP or gRPC status.",
            ["model", "protocol", "status"],
            registry=self.registry,
        )
        self.request_seconds = self._histogram("request", "Time from request to response.")
        self.queue_seconds = self._histogram("queue", "Time a request waited for a worker.")
        self.run_seconds = self._histogram("run", "Time of a run of the model.")
        self.batch_rows = Histogram(
            "sparse_tvm_batch_rows",
            "Rows of a run.",
            ["model"],
            buckets=_ROWS,
            registry=self.registry,
        )
        self.waiting = self._gauge("queue_length", "Requests that wait for a worker.")
        self.workers = self._gauge("workers", "Worker processes that are ready.")
        self.restarts = Counter(
            "sparse_tvm_worker_restarts",
            "Worker processes that ended unasked.",
            ["model"],
            registry=self.registry,
        )

        self.start_failures = Counter(
            "sparse_tvm_worker_start_failures",
            "Worker processes that could not be started.",
            ["model"],
            registry=self.registry,
        )

    def watch_memory(self, processes: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """Show the memory of these (model, process id) on every scrape."""
        self.registry.register(_Memory(processes))

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        text: bytes = generate_latest(self.registry)
        return text

    def forget(self, model: str) -> None:
        """Drop the gauges of a model that is not served any more."""
        for gauge in (self.waiting, self.workers):
            if (model,) in gauge._metrics:
                gauge.remove(model)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(
            f"sparse_tvm_{name}_seconds", text, ["model"], buckets=_SECONDS, registry=self.registry
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"sparse_tvm_{name}", text, ["model"], registry=self.registry)


class _Memory:
    """Proportional set size of every worker: shared pages count in equal parts."""

    def __init__(self, processes: Callable[[], Iterable[tuple[str, int]]]) -> None:
        self._processes = processes

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "sparse_tvm_worker_proportional_bytes",
            "Proportional set size of a worker process.",
            labels=["model", "pid"],
        )
        for model, pid in self._processes():
            size = proportional_bytes(pid)
            if size is not None:
                family.add_metric([model, str(pid)], size)
        yield family


def proportional_bytes(pid: int) -> int | None:
    """Return the proportional set size of a process, or None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), None)
