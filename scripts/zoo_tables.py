"""The zoo's recommenders, models of tables and graphs, and generators."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from zoo_doors import (
    DYNAMO,
    KERAS,
    LEGACY,
    MODULE,
    PT2,
    SAVED_MODEL,
    TFLITE,
    Family,
    TorchModel,
    keras_door,
    torch_door,
)

FIELDS, DENSE, CATEGORIES, WIDTH = 6, 5, 50, 16


def _fields(module: Any, numbers: bool = True) -> TorchModel:
    """A recommender of categories, and of numbers beside them."""
    import torch

    categories = torch.ones(3, FIELDS, dtype=torch.int64)
    inputs = (categories, torch.randn(3, DENSE)) if numbers else (categories,)
    names = ["categories", "numbers"][: len(inputs)]
    return TorchModel(module, inputs, names, {name: {0: "batch"} for name in names})


def _perceptron(*sizes: int) -> Any:
    from torch import nn

    layers: list[Any] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def dlrm() -> TorchModel:
    """Embedding bags, a perceptron, and the products of all pairs."""
    import torch
    from torch import nn

    class Dlrm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.ModuleList(nn.Embedding(CATEGORIES, WIDTH) for _ in range(FIELDS))
            self.bottom = _perceptron(DENSE, 32, WIDTH)
            pairs = (FIELDS + 1) * FIELDS // 2
            self.top = _perceptron(WIDTH + pairs, 64, 1)
            self.register_buffer("pairs", torch.tril_indices(FIELDS + 1, FIELDS + 1, -1))

        def forward(self, categories: Any, numbers: Any) -> Any:
            x = self.bottom(numbers)
            vectors = [table(categories[:, i]) for i, table in enumerate(self.embeddings)]
            stacked = torch.stack([x, *vectors], 1)
            products = torch.bmm(stacked, stacked.transpose(1, 2))
            chosen = products[:, self.pairs[0], self.pairs[1]]
            return self.top(torch.cat([x, chosen], 1)).sigmoid()

    return _fields(Dlrm())


def deep_fm() -> TorchModel:
    import torch
    from torch import nn

    class DeepFm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Embedding(CATEGORIES, 1)
            self.second = nn.Embedding(CATEGORIES, WIDTH)
            self.deep = _perceptron(FIELDS * WIDTH + DENSE, 64, 32, 1)

        def forward(self, categories: Any, numbers: Any) -> Any:
            vectors = self.second(categories)
            pairs = (vectors.sum(1) ** 2 - (vectors**2).sum(1)).sum(1, keepdim=True) / 2
            deep = self.deep(torch.cat([vectors.flatten(1), numbers], 1))
            return (self.first(categories).sum(1) + pairs + deep).sigmoid()

    return _fields(DeepFm())


def wide_and_deep() -> TorchModel:
    import torch
    from torch import nn

    class WideDeep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.EmbeddingBag(CATEGORIES, 1, mode="sum")
            self.embeddings = nn.Embedding(CATEGORIES, WIDTH)
            self.deep = _perceptron(FIELDS * WIDTH + DENSE, 64, 1)

        def forward(self, categories: Any, numbers: Any) -> Any:
            deep = torch.cat([self.embeddings(categories).flatten(1), numbers], 1)
            return (self.wide(categories) + self.deep(deep)).sigmoid()

    return _fields(WideDeep())


def cross_network() -> TorchModel:
    """DCN-v2."""
    import torch
    from torch import nn

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = FIELDS * WIDTH + DENSE
            self.embeddings = nn.Embedding(CATEGORIES, WIDTH)
            self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
            self.deep = _perceptron(width, 64, 32)
            self.score = nn.Linear(width + 32, 1)

        def forward(self, categories: Any, numbers: Any) -> Any:
            first = x = torch.cat([self.embeddings(categories).flatten(1), numbers], 1)
            for cross in self.crosses:
                x = first * cross(x) + x
            return self.score(torch.cat([x, self.deep(first)], 1)).sigmoid()

    return _fields(Cross())


def neural_collaborative() -> TorchModel:
    import torch
    from torch import nn

    class Filtering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(CATEGORIES, WIDTH) for _ in range(4))
            self.deep = _perceptron(2 * WIDTH, 32, WIDTH)
            self.score = nn.Linear(2 * WIDTH, 1)

        def forward(self, user: Any, item: Any) -> Any:
            product = self.tables[0](user) * self.tables[1](item)
            deep = self.deep(torch.cat([self.tables[2](user), self.tables[3](item)], 1))
            return self.score(torch.cat([product, deep], 1)).sigmoid()

    ones = torch.ones(3, dtype=torch.int64)
    axes = {"user": {0: "batch"}, "item": {0: "batch"}}
    return TorchModel(Filtering(), (ones, ones), list(axes), axes)


def auto_int() -> TorchModel:
    """Attention between fields; the same for FT-Transformer but for its numbers."""
    import torch
    from torch import nn

    class AutoInt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.Embedding(CATEGORIES, WIDTH)
            self.numbers = nn.Parameter(torch.randn(DENSE, WIDTH))
            self.attention = nn.ModuleList(
                nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2)
            )
            self.score = nn.Linear((FIELDS + DENSE) * WIDTH, 1)

        def forward(self, categories: Any, numbers: Any) -> Any:
            x = torch.cat([self.embeddings(categories), numbers[:, :, None] * self.numbers], 1)
            for attention in self.attention:
                x = torch.relu(attention(x, x, x, need_weights=False)[0] + x)
            return self.score(x.flatten(1)).sigmoid()

    return _fields(AutoInt())


def self_attentive() -> TorchModel:
    """SASRec: causal attention over what was bought before, scores of all items."""
    import torch
    from torch import nn

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(CATEGORIES, 32)
            self.positions = nn.Embedding(64, 32)
            layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, items: Any) -> Any:
            length = items.shape[1]
            places = torch.arange(length)
            mask = places[None] > places[:, None]
            x = self.items(items) + self.positions(places)
            return self.encoder(x, mask=mask)[:, -1] @ self.items.weight.T

    axes = {"items": {0: "batch", 1: "length"}}
    return TorchModel(Sequence(), (torch.ones(2, 10, dtype=torch.int64),), ["items"], axes)


def interest() -> TorchModel:
    """DIN: a candidate attends to the history, padded with item 0."""
    import torch
    from torch import nn

    class Interest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(CATEGORIES, WIDTH)
            self.attention = _perceptron(4 * WIDTH, 32, 1)
            self.top = _perceptron(2 * WIDTH, 32, 1)

        def forward(self, history: Any, candidate: Any) -> Any:
            past, one = self.items(history), self.items(candidate)[:, None]
            one = one.expand_as(past)
            scores = self.attention(torch.cat([past, one, past - one, past * one], 2))
            scores = scores.masked_fill((history == 0)[:, :, None], 0.0)
            return self.top(torch.cat([(scores * past).sum(1), one[:, 0]], 1)).sigmoid()

    axes = {"history": {0: "batch", 1: "length"}, "candidate": {0: "batch"}}
    ones = torch.ones(2, 10, dtype=torch.int64)
    return TorchModel(Interest(), (ones, ones[:, 0].clone()), list(axes), axes)


def gated_experts() -> TorchModel:
    """MMoE: experts shared by two tasks."""
    import torch
    from torch import nn

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(_perceptron(24, 32, 16) for _ in range(4))
            self.gates = nn.ModuleList(nn.Linear(24, 4) for _ in range(2))
            self.towers = nn.ModuleList(_perceptron(16, 16, 1) for _ in range(2))

        def forward(self, numbers: Any) -> Any:
            found = torch.stack([expert(numbers) for expert in self.experts], 1)
            return tuple(
                tower(torch.einsum("be,bew->bw", gate(numbers).softmax(1), found))
                for gate, tower in zip(self.gates, self.towers, strict=True)
            )

    return TorchModel(Experts(), (torch.randn(3, 24),), ["numbers"], {"numbers": {0: "batch"}})


def graph_convolution() -> TorchModel:
    """Two graph convolutions and one graph attention, over a dense adjacency matrix."""
    import torch
    from torch import nn

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 32)
            self.source, self.target = nn.Linear(32, 1), nn.Linear(32, 1)
            self.scores = nn.Linear(32, 4)

        def forward(self, nodes: Any, edges: Any) -> Any:
            linked = (edges > 0).to(nodes.dtype)
            degree = linked.sum(1, keepdim=True).clamp(min=1)
            x = torch.relu(linked @ self.first(nodes) / degree)
            x = torch.relu(linked @ self.second(x) / degree)
            weights = nn.functional.leaky_relu(self.source(x) + self.target(x).transpose(0, 1), 0.2)
            weights = weights.masked_fill(linked == 0, -1e9).softmax(1)
            return self.scores(weights @ x)

    axes = {"nodes": {0: "nodes"}, "edges": {0: "nodes", 1: "nodes"}}
    inputs = (torch.randn(7, 16), torch.randn(7, 7))
    return TorchModel(Graph(), inputs, list(axes), axes)


def denoiser() -> TorchModel:
    """A diffusion model's U-Net: group norms, time embeddings, attention to a text."""
    import math

    import torch
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.norm, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
            self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
            self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
            self.time = nn.Linear(32, outputs)
            self.skip = nn.Conv2d(inputs, outputs, 1)

        def forward(self, x: Any, time: Any) -> Any:
            y = self.first(nn.functional.silu(self.norm(x))) + self.time(time)[:, :, None, None]
            return self.skip(x) + self.second(nn.functional.silu(self.norm2(y)))

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
            self.down = nn.Conv2d(16, 16, 3, 2, 1)
            self.blocks = nn.ModuleList([Residual(16, 16), Residual(16, 32), Residual(48, 16)])
            self.query, self.key = nn.Linear(32, 32), nn.Linear(24, 32)
            self.value, self.out = nn.Linear(24, 32), nn.Linear(32, 32)

        def forward(self, sample: Any, timestep: Any, text: Any) -> Any:
            rates = torch.exp(torch.arange(16) * (-math.log(10000) / 16))
            angles = timestep[:, None].float() * rates
            time = torch.cat([angles.sin(), angles.cos()], 1)
            first = self.blocks[0](self.enter(sample), time)
            x = self.blocks[1](self.down(first), time)
            x = x + self.attend(x.flatten(2).transpose(1, 2), text).transpose(1, 2).reshape(x.shape)
            x = nn.functional.interpolate(x, scale_factor=2.0)
            return self.leave(self.blocks[2](torch.cat([x, first], 1), time))

        def attend(self, x: Any, text: Any) -> Any:
            def heads(y: Any) -> Any:
                return y.unflatten(2, (4, 8)).transpose(1, 2)

            found = nn.functional.scaled_dot_product_attention(
                heads(self.query(x)), heads(self.key(text)), heads(self.value(text))
            )
            return self.out(found.transpose(1, 2).flatten(2))

    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([3, 500]), torch.randn(2, 7, 24))
    axes = {"sample": {0: "batch"}, "timestep": {0: "batch"}, "text": {0: "batch", 1: "words"}}
    return TorchModel(Denoiser(), inputs, list(axes), axes)


def autoencoder() -> TorchModel:
    import torch
    from torch import nn

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(
                nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1),
                nn.InstanceNorm2d(32, affine=True), nn.ELU(), nn.Flatten(), nn.Linear(2048, 16),
            )  # fmt: skip
            self.decoder = nn.Sequential(
                nn.Linear(16, 2048), nn.Unflatten(1, (32, 8, 8)),
                nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.Softplus(),
                nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2), nn.Tanh(),
            )  # fmt: skip

        def forward(self, image: Any) -> Any:
            code = self.encoder(image)
            return code, self.decoder(code)

    return TorchModel(
        Autoencoder(), (torch.randn(2, 3, 32, 32),), ["image"], {"image": {0: "batch"}}
    )


def keras_recommender() -> Any:
    import keras
    from keras import layers

    user = keras.Input((1,), dtype="int32", name="user")
    items = keras.Input((10,), dtype="int32", name="items")
    numbers = keras.Input((5,), name="numbers")
    table = layers.Embedding(CATEGORIES, WIDTH)
    history = layers.GlobalAveragePooling1D()(table(items))
    x = layers.Concatenate()([layers.Flatten()(table(user)), history, numbers])
    for size in (64, 32):
        x = layers.Dense(size, "gelu")(x)
        x = layers.BatchNormalization()(x)
    return keras.Model([user, items, numbers], layers.Dense(1, "sigmoid", name="score")(x))


def keras_transformer() -> Any:
    """Keras' own multi-head attention over words."""
    import keras
    from keras import layers, ops

    x = inputs = keras.Input((24,), dtype="int32", name="words")
    x = layers.Embedding(100, 32)(x) + layers.Embedding(24, 32)(ops.arange(24))
    for _ in range(2):
        y = layers.MultiHeadAttention(4, 8)(x, x)
        x = layers.LayerNormalization()(x + y)
        y = layers.Dense(32)(layers.Dense(64, "gelu")(x))
        x = layers.LayerNormalization()(x + y)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling1D()(x)))


def keras_unet() -> Any:
    import keras
    from keras import layers

    def block(x: Any, filters: int) -> Any:
        x = layers.SeparableConv2D(filters, 3, padding="same")(x)
        return layers.LeakyReLU(0.1)(layers.BatchNormalization()(x))

    inputs = keras.Input((32, 32, 3), name="image")
    first = block(inputs, 16)
    second = block(layers.MaxPooling2D()(first), 32)
    x = layers.Conv2DTranspose(16, 2, 2, padding="same")(second)
    x = block(layers.Concatenate()([x, first]), 16)
    x = layers.UpSampling2D(2, interpolation="bilinear")(x)
    return keras.Model(inputs, layers.Conv2D(2, 1, activation="softmax")(x))


def keras_perceptron() -> Any:
    import keras
    from keras import layers

    inputs = keras.Input((32,), name="features")
    x = layers.Normalization(mean=0.1, variance=2.0)(inputs)
    for size, activation in ((64, "relu"), (64, "selu"), (32, "tanh")):
        x = layers.Dense(size, activation)(x)
    return keras.Model(inputs, layers.Dense(4, "softmax")(x))


FAMILIES: list[Family] = [
    *(
        Family(name, kind, door, torch_door(door, make))
        for name, kind, door, make in (
            ("dlrm", "recommendation", LEGACY, dlrm),
            ("deep-fm", "recommendation", DYNAMO, deep_fm),
            ("wide-and-deep", "recommendation", LEGACY, wide_and_deep),
            ("dcn-v2", "recommendation", PT2, cross_network),
            ("ncf", "recommendation", MODULE, neural_collaborative),
            ("auto-int", "recommendation", LEGACY, auto_int),
            ("sasrec", "recommendation", DYNAMO, self_attentive),
            ("din", "recommendation", LEGACY, interest),
            ("mmoe", "recommendation", DYNAMO, gated_experts),
            ("graph", "graph", LEGACY, graph_convolution),
            ("denoiser", "generation", DYNAMO, denoiser),
            ("autoencoder", "generation", LEGACY, autoencoder),
        )
    ),
    *(
        Family(name, kind, door, keras_door(door, partial(make)))
        for name, kind, door, make in (
            ("keras-recommender", "recommendation", KERAS, keras_recommender),
            ("keras-transformer", "text encoder", SAVED_MODEL, keras_transformer),
            ("keras-unet", "segmentation", TFLITE, keras_unet),
            ("keras-perceptron", "table", KERAS, keras_perceptron),
        )
    ),
]
