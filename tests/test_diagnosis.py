from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sparse_tvm import diagnosis, machine_state
from sparse_tvm.cli import main
from sparse_tvm.cpu import usable_cores
from sparse_tvm.targets import get_target


def test_what_is_here_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["numpy"] == np.__version__
    assert found["target"] == get_target().name
    assert found["cores"] == usable_cores()
    assert set(get_target().features) <= set(found["features"])
    assert found["linkers"]


def test_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert get_target().name in text
    assert f"numpy {np.__version__}" in text


def test_what_is_slow_here_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (64.0, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4096)
    monkeypatch.setattr(diagnosis, "get_target", lambda: get_target("x86-64-v3"))
    monkeypatch.setattr(diagnosis, "architecture", lambda: "x86_64")
    monkeypatch.setattr(diagnosis, "linkers", lambda triple: [("gcc", [])])
    problems = " ".join(diagnosis.diagnose()["problems"])
    for said in ("load 64.0", "of 4096 logical", "have 256 bits", "no linker"):
        assert said in problems


def test_a_quiet_machine_with_all_has_no_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: len(os.sched_getaffinity(0)))
    monkeypatch.setattr(diagnosis, "_read", lambda path: "")
    monkeypatch.setattr(machine_state, "SYSFS", tmp_path)
    monkeypatch.setattr(diagnosis, "linkers", lambda triple: [("gcc", ["gcc"])])
    monkeypatch.setattr(diagnosis, "get_target", lambda: get_target("x86-64-v4"))
    assert diagnosis.diagnose()["problems"] == []
