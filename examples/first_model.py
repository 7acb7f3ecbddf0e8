# %% [markdown]
"""
# From a model to a faster one

Prune a small encoder, see what would become of its layers, compile it, and compare answers and
speed with ONNX Runtime on the same pruned model. Run it cell by cell, or as a script:

    python examples/first_model.py
"""

# %%
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime

import sparse_tvm
from sparse_tvm.models.bert import BertConfig, build_bert

directory = TemporaryDirectory()
dense, pruned, artifact = (
    f"{directory.name}/{name}" for name in ("dense.onnx", "pruned.onnx", "model.so")
)
config = BertConfig(layers=2, hidden=256, heads=4, intermediate=1024, vocabulary=1000)
onnx.save(build_bert(config, batch=1, sequence=128), dense)

# %% [markdown]
# Its weights are random; a model that was pruned while it was trained starts further down. Pruning
# takes the smallest blocks of every layer, and leaves embeddings alone.

# %%
sparse_tvm.prune(dense, pruned, sparsity=0.9, structure="4x1")

# %% [markdown]
# Nothing is built yet: this is what the compiler would choose for each layer, and why.

# %%
for layer in sparse_tvm.preview(pruned)["layers"]:
    print(f"{layer['name']}: {layer['format']}, {layer['reason']}")

# %% [markdown]
# `compile` compares what it made with ONNX Runtime before it writes it.

# %%
compiled = sparse_tvm.compile(pruned, artifact)
print(f"largest difference: {max(compiled.manifest['verification']['max_abs_diff'].values()):.1e}")

# %% [markdown]
# NumPy in, NumPy out. Code for ONNX Runtime needs a session instead:
# `from sparse_tvm import session as onnxruntime`.

# %%
model = sparse_tvm.load(artifact)
ids = np.random.default_rng(0).integers(config.vocabulary, size=(1, 128))
feeds = {spec.name: np.zeros_like(ids) for spec in model.inputs}
feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
ours = model.run(feeds)
theirs = onnxruntime.InferenceSession(pruned).run(list(ours), feeds)
for output, expected in zip(ours.values(), theirs, strict=True):
    np.testing.assert_allclose(output, expected, atol=1e-4)

# %% [markdown]
# Both engines take turns in one process; the figure is the ratio of their medians.

# %%
result = sparse_tvm.bench(artifact, pruned, warmup=0.2, duration=1.0)
print(f"{result.speedup:.1f}x the speed of ONNX Runtime")
