"""What scripts/prune_minilm.py trains: blocks that move, and stay what they are otherwise."""

from __future__ import annotations

import copy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if not all(map(find_spec, ("torch", "transformers"))):
    pytest.skip("these tests run by scripts/test_sources.sh", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import torch
from prune_minilm import GATHERED, PRUNED, SETTLED, Course
from sparse_values import LEAST, Values
from torch import nn

ROWS = 4


def make_model() -> Any:
    """Two matrices of which a quarter of the blocks are not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            keep = torch.rand(layer.weight.shape[0] // ROWS, layer.weight.shape[1]) < 0.25
            layer.weight *= keep.repeat_interleave(ROWS, 0)
    return model


def blocks(model: Any) -> list[torch.Tensor]:
    """Which blocks are not zero, by matrix."""
    return [
        each.detach().unflatten(0, (-1, ROWS)).ne(0).any(1)
        for each in model.parameters()
        if each.ndim == 2
    ]


def gradients(values: Values, seed: int) -> list[torch.Tensor]:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    loss = (values.model(x).float() - x.float().repeat(1, 2)).square().mean()
    return list(torch.autograd.grad(loss, values.computed))


def train(values: Values, seeds: range) -> None:
    for seed in seeds:
        values.step(gradients(values, seed), 1e-2)


def move(values: Values, sparsity: float, share: float) -> None:
    found = gradients(values, 99)
    values.gather(found)
    values.move(sparsity, share)
    values.step(found, 1e-2)


def test_zeros_stay_zeros_where_no_block_moves() -> None:
    model = make_model()
    before = blocks(model)
    values = Values(model, ROWS, {})
    train(values, range(10))
    values.give(model)
    assert all(torch.equal(x, y) for x, y in zip(blocks(model), before, strict=True))


def test_a_move_reaches_the_sparsity_in_blocks_and_leaves_each_matrix_its_part() -> None:
    model = make_model()
    before = torch.cat([each.flatten() for each in blocks(model)])
    values = Values(model, ROWS, {})
    train(values, range(5))
    move(values, 0.8, 0.25)
    values.give(model)
    after = blocks(model)
    whole = torch.cat([each.flatten() for each in after])
    wanted = round(0.2 * len(whole))
    assert whole.sum() == wanted
    assert (whole & ~before).sum() == round(0.25 * wanted)
    for each in after:
        assert each.sum() >= round(LEAST * 0.2 * each.numel())
    computed = [each for each in values.computed if each.ndim == 2]
    for ours, theirs in zip(blocks(nn.ParameterList(computed)), after, strict=True):
        assert torch.equal(ours, theirs)


def test_what_goes_costs_least() -> None:
    model = make_model()
    with torch.no_grad():
        model[2].weight[:ROWS] *= 1e-4
    negligible = blocks(model)[1][0].clone()
    values = Values(model, ROWS, {})
    train(values, range(1))
    with torch.no_grad():  # undo the step, which is larger than such weights
        for each, parameter in zip(values._trained, model.parameters(), strict=True):
            flat = parameter.detach().flatten()
            each.copy_(flat[flat != 0] if parameter.ndim == 2 else flat)
    share = sum(int(each.sum()) for each in blocks(model)) - int(negligible.sum())
    move(values, 1 - share / sum(each.numel() for each in blocks(model)), 0.0)
    values.give(model)
    assert not blocks(model)[1][0].any()


def test_a_resumed_run_goes_on_alike_even_where_new_blocks_are_still_zero() -> None:
    model = make_model()
    values = Values(model, ROWS, {})
    train(values, range(5))
    values.gather(gradients(values, 99))
    values.move(0.8, 0.25)  # what came is zero, and nothing has moved it
    for each in (model, values.model):
        values.give(each)
    resumed = Values(model, ROWS, copy.deepcopy(values.state()))
    for each in (values, resumed):
        train(each, range(5, 10))
    for ours, theirs in zip(resumed.computed, values.computed, strict=True):
        assert torch.equal(ours, theirs)


def test_a_course_ends_where_it_should() -> None:
    course = Course(steps=2000, start=0.7, end=0.9, exchanged=0.1)
    moves = [step for step in range(2000) if course.moves(step)]
    sparsities = [course.sparsity(step) for step in moves]
    assert sparsities == sorted(sparsities)
    assert sparsities[0] > 0.7
    assert all(course.sparsity(step) == 0.9 for step in moves if step >= PRUNED * 2000)
    assert course.growth(moves[-1]) == pytest.approx(0, abs=1e-9)
    assert moves[-1] < SETTLED * 2000 + 100
    for step in moves:
        assert all(course.gathers(step - back) for back in range(GATHERED))
    still = Course(steps=2000, start=0.9, end=0.9, exchanged=0.0)
    assert not any(still.gathers(step) for step in range(2000))
