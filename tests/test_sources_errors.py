"""What each source refuses, in one clear line, and what is never unpickled."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import source_models  # noqa: F401 (skips where a framework is missing)
import torch
from torch import nn

import sparse_tvm
from sparse_tvm.cli import main
from sparse_tvm.errors import ModelError, OptionError
from sparse_tvm.extras import install_command


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def refusal(model: Any, directory: Path, **options: Any) -> str:
    with pytest.raises((ModelError, OptionError)) as caught:
        sparse_tvm.compile(model, directory / "model.so", **options)
    assert not (directory / "model.so").exists()
    text = str(caught.value)
    assert "\n" not in text
    sys.stderr.write(f"{text}\n")
    return text


@pytest.mark.parametrize("name", ["model.pt", "model.onnx"])
@pytest.mark.parametrize("archive", [False, True])
def test_a_pickle_is_not_opened(name: str, archive: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / name, tmp_path / "exploded"
    if archive:
        torch.save(Bomb(mark), path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    assert "--allow-pickle" in refusal(path, tmp_path)
    assert main(["inspect", str(path)]) == 1
    assert not mark.exists()


def test_a_pickled_module_is_opened_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(nn.Linear(64, 64)).eval(), path)
    arguments = ["compile", str(path), "-o", str(tmp_path / "m.so"), "-q"]
    assert main([*arguments, "--input-shape", "input:2,64"]) == 1
    assert main([*arguments, "--input-shape", "input:2,64", "--allow-pickle"]) == 0


def test_pickled_weights_alone_are_no_model(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 4).state_dict(), tmp_path / "weights.pt")
    assert "not a model" in refusal(tmp_path / "weights.pt", tmp_path, allow_pickle=True)


def exported(directory: Path) -> Path:
    path = directory / "model.pt2"
    torch.export.save(torch.export.export(nn.Linear(64, 64), (torch.zeros(2, 64),)), path)
    return path


def test_a_program_with_a_pickle_in_it_is_not_opened(tmp_path: Path) -> None:
    honest, path, mark = exported(tmp_path), tmp_path / "evil.pt2", tmp_path / "exploded"
    torch.save((Bomb(mark),), tmp_path / "bomb.pt")
    with zipfile.ZipFile(honest) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.namelist():
            evil = entry.endswith("sample_inputs/model.pt")
            data = (tmp_path / "bomb.pt").read_bytes() if evil else source.read(entry)
            target.writestr(entry, data)
    assert "pickle" in refusal(path, tmp_path)
    assert not mark.exists()


def test_a_truncated_program(tmp_path: Path) -> None:
    path = exported(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    assert "damaged" in refusal(path, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4)), path)
    assert "TorchScript" in refusal(path, tmp_path)


def test_a_module_without_examples(tmp_path: Path) -> None:
    assert "example_inputs" in refusal(nn.Linear(4, 4), tmp_path)


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_torch_control_flow(tmp_path: Path) -> None:
    refusal(Branch(), tmp_path, example_inputs=(torch.ones(4),))


def test_torch_custom_operator(tmp_path: Path) -> None:
    @torch.library.custom_op("example::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)

    class Custom(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    assert "example.twice" in refusal(Custom(), tmp_path, example_inputs=(torch.ones(4),))


def test_torch_double_precision_program(tmp_path: Path) -> None:
    path = tmp_path / "double.pt2"
    module = nn.Linear(64, 64).to(torch.float64)
    example = torch.zeros(2, 64, dtype=torch.float64)
    torch.export.save(torch.export.export(module, (example,)), path)
    assert "float32 or of 16 bits" in refusal(path, tmp_path)


def huggingface(directory: Path, **changes: Any) -> Path:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    path = directory / "model"
    BertModel(BertConfig(vocab_size=64, intermediate_size=64, **sizes)).save_pretrained(path)
    values = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"architectures": ["MyOwnModel"]}, "unknown architecture MyOwnModel"),
        ({"architectures": None}, "no architecture"),
        ({"architectures": ["BertForSequenceClassification"]}, "classifier.weight"),
    ],
)
def test_huggingface(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert reason in refusal(huggingface(tmp_path, **changes), tmp_path)


def test_huggingface_pickled_weights(tmp_path: Path) -> None:
    path = huggingface(tmp_path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert "safe_serialization" in refusal(path, tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_huggingface_encoder_decoder(tmp_path: Path) -> None:
    from transformers import T5Config, T5Model

    config = T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=64)
    T5Model(config).save_pretrained(tmp_path / "t5")
    assert "encoder and a decoder" in refusal(tmp_path / "t5", tmp_path)


def test_hub_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot be downloaded" in refusal("nobody/no-such-model", tmp_path)


def test_directory_of_nothing(tmp_path: Path) -> None:
    assert "not of a model" in refusal(tmp_path, tmp_path)


def keras_model() -> Any:
    import keras

    return keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])


def test_keras_lambda(tmp_path: Path) -> None:
    import keras

    mark = tmp_path / "exploded"
    x = keras.Input((4,))
    y = keras.layers.Lambda(lambda t, path=str(mark): t * (1 + 0 * len(path)), output_shape=(4,))(x)
    path = tmp_path / "lambda.keras"
    keras.Model(x, y).save(path)
    assert "--allow-pickle" in refusal(path, tmp_path)


def test_truncated_tflite(tmp_path: Path) -> None:
    (tmp_path / "cut.tflite").write_bytes(b"\x1c\x00\x00\x00TFL3" + bytes(40))
    refusal(tmp_path / "cut.tflite", tmp_path)


def test_tensorflow_control_flow(tmp_path: Path) -> None:
    import tensorflow as tf

    class Loop(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((4,), tf.float32)])
        def __call__(self, x: Any) -> Any:
            while tf.reduce_sum(x) < 100.0:
                x = x * 2.0
            return x

    tf.saved_model.save(Loop(), tmp_path / "loop")
    assert "Loop" in refusal(tmp_path / "loop", tmp_path)


def test_tensorflow_operator_without_translation(tmp_path: Path) -> None:
    import tensorflow as tf

    class Odd(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((4,), tf.float32)])
        def __call__(self, x: Any) -> Any:
            return tf.math.betainc(x, x, x)

    tf.saved_model.save(Odd(), tmp_path / "odd")
    assert "Betainc" in refusal(tmp_path / "odd", tmp_path)


@pytest.mark.parametrize(
    ("module", "extra"),
    [("torch", "torch"), ("transformers", "huggingface"), ("tensorflow", "tensorflow")],
)
def test_a_missing_extra_is_named(
    module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path
    if module == "torch":
        path = exported(tmp_path)
    elif module == "transformers":
        path = huggingface(tmp_path)
    else:
        path = tmp_path / "saved"
        path.mkdir()
        (path / "saved_model.pb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    assert install_command(extra) in refusal(path, tmp_path)
