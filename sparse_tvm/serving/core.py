"""What REST and gRPC share: the repository, the limits, the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_tvm.serving import logs
from sparse_tvm.serving.access import Access
from sparse_tvm.serving.budget import Budget
from sparse_tvm.serving.metrics import Metrics
from sparse_tvm.serving.options import Options
from sparse_tvm.serving.repository import Repository


class Core:
    """A server without its sockets.

    Parameters
    ----------
    sources : sequence of Path
        Artifacts, or directories of models.
    """

    def __init__(self, sources: Sequence[Path], options: Options) -> None:
        self.options = options
        self.access = Access(options)
        self.metrics = Metrics()
        self.repository = Repository(sources, options, self.metrics)
        self.budget = Budget(options.max_pending)
        self.started = False
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether requests are welcome: everything is warm, and the server is not ending."""
        return self.started and not self.draining and self.repository.ready

    async def start(self) -> None:
        """Load and warm up all models.

        Raises
        ------
        ArtifactError
            When a model given as a file cannot be loaded.
        """
        await self.repository.start()
        self.started = True

    async def stop(self) -> None:
        """Answer what was accepted and end the workers."""
        await self.repository.stop()

    def timeout(self, wanted: float | None) -> float:
        """Return the seconds a request may take: the client's, up to the server's."""
        limit = self.options.timeout
        return limit if wanted is None else min(wanted, limit)

    def count(self, model: str, protocol: str, status: int | str, seconds: float) -> None:
        """Note an answered request, under the model's name if there is such a model."""
        model = model if model in self.repository else ""
        self.metrics.requests.labels(model, protocol, str(status)).inc()
        if model:
            self.metrics.request_seconds.labels(model).observe(seconds)
        if self.options.access_log:
            milliseconds = round(seconds * 1e3, 3)
            logs.info(
                "request", model=model, protocol=protocol, status=status, milliseconds=milliseconds
            )
