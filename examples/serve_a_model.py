# %% [markdown]
"""
# Serve a model, and ask it

Compile an encoder for any batch and length, serve it, and send requests over HTTP as the Open
Inference Protocol has them. Needs the extra `serve`. Run it cell by cell, or as a script:

    python examples/serve_a_model.py
"""

# %%
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

import sparse_tvm
from sparse_tvm.models.bert import BertConfig, build_bert
from sparse_tvm.serving.local import LocalServer

directory = TemporaryDirectory()
dense, pruned, artifact = (
    Path(directory.name) / name for name in ("dense.onnx", "pruned.onnx", "encoder.so")
)
config = BertConfig(layers=1, hidden=64, heads=2, intermediate=256, vocabulary=1000, token_types=0)
onnx.save(build_bert(config, batch="batch", sequence="sequence"), dense)
sparse_tvm.prune(dense, pruned, sparsity=0.9, structure="4x1")
sparse_tvm.compile(pruned, artifact)

# %% [markdown]
# This is `sparse-tvm serve encoder.so` on free ports; it is ready when the model is warm.

# %%
server = LocalServer([artifact])
server.wait_for("ready")


# %% [markdown]
# A request has its tensors as JSON; Triton's client sends them in binary, which is faster.


# %%
def ask(ids: list[int]) -> np.ndarray:
    """Return the encoder's output for one sequence of token ids."""
    tensors = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    inputs = [
        {"name": name, "datatype": "INT64", "shape": [1, len(ids)], "data": data}
        for name, data in tensors.items()
    ]
    request = urllib.request.Request(
        f"{server.url}/v2/models/encoder/infer", json.dumps({"inputs": inputs}).encode()
    )
    with urllib.request.urlopen(request) as answer:
        (output,) = json.load(answer)["outputs"]
    return np.reshape(output["data"], output["shape"])


print(ask([101, 7, 102]).shape)

# %% [markdown]
# Requests that wait are joined into one run, whatever their lengths: each gets its own answer.

# %%
sequences = [list(range(1, length)) for length in range(4, 20)]
with ThreadPoolExecutor(8) as clients:
    answers = list(clients.map(ask, sequences))
for ids, answer in zip(sequences, answers, strict=True):
    np.testing.assert_allclose(answer, ask(ids), atol=1e-4)

# %%
with urllib.request.urlopen(f"{server.url}/metrics") as metrics:
    for line in metrics.read().decode().splitlines():
        if line.startswith("sparse_tvm_batch_rows_"):
            print(line)

# %% [markdown]
# SIGTERM drains the server: what was accepted is answered.

# %%
assert server.terminate() == 0
