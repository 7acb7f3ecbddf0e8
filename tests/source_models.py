"""One small BERT and one small MobileNetV2, with the same weights in PyTorch and in Keras."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if not all(map(find_spec, ("torch", "transformers", "tensorflow"))):
    pytest.skip("these tests run by scripts/test_sources.sh", allow_module_level=True)

from sparse_tvm.cpu import host_features
from sparse_tvm.frontends.tensorflow.saved_model import require_tensorflow

require_tensorflow("the tests")  # before anything else can load it

INTEGERS = "int8" if {"avx512vnni", "avxvnni"} & host_features() else "float32"
"""What layers compute with that bring integers of eight bits: elsewhere float32 is no slower."""

LAYERS, HIDDEN, HEADS, INTERMEDIATE, VOCABULARY, POSITIONS = 2, 64, 4, 128, 100, 32
SEQUENCE, SIZE = 12, 32
# Expansion, output channels, stride.
BLOCKS = ((1, 16, 1), (4, 24, 2), (4, 24, 1), (4, 32, 2))


def bert() -> Any:
    """A transformers BertModel with weights large enough for outputs to mean something."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INTERMEDIATE,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
        architectures=["BertModel"],
    )
    return BertModel(config).eval()


def bert_inputs(batch: int = 2, sequence: int = SEQUENCE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.ones((batch, sequence), np.int64)
    mask[-1, (sequence + 1) // 2 :] = 0
    return {
        "input_ids": rng.integers(0, VOCABULARY, (batch, sequence)),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, 2, (batch, sequence)),
    }


def keras_bert(model: Any) -> Any:
    """The same BERT in Keras, with the sequence length fixed."""
    import keras
    from keras import layers, ops

    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def weights(layer: Any, *arrays: np.ndarray) -> Any:
        layer.preset = arrays
        return layer

    presets: list[tuple[Any, tuple[np.ndarray, ...]]] = []

    def dense(x: Any, name: str, units: int, activation: str | None = None) -> Any:
        layer = layers.Dense(units, activation=activation, name=name.replace(".", "_"))
        presets.append((layer, (state[f"{name}.weight"].T, state[f"{name}.bias"])))
        return layer(x)

    def norm(x: Any, name: str) -> Any:
        layer = layers.LayerNormalization(epsilon=1e-12, name=name.replace(".", "_"))
        presets.append((layer, (state[f"{name}.weight"], state[f"{name}.bias"])))
        return layer(x)

    def embed(ids: Any, name: str) -> Any:
        table = state[f"embeddings.{name}.weight"]
        layer = layers.Embedding(*table.shape, name=name)
        presets.append((layer, (table,)))
        return layer(ids)

    ids, mask, segments = (
        keras.Input((SEQUENCE,), dtype="int64", name=name)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    positions = state["embeddings.position_embeddings.weight"][None, :SEQUENCE]
    x = embed(ids, "word_embeddings") + embed(segments, "token_type_embeddings")
    x = norm(x + ops.convert_to_tensor(positions), "embeddings.LayerNorm")
    bias = (1.0 - ops.reshape(ops.cast(mask, "float32"), (-1, 1, 1, SEQUENCE))) * -1e9
    size = HIDDEN // HEADS

    def split(y: Any) -> Any:
        return ops.transpose(ops.reshape(y, (-1, SEQUENCE, HEADS, size)), (0, 2, 1, 3))

    for index in range(LAYERS):
        at = f"encoder.layer.{index}"
        query, key, value = (
            split(dense(x, f"{at}.attention.self.{part}", HIDDEN))
            for part in ("query", "key", "value")
        )
        scores = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2))) / size**0.5 + bias
        context = ops.transpose(ops.matmul(ops.softmax(scores), value), (0, 2, 1, 3))
        context = ops.reshape(context, (-1, SEQUENCE, HIDDEN))
        x = norm(
            x + dense(context, f"{at}.attention.output.dense", HIDDEN),
            f"{at}.attention.output.LayerNorm",
        )
        y = dense(x, f"{at}.intermediate.dense", INTERMEDIATE, "gelu")
        x = norm(x + dense(y, f"{at}.output.dense", HIDDEN), f"{at}.output.LayerNorm")
    pooled = dense(x[:, 0], "pooler.dense", HIDDEN, "tanh")
    built = keras.Model([ids, mask, segments], {"last_hidden_state": x, "pooler_output": pooled})
    for layer, arrays in presets:
        layer.set_weights(list(arrays))
    return built


def mobilenet() -> Any:
    """A small MobileNetV2 in PyTorch, with batch norms that have seen data."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, expansion: int, outputs: int, stride: int) -> None:
            super().__init__()
            wide = inputs * expansion
            self.residual = stride == 1 and inputs == outputs
            self.expand = nn.Sequential(*convolution(inputs, wide, 1)) if expansion > 1 else None
            self.depthwise = nn.Sequential(*convolution(wide, wide, 3, stride, wide))
            self.project = nn.Sequential(*convolution(wide, outputs, 1)[:2])

        def forward(self, x: Any) -> Any:
            y = x if self.expand is None else self.expand(x)
            y = self.project(self.depthwise(y))
            return x + y if self.residual else y

    def convolution(
        inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1
    ) -> list[Any]:
        conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]

    torch.manual_seed(0)
    channels = [16, *(outputs for _, outputs, _ in BLOCKS)]
    model = nn.Sequential(
        nn.Sequential(*convolution(3, 16, 3, 2)),
        *(
            Block(inputs, expansion, outputs, stride)
            for inputs, (expansion, outputs, stride) in zip(channels, BLOCKS, strict=False)
        ),
        nn.Sequential(*convolution(channels[-1], 64, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(8, 3, SIZE, SIZE))
    return model.eval()


def mobilenet_input(batch: int = 2) -> np.ndarray:
    shape = (batch, 3, SIZE, SIZE)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def keras_mobilenet(model: Any) -> Any:
    """The same MobileNetV2 in Keras, channels last."""
    import keras
    from keras import layers

    presets: list[tuple[Any, list[np.ndarray]]] = []

    def convolution(x: Any, stage: Any) -> Any:
        conv, batch_norm, *activation = stage
        size, stride, kernel = conv.kernel_size[0], conv.stride[0], conv.weight.detach().numpy()
        if size > 1:
            x = layers.ZeroPadding2D(size // 2)(x)
        if conv.groups > 1:
            layer = layers.DepthwiseConv2D(size, stride, use_bias=False)
            kernel = kernel.transpose(2, 3, 0, 1)
        else:
            layer = layers.Conv2D(conv.out_channels, size, stride, use_bias=False)
            kernel = kernel.transpose(2, 3, 1, 0)
        x = layer(x)
        presets.append((layer, [kernel]))
        layer = layers.BatchNormalization(epsilon=batch_norm.eps)
        x = layer(x)
        tensors = (
            batch_norm.weight,
            batch_norm.bias,
            batch_norm.running_mean,
            batch_norm.running_var,
        )
        presets.append((layer, [t.detach().numpy() for t in tensors]))
        return layers.ReLU(6.0)(x) if activation else x

    inputs = x = keras.Input((SIZE, SIZE, 3), name="image")
    x = convolution(x, model[0])
    for block in list(model)[1 : 1 + len(BLOCKS)]:
        y = x if block.expand is None else convolution(x, block.expand)
        y = convolution(convolution(y, block.depthwise), block.project)
        x = layers.Add()([x, y]) if block.residual else y
    x = convolution(x, model[1 + len(BLOCKS)])
    x = layers.GlobalAveragePooling2D()(x)
    layer = layers.Dense(10)
    outputs = layer(x)
    linear = model[-1]
    presets.append((layer, [linear.weight.detach().numpy().T, linear.bias.detach().numpy()]))
    built = keras.Model(inputs, outputs)
    for layer, arrays in presets:
        layer.set_weights(arrays)
    return built


def save_keras(model: Any, directory: Path) -> dict[str, Path]:
    """Save a Keras model in each of TensorFlow's formats."""
    import tensorflow as tf

    paths = {
        "keras": directory / "model.keras",
        "savedmodel": directory / "saved",
        "tflite": directory / "model.tflite",
    }
    model.save(paths["keras"])
    model.export(paths["savedmodel"], verbose=False)
    paths["tflite"].write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    return paths
