"""Vision transformers as ONNX graphs, spelled like PyTorch's TorchScript exporter does."""

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
class VitConfig:
    """Sizes of a vision transformer; the defaults are ViT-base's for 224 x 224 pixels."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    intermediate: int = 3072
    image: int = 224
    patch: int = 16
    channels: int = 3
    epsilon: float = 1e-12

    @property
    def tokens(self) -> int:
        """Patches of an image, and the class token."""
        return (self.image // self.patch) ** 2 + 1


def vit_weight_shapes(config: VitConfig) -> dict[str, tuple[int, ...]]:
    """Names (Hugging Face's) and shapes (linear layers ``[out, in]``) of every weight, in order."""
    hidden, patches = config.hidden, "embeddings.patch_embeddings.projection"
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, hidden),
        "embeddings.position_embeddings": (1, config.tokens, hidden),
        f"{patches}.weight": (hidden, config.channels, config.patch, config.patch),
        f"{patches}.bias": (hidden,),
    }

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    for index in range(config.layers):
        layer = f"layers.{index}"
        add(f"{layer}.layernorm_before", hidden)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            add(f"{layer}.attention.{projection}", hidden, hidden)
        add(f"{layer}.layernorm_after", hidden)
        add(f"{layer}.mlp.fc1", config.intermediate, hidden)
        add(f"{layer}.mlp.fc2", hidden, config.intermediate)
    add("layernorm", hidden)
    return shapes


def build_vit(
    config: VitConfig,
    weights: Mapping[str, NDArray[np.float32]] | None = None,
    *,
    seed: int = 0,
    batch: int | str = 1,
) -> onnx.ModelProto:
    """Build the ONNX graph of a vision transformer.

    Input: ``pixel_values``, float32 ``[batch, channels, image, image]``. Output, float32:
    ``last_hidden_state`` ``[batch, tokens, hidden]``, behind the last layer norm.

    Parameters
    ----------
    config : VitConfig
        Sizes of the model.
    weights : mapping, optional
        float32 arrays named and shaped as :func:`vit_weight_shapes` says; drawn at random by
        default.
    seed : int
        Of the random weights.
    batch : int or str
        A fixed size, or the name of a symbolic dimension.
    """
    if weights is None:
        weights = draw_weights(vit_weight_shapes(config), seed)
    return _VitBuilder(config, weights, batch).build()


class _VitBuilder:
    def __init__(
        self, config: VitConfig, weights: Mapping[str, NDArray[np.float32]], batch: int | str
    ) -> None:
        self.config = config
        self.weights = weights
        self.batch = batch
        self.graph = Graph(opset=17)

    def build(self) -> onnx.ModelProto:
        config = self.config
        with self.graph.scope("embeddings"):
            hidden = self.embeddings()
        for index in range(config.layers):
            with self.graph.scope(f"layers.{index}"):
                hidden = self.layer(f"layers.{index}", hidden)
        self.layer_norm("layernorm", hidden, output="last_hidden_state")
        real = onnx.TensorProto.FLOAT
        pixels = [self.batch, config.channels, config.image, config.image]
        return self.graph.model(
            "vit",
            {"pixel_values": (real, pixels)},
            {"last_hidden_state": (real, [self.batch, config.tokens, config.hidden])},
        )

    def embeddings(self) -> str:
        graph, config = self.graph, self.config
        projection = "embeddings.patch_embeddings.projection"
        weight, bias = self.weight(f"{projection}.weight"), self.weight(f"{projection}.bias")
        patch = [config.patch, config.patch]
        patches = graph.op("Conv", "pixel_values", weight, bias, kernel_shape=patch, strides=patch)
        patches = graph.reshape(patches, self.batch_size(), config.hidden, -1)
        patches = graph.op("Transpose", patches, perm=[0, 2, 1])
        shape = graph.shape(self.batch_size(), 1, config.hidden)
        token = graph.op("Expand", self.weight("embeddings.cls_token"), shape)
        tokens = graph.op("Concat", token, patches, axis=1)
        return graph.op("Add", tokens, self.weight("embeddings.position_embeddings"))

    def layer(self, name: str, hidden: str) -> str:
        graph = self.graph
        normal = self.layer_norm(f"{name}.layernorm_before", hidden)
        with graph.scope("attention"):
            context = self.attention(f"{name}.attention", normal)
        hidden = graph.op("Add", context, hidden)
        normal = self.layer_norm(f"{name}.layernorm_after", hidden)
        with graph.scope("mlp"):
            wide = graph.gelu_erf(self.linear(f"{name}.mlp.fc1", normal))
            return graph.op("Add", self.linear(f"{name}.mlp.fc2", wide), hidden)

    def attention(self, name: str, hidden: str) -> str:
        graph, config = self.graph, self.config
        query = self.heads(f"{name}.q_proj", hidden, perm=[0, 2, 1, 3])
        key = self.heads(f"{name}.k_proj", hidden, perm=[0, 2, 3, 1])
        value = self.heads(f"{name}.v_proj", hidden, perm=[0, 2, 1, 3])
        root = graph.constant(math.sqrt((config.heads / config.hidden) ** 0.5))
        scores = graph.op("MatMul", graph.op("Mul", query, root), graph.op("Mul", key, root))
        context = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
        context = graph.op("Transpose", context, perm=[0, 2, 1, 3])
        context = graph.reshape(context, self.batch_size(), config.tokens, config.hidden)
        return self.linear(f"{name}.o_proj", context)

    def heads(self, name: str, hidden: str, perm: list[int]) -> str:
        config = self.config
        projected = self.linear(name, hidden)
        head_size = config.hidden // config.heads
        shape = [self.batch_size(), config.tokens, config.heads, head_size]
        return self.graph.op("Transpose", self.graph.reshape(projected, *shape), perm=perm)

    def linear(self, name: str, x: str) -> str:
        graph = self.graph
        with graph.scope(name.rsplit(".", 1)[-1]):
            kernel = graph.initializer(f"{name}.weight", self.weights[f"{name}.weight"].T)
            return graph.op("Add", self.weight(f"{name}.bias"), graph.op("MatMul", x, kernel))

    def layer_norm(self, name: str, x: str, output: str | None = None) -> str:
        with self.graph.scope(name.rsplit(".", 1)[-1]):
            gain, shift = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
            return self.graph.layer_norm(x, gain, shift, self.config.epsilon, output)

    def weight(self, name: str) -> str:
        return self.graph.initializer(name, self.weights[name])

    def batch_size(self) -> int | str:
        """The batch, or the name of a tensor that holds it."""
        if isinstance(self.batch, int):
            return self.batch
        return self.graph.unsqueeze(self.graph.size("pixel_values", 0), 0)
