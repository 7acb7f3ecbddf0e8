"""The script that tries the runtime on a GPU, as far as the emulated one goes."""

from __future__ import annotations

from functools import partial

import cuda_runtime
import pytest

from sparse_tvm.random_inputs import typical_sizes


@pytest.mark.usefixtures("gpu")
def test_its_checks(tmp_path, monkeypatch, capsys):
    sizes = {"one": (1, 4), "two": (1, 4), "open": ("batch", "sequence"), "deep": (1, 4)}
    monkeypatch.setattr(cuda_runtime, "SIZES", sizes)
    small = {"hidden": 32, "heads": 2, "intermediate": 32, "vocabulary": 50}
    monkeypatch.setattr(cuda_runtime, "SMALL", small)
    for name, value in (("LAYERS", {}), ("RUNS", 10), ("TURNS", 2), ("ROUNDS", 1)):
        monkeypatch.setattr(cuda_runtime, name, value)
    monkeypatch.setattr(cuda_runtime, "typical_sizes", partial(typical_sizes, others=4))
    cuda_runtime.build(tmp_path, "cuda-sm80")
    checks = ["graphs", "threads", "devices", "memory", "latency"]
    assert cuda_runtime.check(tmp_path, [], checks) == 0
    said = capsys.readouterr().out
    assert "graphs: program alone" in said
    assert "not wanted: program alone" in said


@pytest.mark.usefixtures("gpu")
def test_a_check_that_fails_is_told_and_counted(tmp_path, capsys):
    assert cuda_runtime.check(tmp_path, [], ["graphs", "threads"]) == 2
    assert capsys.readouterr().out.count("FAILED") == 2
