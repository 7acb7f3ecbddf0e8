"""Prune a PyTorch model in 4x1 blocks while it trains, compile it, and compare with the dense one.

    pip install -e ".[torch]"
    python examples/prune_while_training.py

The task is made up, so that nothing has to be downloaded: tell which of ten random directions a
noisy vector is nearest to. What carries over to real models is the order of things: train; cut a
little more every few steps, and let the rest recover; make the zeros part of the weights; compile.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import sparse_tvm
from sparse_tvm.torch import Pruner

FEATURES, HIDDEN, CLASSES, BATCH = 256, 1024, 10, 256
DENSE_STEPS, PRUNING_STEPS, LAST_STEPS = 100, 200, 100
SPARSITY, STRUCTURE, EVERY = 0.9, "4x1", 10


def examples(directions: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy vectors, and the class of each."""
    classes = torch.randint(CLASSES, (count,))
    return directions[classes] + 2.0 * torch.randn(count, FEATURES), classes


def main() -> None:
    """Train, prune, compile, measure."""
    torch.manual_seed(0)
    directions = torch.randn(CLASSES, FEATURES) / 2
    model = nn.Sequential(
        nn.Linear(FEATURES, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES),
    )  # fmt: skip
    pruner = Pruner(
        model, structure=STRUCTURE, sparsity=SPARSITY, schedule="cubic", exclude="4",
        start=DENSE_STEPS, steps=PRUNING_STEPS, every=EVERY,
    )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    test_x, test_classes = examples(directions, 4096)

    def accuracy() -> float:
        with torch.no_grad():
            return float((model(test_x).argmax(1) == test_classes).float().mean())

    for step in range(DENSE_STEPS + PRUNING_STEPS + LAST_STEPS):
        if step == DENSE_STEPS:
            print(f"dense: accuracy {accuracy():.3f}")
        x, classes = examples(directions, BATCH)
        loss = nn.functional.cross_entropy(model(x), classes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        pruner.step()

    pruner.finish()  # the zeros become part of the weights
    print(f"pruned to {SPARSITY:.0%} in {STRUCTURE} blocks: accuracy {accuracy():.3f}")

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.so"
        shapes = ({0: torch.export.Dim("batch")},)
        compiled = sparse_tvm.compile(
            model.eval(), path, example_inputs=(test_x[:2],), dynamic_shapes=shapes
        )
        for layer in compiled.manifest["layers"]:
            print(f"{layer['name']}: {layer['format']}, {layer['reason']}")
        runtime = sparse_tvm.load(path)
        (logits,) = runtime.run(test_x.numpy()).values()
        agree = float((torch.from_numpy(logits).argmax(1) == test_classes).float().mean())
        result = sparse_tvm.bench(path, model, sizes={"batch": 32}, duration=1.0)
        print(f"compiled: accuracy {agree:.3f}, {result.speedup:.1f}x the speed of PyTorch")


if __name__ == "__main__":
    main()
