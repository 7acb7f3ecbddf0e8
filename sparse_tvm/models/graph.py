"""Writing ONNX graphs by hand: what the model builders share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

Weights = dict[str, "NDArray[np.float32]"]
"""Arrays by Hugging Face's names."""


@dataclass
class Graph:
    """Nodes and initializers under construction; nodes are named by the scope they are in.

    Attributes
    ----------
    opset : int
        Version of the ONNX operator set.
    """

    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put the name before those of all nodes added inside."""
        self.path.append(name)
        yield
        self.path.pop()

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        return self.ops(kind, *inputs, outputs=1, names=output and [output], **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: str,
        outputs: int,
        names: Sequence[str] | str | None = None,
        **attributes: Any,
    ) -> list[str]:
        """Add a node with several outputs and return their names."""
        stem = "/".join(["", *self.path, kind])
        count = self.names[stem] = self.names.get(stem, -1) + 1
        name = f"{stem}_{count}" if count else stem
        results = list(names or [f"{name}_output_{i}" for i in range(outputs)])
        self.nodes.append(helper.make_node(kind, inputs, results, name=name, **attributes))
        return results

    def constant(self, value: float | int | Sequence[int]) -> str:
        """Add a constant, float32 or int64."""
        dtype = np.float32 if isinstance(value, float) else np.int64
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def initializer(self, name: str, array: NDArray[Any]) -> str:
        """Add an initializer, once."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def unsqueeze(self, x: str, axis: int) -> str:
        """Insert an axis of one element."""
        if self.opset < 13:
            return self.op("Unsqueeze", x, axes=[axis])
        return self.op("Unsqueeze", x, self.constant([axis]))

    def size(self, x: str, axis: int) -> str:
        """Scalar that holds the size of a tensor along an axis."""
        return self.op("Gather", self.op("Shape", x), self.constant(axis), axis=0)

    def shape(self, *dims: int | str) -> str:
        """Tensor of numbers and of sizes, which are names of one-element tensors."""
        if all(isinstance(dim, int) for dim in dims):
            return self.constant([int(dim) for dim in dims])
        parts = [self.constant([dim]) if isinstance(dim, int) else dim for dim in dims]
        return self.op("Concat", *parts, axis=0)

    def reshape(self, x: str, *dims: int | str) -> str:
        """Reshape to what :meth:`shape` makes of `dims`."""
        return self.op("Reshape", x, self.shape(*dims))

    def layer_norm(self, x: str, gain: str, shift: str, epsilon: float, output: str | None) -> str:
        """Add a LayerNormalization over the last axis."""
        return self.op(
            "LayerNormalization", x, gain, shift, output=output, axis=-1, epsilon=epsilon
        )

    def gelu_erf(self, x: str) -> str:
        """GELU by the error function."""
        erf = self.op("Erf", self.op("Div", x, self.constant(math.sqrt(2))))
        product = self.op("Mul", x, self.op("Add", erf, self.constant(1.0)))
        return self.op("Mul", product, self.constant(0.5))

    def gelu_tanh(self, x: str) -> str:
        """GELU by its approximation with tanh."""
        half = self.op("Mul", x, self.constant(0.5))
        cube = self.op("Pow", x, self.constant(3.0))
        inner = self.op("Add", x, self.op("Mul", cube, self.constant(0.044715)))
        tanh = self.op("Tanh", self.op("Mul", inner, self.constant(math.sqrt(2 / math.pi))))
        return self.op("Mul", half, self.op("Add", tanh, self.constant(1.0)))

    def model(
        self, name: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> onnx.ModelProto:
        """Finish the graph; inputs and outputs map names to ``(elem_type, shape)``."""
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(key, *value) for key, value in inputs.items()],
            [helper.make_tensor_value_info(key, *value) for key, value in outputs.items()],
            list(self.initializers.values()),
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="sparse-tvm",
        )


def draw_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Weights:
    """Draw weights from a normal distribution of deviation 0.02, layer norms' gains around 1."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        weights[name] = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        is_gain = len(shape) == 1 and name.endswith(".weight")
        if is_gain:
            weights[name] += 1
    return weights
