"""Which PyTorch programs are spared a second trace, and that they stay what they were."""

from __future__ import annotations

import pytest
import source_models  # noqa: F401 (skips where a framework is missing)
import torch
from torch import nn

from sparse_tvm.frontends.torch.decompose import without_second_trace


class Plain(nn.Module):
    """Only operators that are translated as they are, or have an equal that is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cast = input.to(torch.float64).to(input.dtype)
        hidden = nn.functional.dropout(self.linear(cast), 0.5, training=False)
        return (1.0 - hidden).contiguous(), nn.functional.gelu(hidden.transpose(0, 1)).contiguous()


class TwoMinus(nn.Module):
    """`rsub` with a scale, which has no equal of one operator."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rsub(x, 2.0, alpha=3)


class Training(nn.Module):
    """Dropout that drops."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class Cumulative(nn.Module):
    """An operator that is not on the list."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, 1)


def exported(module: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(module.eval(), (torch.randn(4, 8),))


def test_a_plain_program_keeps_its_meaning_names_and_original() -> None:
    program = exported(Plain())
    before = str(program.graph)
    spared = without_second_trace(program)
    assert spared is not program
    assert spared.run_decompositions({}) is spared
    assert str(program.graph) == before
    names = [node.name for node in spared.graph.nodes if node.op == "placeholder"]
    assert names == [node.name for node in program.graph.nodes if node.op == "placeholder"]
    assert not any("dropout" in str(node.target) for node in spared.graph.nodes)
    x = torch.randn(4, 8)
    for found, expected in zip(spared.module()(x), program.module()(x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("module", [TwoMinus(), Training(), Cumulative()])
def test_any_other_program_is_traced_as_before(module: nn.Module) -> None:
    program = exported(module)
    assert without_second_trace(program) is program
