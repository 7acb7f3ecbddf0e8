"""ResNet-50 and MobileNetV2 as ONNX models with random weights, for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET = 17
_RESNET50_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_MOBILENET_V2_STAGES = (
    # expansion, channels, blocks, stride
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def build_resnet50(*, image: int = 224, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """Return ResNet-50 for one image ``[1, 3, image, image]``, batch norms folded."""
    net = _Net(seed)
    value = net.conv("input", "conv1", 3, 64, 7, 2)
    value = net.node("MaxPool", [value], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for stage, (width, blocks, first_stride) in enumerate(_RESNET50_STAGES, 1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", first_stride if block == 0 else 1
            inner = net.conv(value, f"{name}.conv1", channels, width, 1)
            inner = net.conv(inner, f"{name}.conv2", width, width, 3, stride)
            inner = net.conv(inner, f"{name}.conv3", width, 4 * width, 1, activation=None)
            if block == 0:
                value = net.conv(
                    value, f"{name}.downsample", channels, 4 * width, 1, stride, activation=None
                )
            value = net.node("Relu", [net.node("Add", [inner, value])])
            channels = 4 * width
    return net.classifier(value, channels, classes, image, "resnet50")


def build_mobilenet_v2(*, image: int = 224, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """Return MobileNetV2 for one image ``[1, 3, image, image]``, batch norms folded."""
    net = _Net(seed)
    value = net.conv("input", "stem", 3, 32, 3, 2, activation="Clip")
    channels, number = 32, 0
    for expansion, out, blocks, first_stride in _MOBILENET_V2_STAGES:
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            hidden, name, inner = channels * expansion, f"block{number}", value
            if expansion > 1:
                inner = net.conv(value, f"{name}.expand", channels, hidden, 1, activation="Clip")
            inner = net.conv(
                inner, f"{name}.depthwise", hidden, hidden, 3, stride, hidden, activation="Clip"
            )
            inner = net.conv(inner, f"{name}.project", hidden, out, 1, activation=None)
            residual = stride == 1 and channels == out
            value = net.node("Add", [value, inner]) if residual else inner
            channels, number = out, number + 1
    value = net.conv(value, "head", channels, 1280, 1, activation="Clip")
    return net.classifier(value, 1280, classes, image, "mobilenet_v2")


class _Net:
    """Nodes and weights so far."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._tensors = [
            numpy_helper.from_array(np.array(0, np.float32), "zero"),
            numpy_helper.from_array(np.array(6, np.float32), "six"),
        ]

    def node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{op.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def tensor(self, name: str, *shape: int, fan_in: int) -> str:
        values = self._rng.standard_normal(shape, np.float32) * np.float32((2 / fan_in) ** 0.5)
        self._tensors.append(numpy_helper.from_array(values, name))
        return name

    def conv(
        self,
        x: str,
        name: str,
        channels: int,
        out: int,
        kernel: int,
        stride: int = 1,
        group: int = 1,
        activation: str | None = "Relu",
    ) -> str:
        fan_in = channels // group * kernel * kernel
        weight = self.tensor(
            f"{name}.weight", out, channels // group, kernel, kernel, fan_in=fan_in
        )
        bias = self.tensor(f"{name}.bias", out, fan_in=100)
        pads, strides = [kernel // 2] * 4, [stride, stride]
        y = self.node("Conv", [x, weight, bias], pads=pads, strides=strides, group=group)
        if activation is None:
            return y
        return self.node(activation, [y, "zero", "six"] if activation == "Clip" else [y])

    def classifier(
        self, x: str, channels: int, classes: int, image: int, name: str
    ) -> onnx.ModelProto:
        pooled = self.node("Flatten", [self.node("GlobalAveragePool", [x])])
        weight = self.tensor("classifier.weight", classes, channels, fan_in=channels)
        bias = self.tensor("classifier.bias", classes, fan_in=100)
        self._nodes.append(helper.make_node("Gemm", [pooled, weight, bias], ["logits"], transB=1))
        images, logits = (
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("input", [1, 3, image, image]), ("logits", [1, classes]))
        )
        graph = helper.make_graph(self._nodes, name, [images], [logits], self._tensors)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9
        )
