"""These tests need NVIDIA's compiler and g++; ``scripts/test_cuda.sh`` installs the one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_SKIP = pytest.mark.skip(reason="scripts/test_cuda.sh runs these")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents and "SPARSE_TVM_TEST_CUDA" not in os.environ:
            item.add_marker(_SKIP)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An emulated GPU, for compiling as for running."""
    from emulated_gpu import emulated_gpu

    with emulated_gpu(monkeypatch):
        yield
