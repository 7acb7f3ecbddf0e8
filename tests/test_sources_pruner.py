"""Pruning PyTorch models: while they train, and in one shot."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if not all(map(find_spec, ("torch", "transformers"))):
    pytest.skip("these tests run by scripts/test_sources.sh", allow_module_level=True)

import torch
from torch import nn
from transformers import BertConfig, BertModel, Trainer, TrainingArguments
from transformers.utils import logging

import sparse_tvm
from sparse_tvm.errors import InputError, OptionError
from sparse_tvm.sparsity.masks import magnitude_mask, masked
from sparse_tvm.sparsity.pattern import Goal
from sparse_tvm.torch import (
    Pruner,
    PruningCallback,
    embedding_loss,
    hidden_state_loss,
    logit_loss,
    prune_with_data,
    similarity_loss,
)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def data(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, generator=generator)
    return x, x[:, :4].argmax(1)


def zeros(model: nn.Module) -> list[np.ndarray]:
    return [m.weight.detach().numpy() == 0 for m in model.modules() if isinstance(m, nn.Linear)]


def train(
    model: Any,
    pruner: Pruner,
    steps: int,
    *,
    optimiser: torch.optim.Optimizer | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    optimiser = optimiser or torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    x, classes = data()
    for _ in range(steps):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model(x), classes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        pruner.step()


@pytest.mark.parametrize("structure", ["unstructured", "4x1", "2:4"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_masks_hold_through_adamw_and_autocast(structure: str, dtype: Any) -> None:
    model = make_model()
    sparsity = None if structure == "2:4" else 0.75
    pruner = Pruner(model, structure=structure, sparsity=sparsity, steps=20, every=5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    seen = zeros(model)
    for _ in range(8):
        train(model, pruner, 5, optimiser=optimiser, dtype=dtype)
        now = zeros(model)
        assert all((after >= before).all() for before, after in zip(seen, now, strict=True))
        seen = now
    wanted = 0.5 if structure == "2:4" else 0.75
    assert all(share == pytest.approx(wanted, abs=0.01) for share in pruner.sparsity().values())
    pruner.finish()
    assert not any("parametrizations" in name for name in model.state_dict())
    assert all((a == b).all() for a, b in zip(zeros(model), seen, strict=True))


def test_what_is_pruned_does_not_train() -> None:
    """Momentum moves the values behind a mask, and none of it shows."""
    model = make_model()
    pruner = Pruner(model, sparsity=0.5, schedule="one-shot", steps=1, every=1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    warm_up = Pruner(make_model(), sparsity=0.0)  # counts, and prunes nothing
    train(model, warm_up, 5, optimiser=optimiser)
    pruner.step()
    before = [mask.copy() for mask in zeros(model)]
    train(model, warm_up, 5, optimiser=optimiser)
    hidden = model[0].parametrizations.weight.original.detach().numpy()[before[0]]
    assert np.any(hidden)
    assert all((a == b).all() for a, b in zip(zeros(model), before, strict=True))
    pruner.prune_to(1.0)  # a mask made anew takes no notice of what is behind it
    assert all((a == b).all() for a, b in zip(zeros(model), before, strict=True))


def test_compiled_model_follows_the_masks() -> None:
    model = make_model()
    pruner = Pruner(model, sparsity=0.8, steps=10, every=2)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, pruner, 15)
    assert all(share == pytest.approx(0.8, abs=0.01) for share in pruner.sparsity().values())
    x, _ = data()
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("stop", [3, 12, 25])
def test_interrupted_training_resumes_to_the_same_masks(stop: int, tmp_path: Path) -> None:
    options = {"structure": "4x1", "sparsity": 0.75, "steps": 20, "every": 5}

    def start() -> tuple[nn.Sequential, Pruner, torch.optim.Optimizer]:
        model = make_model()
        pruner = Pruner(model, **options)
        return model, pruner, torch.optim.AdamW(model.parameters(), lr=1e-2)

    whole, pruner, optimiser = start()
    train(whole, pruner, 30, optimiser=optimiser)
    model, pruner, optimiser = start()
    train(model, pruner, stop, optimiser=optimiser)
    parts = {"model": model, "pruner": pruner, "optimiser": optimiser}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "state.pt")
    model, pruner, optimiser = start()
    state = torch.load(tmp_path / "state.pt")
    for name, part in {"model": model, "pruner": pruner, "optimiser": optimiser}.items():
        part.load_state_dict(state[name])
    train(model, pruner, 30 - stop, optimiser=optimiser)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert all((a == b).all() for a, b in zip(zeros(model), zeros(whole), strict=True))


def test_global_scope_and_goals() -> None:
    model = make_model()
    with torch.no_grad():
        model[0].weight.mul_(10)
    pruner = Pruner(model, sparsity=0.5, scope="global", schedule="linear", steps=4, every=1)
    for _ in range(4):
        pruner.step()
    shares = pruner.sparsity()
    assert shares["0"] < 0.2 < 0.5 < shares["2"]
    sizes = {name: layer.weight.numel() for name, layer in pruner.layers.items()}
    total = sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert total == pytest.approx(0.5, abs=0.01)

    model = make_model()
    goals = {"0": Goal.parse("4x1", 0.5), "2": Goal.parse("2:4", None)}
    Pruner(model, goals=goals).prune_to(1.0)
    assert [float(mask.mean()) for mask in zeros(model)] == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "needs a sparsity"),
        ({"sparsity": 1.5}, r"not in \[0, 1\)"),
        ({"sparsity": 0.5, "structure": "odd"}, "unknown structure"),
        ({"sparsity": 0.5, "schedule": "odd"}, "unknown schedule"),
        ({"sparsity": 0.5, "scope": "odd"}, "unknown scope"),
        ({"sparsity": 0.5, "layers": "encoder"}, "matches no layer"),
        ({"sparsity": 0.5, "exclude": "("}, "not a valid regular expression"),
        ({"sparsity": 0.5, "steps": 0}, "make no schedule"),
        ({"structure": "2:4", "scope": "global"}, "scope global needs"),
        ({"goals": {"9": Goal.parse("4x1", 0.5)}}, "no layer 9"),
    ],
)
def test_refuses(options: dict[str, Any], words: str) -> None:
    model = make_model()
    with pytest.raises(OptionError, match=words):
        Pruner(model, **options)
    assert not any("parametrizations" in name for name in model.state_dict())


def test_losses_are_zero_for_equals_and_train_the_student() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 5, 6), torch.randn(8, 5, 6)
    mask = torch.ones(8, 5)
    for loss, ours, theirs in (
        (logit_loss, x, y),
        (lambda a, b: hidden_state_loss([a], [b], mask), x, y),
        (embedding_loss, x[:, 0], y[:, 0]),
        (similarity_loss, x[:, 0], y[:, 0]),
        (lambda a, b: similarity_loss(a, b, x[:, 1]), x[:, 0], y[:, 0]),
    ):
        student = ours.clone().requires_grad_()
        teacher = theirs.clone().requires_grad_()
        found = loss(student, teacher)
        found.backward()
        assert found > 0.1
        assert student.grad.abs().sum() > 0
        assert teacher.grad is None
        assert float(loss(ours, ours)) == pytest.approx(0, abs=1e-5)
    half = torch.zeros(8, 5)
    half[:, :3] = 1
    y[:, :3] = x[:, :3]
    assert float(hidden_state_loss([x], [y], half)) == 0


def test_similarity_loss_counts_those_with_others() -> None:
    """Directions in which others do not lie cost nothing, however wrong they are."""
    others = torch.eye(4)[[0, 0, 1]]
    theirs = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    ours = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    assert float(similarity_loss(ours, theirs, others)) == pytest.approx(0, abs=1e-6)
    assert float(similarity_loss(ours.flip(0), theirs, others)) > 1


class Classifier(nn.Module):
    """What a Trainer wants of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_model()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_trainer_resumes_to_the_same_masks(tmp_path: Path) -> None:
    logging.disable_progress_bar()
    x, labels = data()
    dataset = [{"x": x[i], "labels": labels[i]} for i in range(len(x))]

    def run(directory: Path, steps: int, resume: str | None = None) -> Classifier:
        torch.manual_seed(0)
        model = Classifier()
        pruner = Pruner(model, structure="4x1", sparsity=0.75, steps=20, every=4)
        arguments = TrainingArguments(
            output_dir=str(directory), max_steps=steps, save_steps=10, report_to=[], use_cpu=True,
            per_device_train_batch_size=16, learning_rate=1e-2, disable_tqdm=True, seed=0,
            lr_scheduler_type="constant", logging_strategy="no",
        )  # fmt: skip
        callback = PruningCallback(pruner, finish=steps == 30)
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole", 30)
    run(tmp_path / "parts", 10)
    resumed = run(tmp_path / "parts", 30, str(tmp_path / "parts" / "checkpoint-10"))
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(mask.mean() == 0.75 for mask in zeros(resumed))
    assert not any("parametrizations" in name for name in resumed.state_dict())


def make_bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def sentences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(10) < torch.randint(4, 11, (8, 1), generator=generator)).long()
    return [
        {"input_ids": torch.randint(100, (8, 10), generator=generator), "attention_mask": mask}
        for _ in range(count)
    ]


def test_one_shot_halves_magnitudes_error() -> None:
    teacher, held_out = make_bert(), sentences(4, 2)
    wanted = [teacher(**batch).last_hidden_state.detach() for batch in held_out]
    goal = Goal.parse("unstructured", 0.6)
    errors = []
    for method in ("magnitude", "obs"):
        model = make_bert()
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        if method == "obs":
            # The order in which they run counts, not the one in which they are given.
            goals = dict.fromkeys(reversed(layers), goal)
            found = prune_with_data(model, teacher, goals, sentences(12, 1))
            assert next(iter(found)) == "encoder.layer.0.attention.self.query"
            assert found.keys() == layers.keys()
        else:
            for layer in layers.values():
                w = layer.weight.detach().numpy()
                layer.weight.data = torch.from_numpy(masked(w, magnitude_mask(w, goal)))
        assert all(mask.mean() == pytest.approx(0.6, abs=0.01) for mask in zeros(model))
        with torch.no_grad():
            outputs = [model(**batch).last_hidden_state for batch in held_out]
        errors.append(
            sum(
                float((ours - theirs)[batch["attention_mask"].bool()].square().sum())
                for ours, theirs, batch in zip(outputs, wanted, held_out, strict=True)
            )
        )
    assert errors[1] < 0.5 * errors[0]


def test_one_shot_goes_on_under_a_pruner() -> None:
    teacher, model = make_bert(), make_bert()
    pruner = Pruner(model, structure="4x1", sparsity=0.75)
    before: list[np.ndarray] | None = None
    for sparsity in (0.5, 0.75):
        goals = dict.fromkeys(pruner.layers, Goal.parse("4x1", sparsity))
        prune_with_data(model, teacher, goals, sentences(6, 1))
        pruner.keep_zeros()
        now = zeros(model)
        assert all(mask.mean() == pytest.approx(sparsity, abs=0.02) for mask in now)
        if before is not None:
            assert all((a >= b).all() for a, b in zip(now, before, strict=True))
        before = now


def test_one_shot_refuses() -> None:
    model, goals = make_model(), {"0": Goal.parse("unstructured", 0.5)}
    with pytest.raises(InputError, match="no calibration data"):
        prune_with_data(model, make_model(), goals, [])
    with pytest.raises(InputError, match="not finite"):
        prune_with_data(model, make_model(), goals, [{"input": torch.full((8, 16), torch.nan)}])
    with pytest.raises(InputError, match=r"does not run on the calibration data: .*'x'"):
        prune_with_data(model, make_model(), goals, [{"x": torch.ones(8, 16)}])
    with pytest.raises(InputError, match=r"does not run on the calibration data: .*16"):
        prune_with_data(model, make_model(), goals, [{"input": torch.ones(8, 15)}])
    with pytest.raises(
        InputError, match="2 calibration samples are too few: layer 0 sees 2"
    ) as few:
        prune_with_data(model, make_model(), goals, [{"input": torch.ones(2, 16)}])
    assert few.value.hint == "give at least 4 samples, better 16"
    with pytest.raises(OptionError, match="there is no layer 9"):
        prune_with_data(model, make_model(), {"9": goals["0"]}, [{"input": torch.ones(8, 16)}])
    assert not any(mask.any() for mask in zeros(model))


def test_a_model_that_was_pruned_while_it_trained_compiles(tmp_path: Path) -> None:
    """Even with its masks on, which the compiler folds into the weights."""
    model = make_model()
    pruner = Pruner(model, structure="4x1", sparsity=0.75, steps=10, every=5)
    train(model, pruner, 10)
    x, _ = data(2)
    sparse_tvm.compile(model.eval(), tmp_path / "model.so", example_inputs=(x,))
    loaded = sparse_tvm.load(tmp_path / "model.so")
    (found,) = loaded.run(x.numpy()).values()
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    layers = loaded.manifest["layers"]
    assert all(layer["sparsity"] == pytest.approx(0.75, abs=0.01) for layer in layers)


def test_prune_with_data_writes_a_huggingface_directory(tmp_path: Path) -> None:
    """Biases are written too, under the checkpoint's names."""
    model, held_out = make_bert(), sentences(4, 2)
    model.save_pretrained(tmp_path / "bert")
    batches = sentences(12, 1)
    calibration = {
        name: torch.cat([batch[name] for batch in batches]).numpy() for name in batches[0]
    }
    calibration["token_type_ids"] = np.zeros_like(calibration["input_ids"])
    errors = []
    for method, data in (("magnitude", None), ("obs", calibration)):
        output = tmp_path / method
        report = sparse_tvm.prune(
            tmp_path / "bert", output, sparsity=0.6, method=method, calibrate=data
        )
        assert len(report.layers) == 12
        found = BertModel.from_pretrained(output, add_pooling_layer=False).eval()
        assert all(mask.mean() == pytest.approx(0.6, abs=0.01) for mask in zeros(found))
        with torch.no_grad():
            errors.append(
                sum(
                    float(
                        (found(**batch).last_hidden_state - model(**batch).last_hidden_state)[
                            batch["attention_mask"].bool()
                        ]
                        .square()
                        .sum()
                    )
                    for batch in held_out
                )
            )
    before = model.encoder.layer[0].intermediate.dense.bias
    assert not torch.equal(found.encoder.layer[0].intermediate.dense.bias, before)
    assert errors[1] < 0.5 * errors[0]


def test_structures_are_chosen_for_a_target() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.Linear(256, 8))
    pruner = Pruner(
        model,
        structure="auto",
        sparsity=0.9,
        steps=1,
        exclude="3",
        example_inputs=(torch.randn(64, 256),),
        target="x86-64-v4",
        threads=1,
    )
    assert set(pruner.goals) == {"0", "2"}
    pruner.prune_to(1.0)
    pruner.finish()
    for name, goal in pruner.goals.items():
        w = model.get_submodule(name).weight.detach().numpy()
        assert np.array_equal(w != 0, magnitude_mask(w, goal))
        assert np.mean(w == 0) == pytest.approx(0.9, abs=0.01)
    assert model[3].weight.count_nonzero() == model[3].weight.numel()
    assert model.training


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"structure": "auto", "sparsity": 0.9}, "needs example_inputs"),
        ({"structure": "4x1", "sparsity": 0.9, "target": "native"}, "are for structure auto"),
        ({"structure": "auto", "example_inputs": (torch.randn(2, 16),)}, "needs a sparsity"),
    ],
)
def test_structures_cannot_be_chosen(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Pruner(make_model(), **options)
