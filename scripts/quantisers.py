"""Compile a BERT and a ResNet as each quantiser leaves them, and compare with their framework.

python scripts/quantisers.py [--only REGEX]

Prints a Markdown table: the least cosine of any output's row with what the model's own framework
computes of the same inputs, and how many of the layers compute in int8. The models are a BERT of
two layers with BERT-base's widths and a ResNet of eight blocks, with random weights, calibrated on
random data. The environment is that of scripts/test_sources.sh.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3")

SEQUENCE, VOCABULARY, SIZE, CLASSES = 16, 1000, 64, 10
SAMPLES = 8
MODELS = ("bert", "resnet")

Arrays = dict[str, np.ndarray]
Result = dict[str, Any]


def inputs(model: str, seed: int) -> Arrays:
    """Return inputs of a model, the same for the same seed."""
    rng = np.random.default_rng(seed)
    if model == "resnet":
        return {"pixel_values": rng.standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)}
    ids = rng.integers(0, VOCABULARY, (1, SEQUENCE))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@cache
def floats(model: str) -> Any:
    """Return the float32 model of transformers."""
    import torch
    import transformers

    torch.manual_seed(0)
    if model == "bert":
        config = transformers.BertConfig(
            num_hidden_layers=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            initializer_range=0.05,
            type_vocab_size=1,
            architectures=["BertModel"],
            attn_implementation="eager",
        )
        return transformers.BertModel(config).eval()
    config = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=CLASSES,
        architectures=["ResNetForImageClassification"],
    )
    net = transformers.ResNetForImageClassification(config)
    with torch.no_grad():  # batch norms that have seen data
        for seed in range(20):
            net(torch.from_numpy(inputs("resnet", 1000 + seed)["pixel_values"]).repeat(4, 1, 1, 1))
    return net.eval()


def module(model: str) -> tuple[Any, tuple[Any, ...]]:
    """Return a copy that returns a dictionary of tensors, and an example of its inputs."""
    import torch

    class Plain(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(floats(model))

        def forward(self, *args: Any) -> Any:
            return self.model(*args, return_dict=False)

    return Plain().eval(), tensors(inputs(model, 0))


def tensors(arrays: Arrays) -> tuple[Any, ...]:
    """Return arrays as PyTorch's tensors."""
    import torch

    return tuple(torch.from_numpy(array) for array in arrays.values())


def as_onnx(model: str, folder: Path) -> Path:
    """Export the float32 model to ONNX."""
    import torch

    path = folder / "float32.onnx"
    plain, example = module(model)
    with torch.no_grad():
        torch.onnx.export(
            plain,
            example,
            path,
            dynamo=True,
            input_names=list(inputs(model, 0)),
            verbose=False,
            external_data=False,
        )
    return path


def ort_dynamic(model: str, folder: Path) -> Any:
    """Quantise by ONNX Runtime, activations at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "quantised.onnx"
    weights = QuantType.QInt8 if model == "bert" else QuantType.QUInt8  # ConvInteger has no s8
    quantize_dynamic(as_onnx(model, folder), path, weight_type=weights)
    return path


def ort_static(form: str, activations: str, per_channel: bool, model: str, folder: Path) -> Any:
    """Quantise by ONNX Runtime, activations by calibration."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter([inputs(model, seed) for seed in range(SAMPLES)])

        def get_next(self) -> Arrays | None:
            return next(self._left, None)

    plain, path = folder / "prepared.onnx", folder / "quantised.onnx"
    quant_pre_process(as_onnx(model, folder), plain, skip_symbolic_shape=True)
    quantize_static(
        plain,
        path,
        Samples(),
        quant_format=QuantFormat[form],
        per_channel=per_channel,
        activation_type=QuantType[activations],
        weight_type=QuantType.QInt8,
        # Of BERT's other operators it makes, in this form, a file that ONNX Runtime cannot load.
        op_types_to_quantize=["MatMul", "Gemm"] if (form, model) == ("QOperator", "bert") else None,
    )
    return path


def nncf_onnx(model: str, folder: Path) -> Any:
    """Quantise the ONNX file by nncf."""
    import nncf
    import onnx

    path = folder / "quantised.onnx"
    samples = nncf.Dataset([inputs(model, seed) for seed in range(SAMPLES)])
    plain = onnx.load(as_onnx(model, folder))
    kind = nncf.ModelType.TRANSFORMER if model == "bert" else None
    onnx.save(nncf.quantize(plain, samples, subset_size=SAMPLES, model_type=kind), path)
    return path


def nncf_torch(model: str, folder: Path) -> Any:
    """Quantise the PyTorch module by nncf."""
    import nncf
    import torch

    plain, example = module(model)
    samples = nncf.Dataset([tensors(inputs(model, seed)) for seed in range(SAMPLES)], lambda x: x)
    kind = nncf.ModelType.TRANSFORMER if model == "bert" else None
    with torch.no_grad():
        program = torch.export.export(plain, example).module()
        quantised = nncf.quantize(program, samples, subset_size=SAMPLES, model_type=kind)
    return quantised, example


def torchao(config: str, model: str, folder: Path) -> Any:
    """Quantise the PyTorch module's linear layers by torchao."""
    import torchao.quantization as quantization

    plain, example = module(model)
    quantization.quantize_(plain, getattr(quantization, config)())
    return plain, example


def pt2e(dynamic: bool, model: str, folder: Path) -> Any:
    """Quantise the exported program by PyTorch 2's way, as for x86."""
    import torch
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    plain, example = module(model)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(plain, example).module(), quantizer)
        for seed in range(SAMPLES):
            prepared(*tensors(inputs(model, seed)))
        converted = move_exported_model_to_eval(convert_pt2e(prepared))
        path = folder / "quantised.pt2"
        torch.export.save(torch.export.export(converted, example), path)
    return path


def compressed_tensors(dynamic: bool, model: str, folder: Path) -> Any:
    """Write a checkpoint of W8A8 by compressed-tensors' own code, as llm-compressor does."""
    import torch
    from compressed_tensors import quantization as scheme_of
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    net, directory = copy.deepcopy(floats(model)), folder / "quantised"
    layers = {n: m for n, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    ranges: dict[str, list[Any]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        return lambda _, args: ranges[name].append(torch.aminmax(args[0]))

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for seed in range(SAMPLES):
            net(*tensors(inputs(model, seed)))
    for hook in hooks:
        hook.remove()
    weights = scheme_of.QuantizationArgs(num_bits=8, strategy="channel")
    kind = {"strategy": "token", "dynamic": True} if dynamic else {"strategy": "tensor"}
    rounding = scheme_of.QuantizationArgs(num_bits=8, **kind)
    scheme = scheme_of.QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=rounding
    )
    groups = {"group_0": scheme}
    config = scheme_of.QuantizationConfig(config_groups=groups, format="int-quantized")
    scheme_of.apply_quantization_config(net, config)
    with torch.no_grad():
        for name, layer in layers.items():
            w = layer.weight
            layer.weight_scale.copy_(
                calculate_qparams(w.amin(1, True), w.amax(1, True), weights)[0]
            )
            if not dynamic:
                low, high = (torch.stack(ends) for ends in zip(*ranges[name], strict=True))
                scale, _ = calculate_qparams(low.min()[None], high.max()[None], rounding)
                layer.input_scale.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(net)
    compressor.compress_model(net)
    net.save_pretrained(directory)
    compressor.update_config(str(directory))
    return directory


def tflite(model: str, folder: Path) -> Any:
    """Quantise a network of the same kind, built in Keras, by TensorFlow Lite."""
    import tensorflow as tf

    net = _keras_bert() if model == "bert" else _keras_resnet()
    rng = np.random.default_rng(0)
    shape = (1, *net.inputs[0].shape[1:])
    samples = [rng.standard_normal(shape).astype(np.float32) for _ in range(SAMPLES)]
    converter = tf.lite.TFLiteConverter.from_keras_model(net)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample] for sample in samples)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    path = folder / "quantised.tflite"
    with contextlib.redirect_stdout(sys.stderr):  # Keras tells what it saves on the way
        path.write_bytes(converter.convert())
    return path


def _keras_bert() -> Any:
    """Two layers of BERT-base's widths on embedded tokens."""
    import keras

    layers, width = keras.layers, 768
    keras.utils.set_random_seed(0)
    x = source = keras.Input((SEQUENCE, width), batch_size=1)
    for _ in range(2):
        heads = []
        for _ in ("query", "key", "value"):
            y = layers.Reshape((SEQUENCE, 12, 64))(layers.Dense(width)(x))
            heads.append(layers.Permute((2, 1, 3))(y))
        query, key, value = heads
        scores = keras.ops.matmul(query, keras.ops.transpose(key, (0, 1, 3, 2))) / 8.0
        mixed = keras.ops.matmul(keras.ops.softmax(scores), value)
        mixed = layers.Reshape((SEQUENCE, width))(layers.Permute((2, 1, 3))(mixed))
        x = layers.LayerNormalization()(x + layers.Dense(width)(mixed))
        y = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(x))
        x = layers.LayerNormalization()(x + y)
    return keras.Model(source, x)


def _keras_resnet() -> Any:
    """Eight basic blocks, as ResNet-18 has."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    source = keras.Input((SIZE, SIZE, 3), batch_size=1)
    x = layers.Conv2D(16, 7, strides=2, padding="same", activation="relu")(source)
    x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    for width in (16, 32, 64, 128):
        for block in range(2):
            stride = 2 if block == 0 and width > 16 else 1
            y = layers.Conv2D(width, 3, strides=stride, padding="same", activation="relu")(x)
            y = layers.Conv2D(width, 3, padding="same")(y)
            if stride == 2:
                x = layers.Conv2D(width, 1, strides=2)(x)
            x = layers.ReLU()(x + y)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(source, layers.Dense(CLASSES)(x))


def _ort() -> Iterator[tuple[str, Callable[[str, Path], Any]]]:
    yield "onnxruntime dynamic", ort_dynamic
    for form in ("QDQ", "QOperator"):
        for activations, short in (("QUInt8", "u8s8"), ("QInt8", "s8s8")):
            for per_channel in (False, True):
                per = "channel" if per_channel else "tensor"
                name = f"onnxruntime {form} {short} per {per}"
                yield name, partial(ort_static, form, activations, per_channel)


QUANTISERS: dict[str, Callable[[str, Path], Any]] = {
    **dict(_ort()),
    "nncf (ONNX)": nncf_onnx,
    "nncf (PyTorch)": nncf_torch,
    "torchao dynamic": partial(torchao, "Int8DynamicActivationInt8WeightConfig"),
    "torchao weights only": partial(torchao, "Int8WeightOnlyConfig"),
    "pt2e static": partial(pt2e, False),
    "pt2e dynamic": partial(pt2e, True),
    "compressed-tensors dynamic": partial(compressed_tensors, True),
    "compressed-tensors static": partial(compressed_tensors, False),
    "TensorFlow Lite": tflite,
}


def outcome(quantiser: str, model: str, folder: Path) -> Result:
    """Quantise, compile and compare: the least cosine and the layers' precisions."""
    import sparse_tvm

    source = QUANTISERS[quantiser](model, folder)
    options: dict[str, Any] = {}
    if isinstance(source, tuple):
        source, options["example_inputs"] = source
    manifest = sparse_tvm.compile(source, folder / "model.so", min_cosine=0.0, **options).manifest
    found = manifest["verification"]
    similar = found.get("similarity") or {"": {"cosine": 1.0}}  # else compared as float32 is
    return {
        "cosine": min(values["cosine"] for values in similar.values()),
        "reference": manifest["verification"]["reference"],
        "precisions": [layer["precision"] for layer in manifest["layers"]],
        "notes": manifest["notes"],
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="those whose name, 'QUANTISER MODEL', matches")
    parser.add_argument("--details", action="store_true")
    options = parser.parse_args()
    print("| quantiser | model | cosine | layers in int8 |\n|---|---|---:|---:|")
    for quantiser in QUANTISERS:
        for model in MODELS:
            if not re.search(options.only, f"{quantiser} {model}"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found = outcome(quantiser, model, Path(folder))
            precisions = found["precisions"]
            count = f"{precisions.count('int8')} of {len(precisions)}"
            print(f"| {quantiser} | {model} | {found['cosine']:.5f} | {count} |", flush=True)
            if options.details:
                print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
