"""Embedding bags of PyTorch modules: sums, means and maxima of rows of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_models  # noqa: F401 (skips where a framework is missing)
import torch
from torch import nn

import sparse_tvm
from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.torch.bags import with_summed_bags

ANY = torch.export.Dim.DYNAMIC


class Bags(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(50, 64, **options)
        self.scores = nn.Linear(64, 8)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.scores(self.bags(indices))


class Offsets(nn.Module):
    """Bags of any size, whose beginnings are an input."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(50, 64, **options)

    def forward(self, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.bags(indices, offsets)


@pytest.mark.parametrize(
    ("mode", "dynamic"), [("sum", {0: ANY}), ("mean", {0: ANY, 1: ANY}), ("max", None)]
)
def test_bags_of_one_size(mode: str, dynamic: Any, tmp_path: Path) -> None:
    """Compiling compares with PyTorch at several sizes."""
    torch.manual_seed(0)
    compiled = sparse_tvm.compile(
        Bags(mode=mode).eval(),
        tmp_path / "model.so",
        example_inputs=(torch.ones(3, 6, dtype=torch.int64),),
        dynamic_shapes=(dynamic,),
    )
    [spec] = compiled.manifest["inputs"]
    assert spec["range"] == [0, 50]
    assert [isinstance(size, str) for size in spec["shape"]] == [
        axis in (dynamic or {}) for axis in range(2)
    ]


def test_other_bags_stay() -> None:
    ones = torch.ones(3, 6, dtype=torch.int64)
    flat, begins = torch.ones(18, dtype=torch.int64), torch.tensor([0, 5, 12])
    for module, inputs in ((Bags(padding_idx=0), (ones,)), (Offsets(), (flat, begins))):
        program = torch.export.export(module.eval(), inputs)
        spelled = with_summed_bags(program)
        targets = [str(node.target) for node in spelled.graph.nodes]
        assert "aten.embedding_bag.padding_idx" in targets


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_any_size(mode: str, tmp_path: Path) -> None:
    """Bags are unrolled, their beginnings are data, and a bag may be empty."""
    torch.manual_seed(0)
    module = Offsets(mode=mode).eval()
    flat = torch.arange(18)
    inputs = (flat, torch.tensor([0, 5, 12]))
    with pytest.raises(ModelError, match=r"PyTorch cannot run the model: offsets\[0\]") as refused:
        sparse_tvm.compile(module, tmp_path / "model.so", example_inputs=inputs)
    assert "--verify-inputs" in refused.value.hint
    sparse_tvm.compile(
        module,
        tmp_path / "model.so",
        example_inputs=inputs,
        verify_inputs={"indices": inputs[0].numpy(), "offsets": inputs[1].numpy()},
    )
    loaded = sparse_tvm.load(tmp_path / "model.so")
    for begins in ([0, 5, 12], [0, 0, 17], [0, 18, 18], [0, 1, 1]):
        offsets = torch.tensor(begins)
        [found] = loaded.run({"indices": flat.numpy(), "offsets": offsets.numpy()}).values()
        expected = module(flat, offsets).detach()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
