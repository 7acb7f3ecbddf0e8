"""What PyTorch and TensorFlow export beyond plain float32 graphs: int8, and branches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import source_models  # noqa: F401 (skips where a framework is missing)
import torch
from torch import nn

import sparse_tvm


@pytest.mark.parametrize("io", ["float32", "int8"])
def test_int8_tflite_equals_tflite(io: str, tmp_path: Path) -> None:
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    layers = [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    converter = tf.lite.TFLiteConverter.from_keras_model(keras.Sequential(layers))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    examples = [[rng.standard_normal((1, 64)).astype(np.float32)] for _ in range(20)]
    converter.representative_dataset = lambda: examples
    if io == "int8":
        converter.inference_input_type = converter.inference_output_type = tf.int8
    path = tmp_path / "quantised.tflite"
    path.write_bytes(converter.convert())

    compiled = sparse_tvm.compile(path, tmp_path / "model.so")
    assert {layer["precision"] for layer in compiled.manifest["layers"]} == {"int8"}
    interpreter = tf.lite.Interpreter(model_content=path.read_bytes())
    interpreter.allocate_tensors()
    (spec,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    model = sparse_tvm.load(compiled.path)
    for (example,) in examples:
        x = example if io == "float32" else (40 * example).clip(-128, 127).astype(np.int8)
        interpreter.set_tensor(spec["index"], x)
        interpreter.invoke()
        expected = interpreter.get_tensor(result["index"])
        (y,) = model.run(x).values()
        assert y.dtype == expected.dtype
        quantum = 1 if io == "int8" else np.ptp(expected) / 100
        assert np.abs(y.astype(float) - expected.astype(float)).max() <= quantum


class Conditional(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))


def test_torch_cond_is_a_branch_at_run_time(tmp_path: Path) -> None:
    path = sparse_tvm.compile(
        Conditional(), tmp_path / "model.so", example_inputs=(torch.ones(4),)
    ).path
    model = sparse_tvm.load(path)
    for sign in (1, -1):
        x = np.full(4, sign, np.float32)
        (y,) = model.run(x).values()
        np.testing.assert_array_equal(y, x + sign)


class Ratings(nn.Module):
    """Vectors of two inputs of the same kind."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(9, 8), nn.Embedding(9, 8)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return self.users(user) - self.items(item)


def test_one_tensor_may_be_the_example_of_two_inputs(tmp_path: Path) -> None:
    model, ones = Ratings(), torch.ones(3, dtype=torch.int64)
    path = sparse_tvm.compile(model, tmp_path / "model.so", example_inputs=(ones, ones)).path
    user, item = np.array([1, 2, 3]), np.array([4, 5, 6])
    (found,) = sparse_tvm.load(path).run({"user": user, "item": item}).values()
    expected = model(torch.tensor(user), torch.tensor(item)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


class Relative(nn.Module):
    """Attention whose result is viewed as it lies in memory, and a table written in place."""

    def __init__(self, view: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.view = view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.zeros(5, 5)
        table[0, 0:] = 2
        table[0, 0] = 3
        heads = x.view(x.shape[0], 5, 2, 4).transpose(1, 2)
        found = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=table)
        return self.view(found.transpose(1, 2).contiguous(), (x.shape[0], 5, 8)).erf()


@pytest.mark.parametrize("view", [torch.Tensor.view, torch.reshape])
def test_views_and_tables_written_in_place(
    tmp_path: Path, view: Callable[..., torch.Tensor]
) -> None:
    model, x = Relative(view), torch.randn(2, 5, 8)
    options = {"example_inputs": (x,), "dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
    path = sparse_tvm.compile(model, tmp_path / "model.so", **options).path
    (found,) = sparse_tvm.load(path).run(x.numpy()).values()
    np.testing.assert_allclose(found, model(x).numpy(), atol=1e-5)
