"""The script for a machine with a GPU, tried on the emulated one."""

from __future__ import annotations

import cuda_attention
import cuda_device
import pytest

from sparse_tvm.targets.cuda import H100, CudaTarget


@pytest.mark.usefixtures("gpu")
def test_its_checks_pass(capsys):
    assert cuda_device.check("cuda-sm90", [(9, 72, 72)]) == []
    assert capsys.readouterr().out.count("\n") == 2 * len(cuda_device.FORMS)


@pytest.mark.usefixtures("gpu")
def test_it_times_a_layer(tmp_path):
    path = tmp_path / "layer.so"
    cuda_device.compiled(32, 32, 4, "dense", "cuda-sm90", path, verify=False)
    assert 0 < cuda_device.layer_seconds(path, repeats=1) < 10


def test_without_a_device(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cuda_device.py"])
    assert cuda_device.main() == 1
    assert "no driver here" in capsys.readouterr().out


def test_predictions():
    rows = list(cuda_device.predicted_rows(CudaTarget("one", "", (H100,))))
    assert len(rows) == 2 + len(cuda_device.LAYERS) * len(cuda_device.TOKENS)


@pytest.mark.usefixtures("gpu")
def test_it_times_attention():
    table = list(cuda_attention.rows("cuda-sm90", float("inf"), [(1, 2, 16, 16)], repeats=1))
    assert table[-1].startswith("| 1 | 2 | 16 | 16 |")
