"""Build a Relax function from a simplified ONNX graph, whatever is symbolic in its shapes."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import onnx
from onnx import numpy_helper
from tvm import relax, tirx
from tvm.relax.frontend.onnx import onnx_frontend

from sparse_tvm.frontends.converters import CONVERTERS, Operation, materialise, shape_of
from sparse_tvm.frontends.detach import size_of
from sparse_tvm.frontends.shape_arithmetic import MAX_ELEMENTS, Known, evaluate
from sparse_tvm.frontends.sizes import Size, Sizes

SUPPORTED_OPS = frozenset(onnx_frontend._get_convert_map()) - {"Attention"}
"""What can be imported. TVM's Attention is ONNX Runtime's operator, not the standard's."""


class SameSize(Exception):
    """Raised where an operator demands that two symbolic dimensions are the same.

    Attributes
    ----------
    names : tuple[str, str]
        The two dimensions.
    """

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second} must be the same")
        self.names = (first, second)


class Importer(onnx_frontend.ONNXGraphImporter):  # type: ignore[misc]
    """TVM's importer, with shape arithmetic evaluated and some operators spelled plainer.

    Parameters
    ----------
    bounds : dict[str, tuple[int, int]]
        Smallest and largest values of symbolic dimensions; what the graph implies is added.
    """

    def __init__(self, bounds: dict[str, tuple[int, int]]) -> None:
        super().__init__({}, "float32", keep_params_in_input=False, sanitize=False)
        self.sizes = Sizes(bounds)
        self.known: dict[str, Known] = {}

    def tensor(self, name: str) -> relax.Expr:
        """Return a value of the graph as a tensor."""
        if name not in self._nodes:
            self._nodes[name] = self.bb.normalize(materialise(self.known[name]))
        return self._nodes[name]

    def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
        super()._parse_graph_initializers(graph)
        for tensor in graph.initializer:
            if size_of(tensor) <= MAX_ELEMENTS and tensor.data_type != onnx.TensorProto.STRING:
                self.known[tensor.name] = Known.of(numpy_helper.to_array(tensor))

    def _parse_graph_input(self, graph: onnx.GraphProto) -> None:
        super()._parse_graph_input(graph)
        for value in self._inputs.values():
            for size in shape_of(value):
                if isinstance(size, tirx.Var):
                    self.sizes.declare(size)

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        for node in graph.node:
            known = self._evaluate(node)
            if known is None:
                self._convert(node)
            else:
                self.known.update(zip(node.output, known, strict=False))
        for output in graph.output:
            self.tensor(output.name)

    def _evaluate(self, node: onnx.NodeProto) -> list[Known] | None:
        if node.op_type in ("Shape", "Size"):
            data = node.input[0]
            known = self.known.get(data)
            shape: list[Size] = list(known.elements.shape) if known else shape_of(self.tensor(data))
            if node.op_type == "Size":
                size = self.sizes.product(shape)
                return [Known(Known.shape([size]).elements.reshape(()), "int64")]
            attributes = self._parse_attr(node.attribute)
            return [Known.shape(shape[attributes.get("start", 0) : attributes.get("end")])]
        return evaluate(node, [self.known.get(name) for name in node.input], self.sizes)

    def _convert(self, node: onnx.NodeProto) -> None:
        op = _Operation(self, node)
        convert = CONVERTERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        value = convert(op) if convert else None
        if value is None:
            custom = {"name": node.name, "num_outputs": len(node.output)}
            attributes = {**op.attributes, "tvm_custom": custom}
            inputs = onnx_frontend.onnx_input(op.tensors())
            value = self._convert_operator(node.op_type, inputs, attributes, self.opset)
        value = self.bb.normalize(value)
        outputs = self._outputs(value)
        for name, output in zip(node.output, outputs, strict=False):
            _check_shape(output, op)
            self._nodes[name] = output

    def _outputs(self, value: relax.Expr) -> list[relax.Expr]:
        if isinstance(value, relax.Tuple):
            return [self.bb.normalize(field) for field in value.fields]
        if isinstance(value.ty, relax.TupleType):
            value = self.bb.emit(value)
            indices = range(len(value.ty.fields))
            return [self.bb.emit(relax.TupleGetItem(value, index)) for index in indices]
        return [value]


class _Operation(Operation):
    def __init__(self, importer: Importer, node: onnx.NodeProto) -> None:
        self._importer = importer
        self._names = list(node.input)
        self.attributes: dict[str, Any] = importer._parse_attr(node.attribute)
        self.sizes = importer.sizes

    def known(self, index: int) -> Known | None:
        return self._importer.known.get(self._name(index))

    def tensor(self, index: int) -> relax.Expr | None:
        name = self._name(index)
        return self._importer.tensor(name) if name else None

    def tensors(self) -> list[relax.Expr | None]:
        return [self.tensor(index) for index in range(len(self._names))]

    def normalize(self, value: relax.Expr) -> relax.Expr:
        return self._importer.bb.normalize(value)

    def _name(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else ""


def _check_shape(value: relax.Expr, op: Operation) -> None:
    """Demand a known shape; where two symbolic sizes did not match, ask for them to be one."""
    if isinstance(value.ty, relax.TensorType) and isinstance(value.ty.shape, relax.ShapeExpr):
        return
    shapes = [shape_of(tensor) for tensor in op.tensors() if tensor is not None]
    for first, second in combinations(shapes, 2):
        for one, other in zip(reversed(first), reversed(second), strict=False):
            are_symbols = isinstance(one, tirx.Var) and isinstance(other, tirx.Var)
            if are_symbols and one.name != other.name:
                raise SameSize(one.name, other.name)
    raise ValueError("the shape of its output depends on the values of tensors")
