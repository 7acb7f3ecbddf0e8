"""What a layer multiplies its weight by, as rows of ``K`` values; and its bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx

from sparse_tvm.frontends.onnx.detach import stored_tensors
from sparse_tvm.frontends.onnx.weights import WeightRef

_CHUNK = 1 << 24  # values of unfolded images at a time: 64 MiB


@dataclass(frozen=True)
class LayerInput:
    """Where a layer's input is found.

    Attributes
    ----------
    tensor : str
        Its name in the model.
    rows : Callable
        Turns an array of it into matrices ``[rows, K]``, the last axis as in the weight.
    bias : str | None
        The float32 ``[N]`` initializer that is added to what the layer gives, and to nothing else.
    """

    tensor: str
    rows: Callable[[np.ndarray], Iterator[np.ndarray]]
    bias: str | None


def find_inputs(
    model: onnx.ModelProto, refs: Sequence[WeightRef]
) -> tuple[dict[str, LayerInput], dict[str, str]]:
    """Return the inputs of layers, by layer, and why others have none to calibrate with."""
    nodes = {node.name or node.output[0]: node for node in model.graph.node}
    biases = _Biases(model)
    found: dict[str, LayerInput] = {}
    refused: dict[str, str] = {}
    for ref in refs:
        node = nodes[ref.nodes[0]]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if len(ref.nodes) > 1:
            refused[ref.layer] = f"{len(ref.nodes)} layers share it, each with inputs of its own"
        elif attributes.get("group", 1) != 1:
            refused[ref.layer] = f"a convolution in {attributes['group']} groups"
        else:
            left = _is_left(node, ref, model)
            bias = biases.of(node, ref.shape[0]) if not left else None
            rows = _rows(node, attributes, ref, left, model)
            found[ref.layer] = LayerInput(node.input[1 if left else 0], rows, bias)
    return found, refused


def _is_left(node: onnx.NodeProto, ref: WeightRef, model: onnx.ModelProto) -> bool:
    """Whether a MatMul has its weight on the left."""
    producers = {output: n for n in model.graph.node for output in n.output}
    name = node.input[0]
    while name != ref.initializer:
        before = producers.get(name)
        if before is None or before.op_type not in ("Identity", "Transpose"):
            return False
        name = before.input[0]
    return True


def _rows(
    node: onnx.NodeProto,
    attributes: Mapping[str, Any],
    ref: WeightRef,
    left: bool,
    model: onnx.ModelProto,
) -> Callable[[np.ndarray], Iterator[np.ndarray]]:
    if node.op_type == "Conv":
        dims = next(
            list(t.dims) for name, t in stored_tensors(model.graph) if name == ref.initializer
        )
        window = Window.of(attributes, dims[2:])
        return window.unfold
    transposed = left or bool(attributes.get("transA", 0))

    def rows(x: np.ndarray) -> Iterator[np.ndarray]:
        x = np.swapaxes(x, -1, -2) if transposed else x
        yield x.reshape(-1, x.shape[-1])

    return rows


@dataclass(frozen=True)
class Window:
    """The windows that a convolution sees; one entry per spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] | None
    auto: str

    @classmethod
    def of(cls, attributes: Mapping[str, Any], kernel: Sequence[int]) -> Window:
        """Read the attributes of an ONNX Conv."""
        rank = len(kernel)
        pads = attributes.get("pads") or [0] * (2 * rank)
        auto = attributes.get("auto_pad", b"NOTSET").decode()
        return cls(
            tuple(kernel),
            tuple(attributes.get("strides") or [1] * rank),
            tuple(attributes.get("dilations") or [1] * rank),
            None if auto.startswith("SAME") else tuple(zip(pads[:rank], pads[rank:], strict=True)),
            auto,
        )

    def unfold(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """Yield im2col matrices ``[positions, C * prod(kernel)]`` of ``[batch, C, *image]``."""
        rank = len(self.kernel)
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        pads = self.pads or [
            self._same(size, span, stride)
            for size, span, stride in zip(x.shape[2:], spans, self.strides, strict=True)
        ]
        padded = np.pad(x, ((0, 0), (0, 0), *pads))
        windows = np.lib.stride_tricks.sliding_window_view(
            padded, spans, axis=tuple(range(2, 2 + rank))
        )
        steps = tuple(slice(None, None, s) for s in self.strides)
        taps = tuple(slice(None, None, d) for d in self.dilations)
        windows = windows[(slice(None), slice(None), *steps, *taps)]
        # [batch, C, *positions, *kernel] to [batch, *positions, C, *kernel]
        windows = np.moveaxis(windows, 1, 1 + rank)
        values = prod(windows.shape[1:])
        images = max(1, _CHUNK // max(values, 1))
        width = x.shape[1] * prod(self.kernel)
        for start in range(0, len(windows), images):
            yield windows[start : start + images].reshape(-1, width)

    def _same(self, size: int, span: int, stride: int) -> tuple[int, int]:
        total = max((-(-size // stride) - 1) * stride + span - size, 0)
        small, large = total // 2, total - total // 2
        return (large, small) if self.auto == "SAME_LOWER" else (small, large)


class _Biases:
    """The biases of a model's layers."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._tensors = dict(stored_tensors(model.graph))
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._outputs = {value.name for value in model.graph.output}

    def of(self, node: onnx.NodeProto, features: int) -> str | None:
        """Return the bias of a layer: an input of its own, or of the Add behind it."""
        if node.op_type in ("Conv", "Gemm"):
            candidates = [node.input[2]] if len(node.input) > 2 else []
        else:
            users = self._users.get(node.output[0], [])
            behind = users[0] if len(users) == 1 and users[0].op_type == "Add" else None
            if behind is None or node.output[0] in self._outputs:
                return None
            candidates = [name for name in behind.input if name != node.output[0]]
        for name in candidates:
            tensor = self._tensors.get(name)
            if (
                tensor is not None
                and tensor.data_type == onnx.TensorProto.FLOAT
                and list(tensor.dims) == [features]
                and len(self._users[name]) == 1
            ):
                return str(name)
        return None
