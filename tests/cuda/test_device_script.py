"""The script for a machine with a GPU, tried on the emulated one."""

from __future__ import annotations

import cuda_attention
import cuda_device
import cuda_speed
import pytest

from sparse_tvm.artifact import read_manifest
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


@pytest.mark.parametrize("script", [cuda_device, cuda_speed])
def test_without_a_device(capsys, monkeypatch, script):
    monkeypatch.setattr("sys.argv", [script.__name__])
    assert script.main() == 1
    assert "no driver here" in capsys.readouterr().out


@pytest.mark.parametrize("form", cuda_speed.FORMS)
def test_layers_whose_speed_is_measured(tmp_path, form):
    path = tmp_path / "layer.so"
    cuda_speed.compile_layer(128, 128, 16, form, path)
    stored = {layer["name"]: layer["format"] for layer in read_manifest(path)["layers"]}
    wanted = cuda_speed.FORMS[form][2]
    assert not wanted or stored["w"] == wanted.lstrip("=").partition(":")[0]


def test_predictions():
    rows = list(cuda_device.predicted_rows(CudaTarget("one", "", (H100,))))
    assert len(rows) == 2 + len(cuda_device.LAYERS) * len(cuda_device.TOKENS)


@pytest.mark.usefixtures("gpu")
def test_it_times_attention():
    table = list(cuda_attention.rows("cuda-sm90", float("inf"), [(1, 2, 16, 16)], repeats=1))
    assert table[-1].startswith("| 1 | 2 | 16 | 16 |")
