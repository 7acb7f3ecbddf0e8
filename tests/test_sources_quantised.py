"""Programs that PyTorch's pt2e and torchao quantised compile with their own integers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_models  # skips where a framework is missing
import torch
from torch import nn

import sparse_tvm

quantization = pytest.importorskip(
    "torchao.quantization", reason="scripts/test_sources.sh installs it"
)

BATCH = torch.export.Dim("batch")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU()
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "layers": (Layers, (2, 5, 64)),
    "images": (Images, (2, 3, 16, 16)),
}


def inputs(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def pt2e(model: str, directory: Path, *, dynamic: bool, reduce_range: bool = False) -> Path:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    kind, shape = MODELS[model]
    torch.manual_seed(0)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(
        x86.get_default_x86_inductor_quantization_config(
            is_dynamic=dynamic, reduce_range=reduce_range
        )
    )
    example = (inputs(shape, 0),)
    with torch.no_grad():
        program = torch.export.export(kind().eval(), example, dynamic_shapes=({0: BATCH},))
        prepared = prepare_pt2e(program.module(), quantizer)
        for seed in range(4):
            prepared(inputs(shape, seed))
        converted = move_exported_model_to_eval(convert_pt2e(prepared))
        path = directory / "quantised.pt2"
        torch.export.save(
            torch.export.export(converted, example, dynamic_shapes=({0: BATCH},)), path
        )
    return path


def precisions(manifest: dict[str, Any]) -> list[str]:
    return [layer["precision"] for layer in manifest["layers"]]


def agrees(path: Path, expected: Any, shape: tuple[int, ...]) -> None:
    """Compare with PyTorch on other inputs than those of --verify, of another batch."""
    x = inputs((3, *shape[1:]), 7)
    with torch.no_grad():
        wanted = expected(x).numpy()
    [found] = sparse_tvm.load(path).run(x.numpy()).values()
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize("model", MODELS)
def test_pt2e_static(model: str, tmp_path: Path) -> None:
    path = pt2e(model, tmp_path, dynamic=False)
    compiled = sparse_tvm.compile(path, tmp_path / "model.so")
    found = set(precisions(compiled.manifest))
    assert source_models.INTEGERS in found
    # Convolutions of bytes may be faster without dot products, too.
    assert found <= {source_models.INTEGERS, *(["int8"] if model == "images" else [])}
    assert not any("frozen" in layer["name"] for layer in compiled.manifest["layers"])
    agrees(compiled.path, torch.export.load(path).module(), MODELS[model][1])


def test_pt2e_dynamic(tmp_path: Path) -> None:
    path = pt2e("layers", tmp_path, dynamic=True)
    compiled = sparse_tvm.compile(path, tmp_path / "model.so")
    assert precisions(compiled.manifest) == [source_models.INTEGERS, source_models.INTEGERS]
    assert [layer["name"] for layer in compiled.manifest["layers"]] == ["first", "second"]
    agrees(compiled.path, torch.export.load(path).module(), MODELS["layers"][1])


def test_steps_of_fewer_bits_end_where_the_program_says(tmp_path: Path) -> None:
    """With ``reduce_range`` bytes end at 127, of what is larger than calibration's values too."""
    path = pt2e("layers", tmp_path, dynamic=False, reduce_range=True)
    compiled = sparse_tvm.compile(path, tmp_path / "model.so")
    x = 3 * inputs((3, 5, 64), 7)
    with torch.no_grad():
        wanted = torch.export.load(path).module()(x).numpy()
    [found] = sparse_tvm.load(compiled.path).run(x.numpy()).values()
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def test_a_process_that_knows_no_quantiser_reads_its_programs(tmp_path: Path) -> None:
    path = pt2e("layers", tmp_path, dynamic=True)
    read = f"import sparse_tvm; print(len(sparse_tvm.inspect({str(path)!r})['layers']))"
    assert subprocess.check_output([sys.executable, "-c", read], text=True).strip() == "2"


def torchao(config: Any) -> nn.Module:
    torch.manual_seed(0)
    module = Layers().eval()
    quantization.quantize_(module, config)
    return module


def test_torchao_weights(tmp_path: Path) -> None:
    module = torchao(quantization.Int8WeightOnlyConfig())
    compiled = sparse_tvm.compile(
        module,
        tmp_path / "model.so",
        example_inputs=(inputs((2, 5, 64), 0),),
        dynamic_shapes=({0: BATCH},),
    )
    assert [layer["name"] for layer in compiled.manifest["layers"]] == ["first", "second"]
    agrees(compiled.path, module, (2, 5, 64))


@pytest.mark.parametrize("saved", [False, True])
def test_torchao_dynamic(saved: bool, tmp_path: Path) -> None:
    module = torchao(quantization.Int8DynamicActivationInt8WeightConfig())
    example, dynamic = (inputs((2, 5, 64), 0),), ({0: BATCH},)
    if saved:
        path = tmp_path / "quantised.pt2"
        torch.export.save(torch.export.export(module, example, dynamic_shapes=dynamic), path)
        compiled = sparse_tvm.compile(path, tmp_path / "model.so", allow_pickle=True)
    else:
        compiled = sparse_tvm.compile(
            module, tmp_path / "model.so", example_inputs=example, dynamic_shapes=dynamic
        )
    assert [layer["name"] for layer in compiled.manifest["layers"]] == ["first", "second"]
    assert precisions(compiled.manifest) == [source_models.INTEGERS, source_models.INTEGERS]
    agrees(compiled.path, module, (2, 5, 64))


@pytest.mark.parametrize("unsigned", [False, True])
def test_torchao_dynamic_of_known_sizes(
    unsigned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By signed bytes, and by the unsigned ones that torchao takes on CPUs with VNNI alone."""
    module = torchao(quantization.Int8DynamicActivationInt8WeightConfig())
    x = inputs((2, 5, 64), 0)
    wanted = module(x).detach().numpy()
    monkeypatch.setattr("torchao.kernel.intmm._cpu_is_vnni_supported", lambda: unsigned)
    monkeypatch.setattr("torchao.kernel.intmm._cpu_is_amx_tile_supported", lambda: False)
    compiled = sparse_tvm.compile(module, tmp_path / "model.so", example_inputs=(x,))
    assert precisions(compiled.manifest) == [source_models.INTEGERS, source_models.INTEGERS]
    [found] = sparse_tvm.load(compiled.path).run(x.numpy()).values()
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
