"""Replicas on a Ray cluster of two real nodes, one of which is killed under load."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.serve")
pytest.importorskip("uvicorn")

import aiohttp
import ray
from ray import serve
from ray.cluster_utils import Cluster
from serving_fixtures import expected, infer_body, write_encoder

from sparse_tvm.serving.options import Options
from sparse_tvm.serving.ray import deployment

pytestmark = pytest.mark.heavy

PORT = 18_765
IDS = np.array([[1, 2, 3]])
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    # Replicas are other processes: they find the package and the fixtures as this one does.
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    running = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        yield running
    finally:
        serve.shutdown()
        ray.shutdown()
        running.shutdown()


async def infer(session: aiohttp.ClientSession) -> Any:
    try:
        async with session.post("/v2/models/encoder/infer", json=infer_body(IDS)) as response:
            answer = await response.json() if response.status == 200 else None
    except aiohttp.ClientError as error:
        return type(error).__name__
    if answer is None:
        return response.status
    [output] = answer["outputs"]
    np.testing.assert_allclose(
        np.array(output["data"]).reshape(output["shape"]), expected(IDS, IDS > 0), atol=1e-5
    )
    return 200


async def load(seconds: float, clients: int = 4) -> Counter:
    answers: Counter = Counter()
    ending = monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=30)

    async def client(session: aiohttp.ClientSession) -> None:
        while monotonic() < ending:
            answers[await infer(session)] += 1

    async with aiohttp.ClientSession(f"http://127.0.0.1:{PORT}", timeout=timeout) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return answers


def replicas() -> int:
    """Return how many replicas run."""
    [application] = serve.status().applications.values()
    [models] = application.deployments.values()
    return models.replica_states.get("RUNNING", 0)


def test_the_deployment_survives_the_kill_of_a_node(cluster: Cluster, tmp_path: Path) -> None:
    doomed = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, logging_level="error")
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT})
    application = deployment(
        write_encoder(tmp_path / "encoder.so"),
        options=Options(threads=1),
        max_replicas_per_node=1,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": 1,
            "upscale_delay_s": 1,
            "downscale_delay_s": 60,
            "look_back_period_s": 2,
            "metrics_interval_s": 0.5,
        },
    )
    serve.run(application)
    assert replicas() == 1

    before: Counter = Counter()
    deadline = monotonic() + 40
    while replicas() < 2:  # on both nodes, as one node takes one
        assert monotonic() < deadline
        before += asyncio.run(load(2))
    assert set(before) == {200}, before

    async def kill_under_load() -> Counter:
        loading = asyncio.create_task(load(15))
        await asyncio.sleep(2)
        await asyncio.to_thread(cluster.remove_node, doomed, allow_graceful=False)
        return await loading

    during = asyncio.run(kill_under_load())
    after = asyncio.run(load(3))
    assert replicas() == 1
    print(f"before {before}, while a node dies {during}, after {after}")
    assert set(after) == {200}, after
    # What was on its way to the node is lost; nothing else is.
    assert sum(during.values()) - during[200] <= 8, during
