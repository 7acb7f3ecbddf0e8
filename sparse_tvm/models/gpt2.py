"""GPT-2 without its head, reading a whole prompt (prefill), as an ONNX graph.

Spelled like PyTorch's TorchScript exporter spells Hugging Face's ``GPT2Model``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from sparse_tvm.models.graph import Graph, draw_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Gpt2Config:
    """Sizes of a GPT-2; the defaults are GPT-2 small's."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    vocabulary: int = 50257
    max_positions: int = 1024
    epsilon: float = 1e-5


def gpt2_weight_shapes(config: Gpt2Config) -> dict[str, tuple[int, ...]]:
    """Names (Hugging Face's) and shapes (linear layers ``[in, out]``) of every weight, in order."""
    hidden = config.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocabulary, hidden),
        "wpe.weight": (config.max_positions, hidden),
    }

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[-1:]

    for index in range(config.layers):
        layer = f"h.{index}"
        add(f"{layer}.ln_1", hidden)
        add(f"{layer}.attn.c_attn", hidden, 3 * hidden)
        add(f"{layer}.attn.c_proj", hidden, hidden)
        add(f"{layer}.ln_2", hidden)
        add(f"{layer}.mlp.c_fc", hidden, 4 * hidden)
        add(f"{layer}.mlp.c_proj", 4 * hidden, hidden)
    add("ln_f", hidden)
    return shapes


def build_gpt2(
    config: Gpt2Config,
    weights: Mapping[str, NDArray[np.float32]] | None = None,
    *,
    seed: int = 0,
    batch: int | str = 1,
    sequence: int | str = 128,
) -> onnx.ModelProto:
    """Build the ONNX graph of a GPT-2 that reads a prompt.

    Input: ``input_ids``, int64 ``[batch, sequence]``. Output, float32: ``last_hidden_state``
    ``[batch, sequence, hidden]``, behind the last layer norm.

    Parameters
    ----------
    config : Gpt2Config
        Sizes of the model.
    weights : mapping, optional
        float32 arrays named and shaped as :func:`gpt2_weight_shapes` says; drawn at random by
        default.
    seed : int
        Of the random weights.
    batch, sequence : int or str
        A fixed size, or the name of a symbolic dimension.
    """
    if weights is None:
        weights = draw_weights(gpt2_weight_shapes(config), seed)
    return _Gpt2Builder(config, weights, batch, sequence).build()


class _Gpt2Builder:
    def __init__(
        self,
        config: Gpt2Config,
        weights: Mapping[str, NDArray[np.float32]],
        batch: int | str,
        sequence: int | str,
    ) -> None:
        self.config = config
        self.weights = weights
        self.batch = batch
        self.sequence = sequence
        self.graph = Graph(opset=17)

    def build(self) -> onnx.ModelProto:
        graph, config = self.graph, self.config
        positions = self.positions()
        words = graph.op("Gather", self.weight("wte.weight"), "input_ids")
        places = graph.op("Gather", self.weight("wpe.weight"), graph.unsqueeze(positions, 0))
        hidden = graph.op("Add", words, places)
        mask = self.causal_mask(positions)
        for index in range(config.layers):
            with graph.scope(f"h.{index}"):
                hidden = self.block(f"h.{index}", hidden, mask)
        self.layer_norm("ln_f", hidden, output="last_hidden_state")
        tokens = [self.batch, self.sequence]
        return graph.model(
            "gpt2",
            {"input_ids": (onnx.TensorProto.INT64, tokens)},
            {"last_hidden_state": (onnx.TensorProto.FLOAT, [*tokens, config.hidden])},
        )

    def positions(self) -> str:
        graph = self.graph
        if isinstance(self.sequence, int):
            return graph.initializer("positions", np.arange(self.sequence))
        stop = graph.size("input_ids", 1)
        return graph.op("Range", graph.constant(0), stop, graph.constant(1))

    def causal_mask(self, positions: str) -> str:
        """0 where a key is not after the query, else the lowest float: ``[1, 1, seq, seq]``."""
        graph = self.graph
        queries = graph.unsqueeze(positions, 1)
        seen = graph.op("LessOrEqual", graph.unsqueeze(positions, 0), queries)
        lowest = graph.constant(float(np.finfo(np.float32).min))
        mask = graph.op("Where", seen, graph.constant(0.0), lowest)
        return graph.unsqueeze(graph.unsqueeze(mask, 0), 0)

    def block(self, name: str, hidden: str, mask: str) -> str:
        graph = self.graph
        with graph.scope("attn"):
            context = self.attention(f"{name}.attn", self.layer_norm(f"{name}.ln_1", hidden), mask)
        hidden = graph.op("Add", context, hidden)
        with graph.scope("mlp"):
            wide = self.linear(f"{name}.mlp.c_fc", self.layer_norm(f"{name}.ln_2", hidden))
            narrow = self.linear(f"{name}.mlp.c_proj", graph.gelu_tanh(wide))
        return graph.op("Add", hidden, narrow)

    def attention(self, name: str, hidden: str, mask: str) -> str:
        graph, config = self.graph, self.config
        projected = self.linear(f"{name}.c_attn", hidden)
        sizes = graph.constant([config.hidden] * 3)
        query, key, value = graph.ops("Split", projected, sizes, outputs=3, axis=2)
        query, value = (self.heads(x, perm=[0, 2, 1, 3]) for x in (query, value))
        key = self.heads(key, perm=[0, 2, 3, 1])
        scores = graph.op("MatMul", query, key)
        scale = graph.constant(math.sqrt(config.hidden / config.heads))
        scores = graph.op("Add", graph.op("Div", scores, scale), mask)
        context = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
        context = graph.op("Transpose", context, perm=[0, 2, 1, 3])
        context = graph.reshape(context, *self.tokens(), config.hidden)
        return self.linear(f"{name}.c_proj", context)

    def heads(self, x: str, perm: list[int]) -> str:
        heads = self.config.heads
        split = self.graph.reshape(x, *self.tokens(), heads, self.config.hidden // heads)
        return self.graph.op("Transpose", split, perm=perm)

    def linear(self, name: str, x: str) -> str:
        graph = self.graph
        inputs, outputs = self.weights[f"{name}.weight"].shape
        with graph.scope(name.rsplit(".", 1)[-1]):
            rows = graph.reshape(x, -1, inputs)
            weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
            return graph.reshape(graph.op("Gemm", rows, weight, bias), *self.tokens(), outputs)

    def layer_norm(self, name: str, x: str, output: str | None = None) -> str:
        with self.graph.scope(name.rsplit(".", 1)[-1]):
            gain, shift = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
            return self.graph.layer_norm(x, gain, shift, self.config.epsilon, output)

    def weight(self, name: str) -> str:
        return self.graph.initializer(name, self.weights[name])

    def tokens(self) -> tuple[int | str, int | str]:
        """Batch and sequence, or the names of tensors that hold them."""
        graph = self.graph
        batch, sequence = (
            size if isinstance(size, int) else graph.unsqueeze(graph.size("input_ids", axis), 0)
            for axis, size in enumerate((self.batch, self.sequence))
        )
        return batch, sequence
