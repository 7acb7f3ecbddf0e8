"""All tests run with every pass held to what it promises, and at whatever speed a machine has."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from amx_emulator import cpuinfo, emulate, emulated_target
from hypothesis import HealthCheck, settings

from sparse_tvm import cpu, suitability
from sparse_tvm.targets import TARGETS, runs_here

os.environ["SPARSE_TVM_CHECK_PASSES"] = "1"

# How long an example takes says nothing of what is tested: others use the machine, too.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


@pytest.fixture
def on_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], str]:
    """Returns the name of a target whose code runs here, with AMX emulated; skips for others."""

    def ready(name: str) -> str:
        target = TARGETS[name]
        if target is emulated_target():
            emulate()
            (tmp_path / "cpuinfo").write_text(cpuinfo())
            monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "cpuinfo")
            monkeypatch.setattr(suitability, "allow_amx", lambda: True)
        elif not runs_here(target):
            pytest.skip(f"this CPU is not of the family {name}")
        return name

    return ready
