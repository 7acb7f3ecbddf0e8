"""Serving from the emulated GPU: every worker process has one."""

from __future__ import annotations

import itertools
from pathlib import Path

import cuda_runtime
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("tritonclient")

from sparse_tvm.serving.local import LocalServer, serving

HERE = Path(__file__).parent
IN_WORKERS = """
import sys
if "sparse_tvm.serving.worker" in sys.orig_argv:
    import pytest
    from emulated_gpu import emulated_gpu
    emulation = emulated_gpu(pytest.MonkeyPatch())
    emulation.__enter__()
"""


@pytest.fixture
def artifacts(gpu, tmp_path, monkeypatch):
    """Two small models, and workers with an emulated GPU."""
    monkeypatch.setattr(cuda_runtime, "SIZES", {"one": (1, 4), "two": (1, 4)})
    small = {"hidden": 32, "heads": 2, "intermediate": 32, "vocabulary": 50}
    monkeypatch.setattr(cuda_runtime, "SMALL", small)
    cuda_runtime.build(tmp_path / "models", "cuda-sm80")
    (tmp_path / "sitecustomize.py").write_text(IN_WORKERS)
    places = (tmp_path, HERE, HERE.parent, HERE.parent.parent / "scripts")
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, places)))
    return tmp_path / "models"


def test_versions_reload_under_load(artifacts, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "VERSIONS", 2)
    monkeypatch.setattr(cuda_runtime, "gpu_processes", dict)
    memory = itertools.count(0, 1 << 20)
    monkeypatch.setattr(cuda_runtime, "free_memory", lambda: next(memory))
    said = cuda_runtime.serving(artifacts)
    assert said.startswith("2 versions")
    assert " 0 wrong" in said


def test_workers_are_spread_over_devices(artifacts):
    options = ("--workers", "3", "--device", "cuda:0", "--device", "cuda:1")
    with serving([artifacts / "one.so"], *options) as server:
        used = []
        for pid in server.worker_pids():
            *_, device = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
            used.append(device)
    assert sorted(used) == ["cuda:0", "cuda:0", "cuda:1"]


def test_a_device_of_another_kind_is_refused(artifacts):
    server = LocalServer([artifacts / "one.so"], "--device", "cpu")
    try:
        failed = server.wait_for("version cannot be loaded")
    finally:
        server.process.kill()
        server.process.wait()
    assert "was compiled for cuda, not for cpu" in str(failed)
