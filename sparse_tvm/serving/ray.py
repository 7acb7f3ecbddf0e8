"""Serve models on a Ray cluster: the same HTTP protocol, replicas that come and go with the load.

>>> from ray import serve
>>> from sparse_tvm.serving.ray import deployment
>>> serve.run(deployment("/models/minilm.so", max_replicas=8))  # doctest: +SKIP

Every node must see the files under the same path. Ray places, restarts and scales the replicas;
each of them is a server with the worker processes, queue and batching of ``sparse-tvm serve``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve

from sparse_tvm.serving.core import Core
from sparse_tvm.serving.options import Options
from sparse_tvm.serving.rest import build_app


def deployment(
    *sources: str | os.PathLike[str],
    options: Options | None = None,
    min_replicas: int = 1,
    max_replicas: int = 4,
    target_requests: int = 4,
    **settings: Any,
) -> Any:
    """Return a Ray Serve application.

    Parameters
    ----------
    sources : path
        Artifacts, or directories of models, as on the command line.
    options : Options | None
        Of every replica; host and ports are Ray's.
    min_replicas, max_replicas : int
        Between which the number of replicas follows the load.
    target_requests : int
        Requests at a time per replica; with more, there will be another replica.
    settings : Any
        Further settings of :func:`ray.serve.deployment`, such as ``max_replicas_per_node``.
    """
    chosen = options if options is not None else Options()
    paths = [Path(source).absolute() for source in sources]

    def application() -> Any:
        # One replica's models are no affair of a client's; Ray deploys all of them again.
        return build_app(Core(paths, replace(chosen, poll=0, allow_control=False)), owns_core=True)

    defaults: dict[str, Any] = {
        "autoscaling_config": {
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "target_ongoing_requests": target_requests,
        },
        "max_ongoing_requests": chosen.max_queue,
        "ray_actor_options": {"num_cpus": chosen.workers * chosen.threads_per_worker},
    }

    @serve.deployment(**{**defaults, **settings})
    @serve.ingress(application)
    class Models:
        """The replica: all it does is in the application."""

    return Models.bind()  # type: ignore[attr-defined]
