"""PyTorch programs of float16 and bfloat16: compiled, pruned, and compared with PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest

import sparse_tvm

torch = pytest.importorskip("torch", reason="these tests run by scripts/test_sources.sh")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_exported_program(name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, name)
    layers = torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)
    module = torch.nn.Sequential(*layers).to(dtype)
    path, pruned = tmp_path / "half.pt2", tmp_path / "pruned.pt2"
    torch.export.save(torch.export.export(module, (torch.randn(2, 64).to(dtype),)), path)
    manifest = sparse_tvm.compile(path, tmp_path / "half.so").manifest
    assert manifest["inputs"][0]["dtype"] == ("float16" if name == "float16" else "float32")
    assert manifest["verification"]["max_abs_diff"]["output"] < 1e-2
    sparse_tvm.prune(path, pruned, sparsity=0.5)
    assert {tensor.dtype for tensor in torch.export.load(pruned).state_dict.values()} == {dtype}
    found = sparse_tvm.compile(pruned, tmp_path / "half.so").manifest["layers"]
    assert [layer["sparsity"] for layer in found] == [0.5, 0.5]
