"""Recurrent networks of PyTorch and Keras: verified by their framework, layers named after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import source_models  # noqa: F401 (skips where a framework is missing)
import torch
from torch import nn

import sparse_tvm
from sparse_tvm.errors import ModelError


class Tagger(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.encoder = kind(16, 24, batch_first=True, bidirectional=True)
        self.tags = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tags(self.encoder(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_torch(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tagger(kind).eval(), torch.randn(2, 7, 16)
    compiled = sparse_tvm.compile(model, tmp_path / "model.so", example_inputs=(x,))
    layers = {layer["name"]: layer["op"] for layer in compiled.manifest["layers"]}
    assert layers == {
        "encoder.weight_ih_l0.forward": "dense",
        "encoder.weight_hh_l0.forward": "recurrent",
        "encoder.weight_ih_l0.backward": "dense",
        "encoder.weight_hh_l0.backward": "recurrent",
        "tags": "dense",
    }


def keras_model(kind: str) -> object:
    import keras

    keras.utils.set_random_seed(0)
    layer = getattr(keras.layers, kind)
    return keras.Sequential(
        [
            keras.Input((None, 16)),
            layer(24, return_sequences=True),
            keras.layers.Bidirectional(layer(8)),
            keras.layers.Dense(3),
        ]
    )


def test_keras_lstm_of_any_length(tmp_path: Path) -> None:
    compiled = sparse_tvm.compile(keras_model("LSTM"), tmp_path / "model.so")
    operators = [layer["op"] for layer in compiled.manifest["layers"]]
    assert operators.count("recurrent") == 3


def test_keras_gru_of_any_length_which_tf2onnx_leaves_a_loop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="whether it runs at all depends on data, or on sizes"):
        sparse_tvm.compile(keras_model("GRU"), tmp_path / "model.so")
    assert not list(tmp_path.iterdir())
