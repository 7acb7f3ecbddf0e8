# %% [markdown]
"""
# Prune while training

Prune a PyTorch model in 4x1 blocks while it trains, compile it, and compare with the dense one. The
task is made up, so that nothing has to be downloaded: tell which of ten random directions a noisy
vector is nearest to. What carries over to real models is the order of things: train; cut a little
more every few steps, and let the rest recover; make the zeros part of the weights; compile. Run it
cell by cell, or as a script:

    pip install -e ".[torch]"
    python examples/prune_while_training.py
"""

# %%
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import sparse_tvm
from sparse_tvm.torch import Pruner

FEATURES, HIDDEN, CLASSES, BATCH = 256, 1024, 10, 256
DENSE_STEPS, PRUNING_STEPS, LAST_STEPS = 100, 200, 100

torch.manual_seed(0)
directions = torch.randn(CLASSES, FEATURES) / 2


def examples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy vectors, and the class of each."""
    classes = torch.randint(CLASSES, (count,))
    return directions[classes] + 2.0 * torch.randn(count, FEATURES), classes


# %% [markdown]
# The first steps leave the model dense. Then its masks grow on a schedule, and at the end it trains
# on with the zeros that it has.

# %%
model = nn.Sequential(
    nn.Linear(FEATURES, HIDDEN), nn.ReLU(),
    nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
    nn.Linear(HIDDEN, CLASSES),
)  # fmt: skip
pruner = Pruner(
    model, structure="4x1", sparsity=0.9, schedule="cubic", exclude="4",
    start=DENSE_STEPS, steps=PRUNING_STEPS, every=10,
)  # fmt: skip
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
test_x, test_classes = examples(4096)


def accuracy() -> float:
    """Return the share of test vectors that are told right."""
    with torch.no_grad():
        return float((model(test_x).argmax(1) == test_classes).float().mean())


for step in range(DENSE_STEPS + PRUNING_STEPS + LAST_STEPS):
    if step == DENSE_STEPS:
        print(f"dense: accuracy {accuracy():.3f}")
    x, classes = examples(BATCH)
    loss = nn.functional.cross_entropy(model(x), classes)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    pruner.step()

pruner.finish()  # the zeros become part of the weights
print(f"pruned to 90% in 4x1 blocks: accuracy {accuracy():.3f}")

# %% [markdown]
# Compiled for any batch; the compiler says what it made of each layer.

# %%
directory = TemporaryDirectory()
path = Path(directory.name) / "model.so"
shapes = ({0: torch.export.Dim("batch")},)
compiled = sparse_tvm.compile(
    model.eval(), path, example_inputs=(test_x[:2],), dynamic_shapes=shapes
)
for layer in compiled.manifest["layers"]:
    print(f"{layer['name']}: {layer['format']}, {layer['reason']}")

# %%
(logits,) = sparse_tvm.load(path).run(test_x.numpy()).values()
agree = float((torch.from_numpy(logits).argmax(1) == test_classes).float().mean())
result = sparse_tvm.bench(path, model, sizes={"batch": 32}, duration=1.0)
print(f"compiled: accuracy {agree:.3f}, {result.speedup:.1f}x the speed of PyTorch")
