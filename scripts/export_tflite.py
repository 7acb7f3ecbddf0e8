"""Write ``NAME.tflite`` beside ``NAME.onnx``, for LiteRT to take part in ``bench_convnets.py``.

Classifiers of images only, in the operators that their exporters use: the same weights, images with
their channels last, and activations as the converter fuses them. Needs TensorFlow (the ``sources``
environment); outputs are compared with ONNX Runtime's. ``--quantised`` writes ``NAME-int8.tflite``,
too, which the converter rounds to bytes by random images, for ``bench_convnets.py --quantised``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import tensorflow as tf
import typer
from onnx import helper, numpy_helper

from sparse_tvm.reference import Reference

TOLERANCE = 1e-3


def translate(model: onnx.ModelProto) -> Callable[[Any], Any]:
    """A function of TensorFlow's from images ``[1, height, width, 3]`` to the model's output."""
    graph = model.graph
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def run(images: Any) -> Any:
        values: dict[str, Any] = {**known, graph.input[0].name: images}
        for node in graph.node:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            operands = [values.get(name) for name in node.input]
            values[node.output[0]] = operator(node.op_type, attributes, operands)
        return values[graph.output[0].name]

    return run


def operator(name: str, attributes: dict[str, Any], operands: Sequence[Any]) -> Any:
    """One node, its images with channels last."""
    x = operands[0]
    if name == "Conv":
        return convolution(attributes, *operands)
    if name == "MaxPool":
        x = tf.pad(x, spatial(attributes["pads"]), constant_values=float("-inf"))
        return tf.nn.max_pool2d(x, attributes["kernel_shape"], attributes["strides"], "VALID")
    if name == "Gemm":
        return tf.matmul(x, operands[1], transpose_b=bool(attributes["transB"])) + operands[2]
    if name == "Clip":
        if (float(operands[1]), float(operands[2])) != (0.0, 6.0):
            sys.exit("error: of Clip, only ReLU6 is translated")
        return tf.nn.relu6(x)
    simple: dict[str, Callable[..., Any]] = {
        "Add": tf.add,
        "Mul": tf.multiply,
        "Relu": tf.nn.relu,
        "Sigmoid": tf.sigmoid,
        "Identity": lambda value: value,
        "HardSwish": lambda value: value * tf.nn.relu6(value + 3.0) * (1 / 6),
        "HardSigmoid": lambda value: tf.nn.relu6(value + 3.0) * (1 / 6),
        "GlobalAveragePool": lambda value: tf.reduce_mean(value, (1, 2), keepdims=True),
        "Flatten": lambda value: tf.reshape(value, (1, -1)),  # of one pixel
    }
    if name not in simple:
        sys.exit(f"error: {name} is not translated")
    return simple[name](*operands)


def convolution(
    attributes: dict[str, Any], x: Any, weight: np.ndarray, bias: np.ndarray | None = None
) -> Any:
    """A convolution of one group, or depthwise."""
    groups, strides = attributes.get("group", 1), attributes.get("strides", [1, 1])
    pads = attributes.get("pads", [0] * 4)
    same = strides == [1, 1] and all(2 * pad + 1 == size for pad, size in kernel_pads(pads, weight))
    if not same and any(pads):
        x = tf.pad(x, spatial(pads))
    padding = "SAME" if same else "VALID"
    if groups == 1:
        y = tf.nn.conv2d(x, weight.transpose(2, 3, 1, 0), strides, padding)
    elif weight.shape[:2] == (groups, 1):
        y = tf.nn.depthwise_conv2d(x, weight.transpose(2, 3, 0, 1), [1, *strides, 1], padding)
    else:
        sys.exit("error: of grouped convolutions, only depthwise ones are translated")
    return y if bias is None else tf.nn.bias_add(y, bias)


def kernel_pads(pads: Sequence[int], weight: np.ndarray) -> list[tuple[int, int]]:
    """Each pad with the kernel's extent along it."""
    return list(zip(pads, [*weight.shape[2:], *weight.shape[2:]], strict=True))


def spatial(pads: Sequence[int]) -> list[list[int]]:
    """ONNX's pads, as TensorFlow takes them for channels last."""
    top, left, bottom, right = pads
    return [[0, 0], [top, bottom], [left, right], [0, 0]]


def in_bytes(converter: Any, shape: Sequence[int]) -> Any:
    """The converter, told to round weights and activations to bytes."""
    rng = np.random.default_rng(1)
    images = [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image] for image in images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return converter


def main(
    models: Annotated[list[Path], typer.Argument(help="NAME.onnx")],
    quantised: Annotated[bool, typer.Option(help="Write it in int8, too.")] = False,
) -> None:
    for path in models:
        model = onnx.load(path)
        function = translate(model)
        channels, *size = (d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:])
        signature = tf.TensorSpec((1, *size, channels), tf.float32)
        traced = tf.function(function).get_concrete_function(signature)
        converter = tf.lite.TFLiteConverter.from_concrete_functions([traced])
        path.with_suffix(".tflite").write_bytes(converter.convert())
        if quantised:
            rounded = in_bytes(converter, (1, *size, channels)).convert()
            path.with_name(f"{path.stem}-int8.tflite").write_bytes(rounded)
        x = np.random.default_rng(0).standard_normal((1, channels, *size)).astype(np.float32)
        (expected,) = Reference(path, threads=1).run({model.graph.input[0].name: x}).values()
        error = np.abs(traced(x.transpose(0, 2, 3, 1)).numpy() - expected).max()
        if error > TOLERANCE * max(1.0, np.abs(expected).max()):
            sys.exit(f"error: {path.name}: outputs differ by {error:.2g}")


if __name__ == "__main__":
    typer.run(main)
