"""Build a Relax function from a simplified ONNX graph, whatever is symbolic in its shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import onnx
from onnx import numpy_helper
from tvm import relax, tirx
from tvm.relax.frontend.onnx import onnx_frontend

from sparse_tvm.frontends.importer import index_expressions as grids
from sparse_tvm.frontends.importer import index_rules as grid_rules
from sparse_tvm.frontends.importer.converters import (
    CONVERTERS,
    ELEMENTWISE,
    Operation,
    broadcast,
    materialise,
    shape_of,
)
from sparse_tvm.frontends.importer.shape_arithmetic import MAX_ELEMENTS, Known, evaluate
from sparse_tvm.frontends.importer.sizes import Size, Sizes
from sparse_tvm.frontends.onnx.detach import size_of

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
        self.grids: dict[str, grids.Value] = {}

    def tensor(self, name: str) -> relax.Expr:
        """Return a value of the graph as a tensor."""
        if name not in self._nodes:
            if name in self.known:
                value = materialise(self.known[name])
            else:
                value = grids.materialise(self.grids[name], self.sizes)
            self._nodes[name] = self.bb.normalize(value)
        return self._nodes[name]

    def shape(self, name: str) -> list[Size]:
        """Return the sizes of a value of the graph."""
        grid = self.grids.get(name)
        if name in self.known:
            return list(self.known[name].elements.shape)
        return list(grid.shape) if isinstance(grid, grids.Grid) else shape_of(self.tensor(name))

    def dtype(self, name: str) -> str:
        """Return the element type of a value of the graph."""
        grid = self.grids.get(name)
        if name in self.known:
            return self.known[name].dtype
        return grid.dtype if isinstance(grid, grids.Grid) else str(self.tensor(name).ty.dtype)

    def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
        super()._parse_graph_initializers(graph)
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.STRING:
                continue
            array = numpy_helper.to_array(tensor)
            if size_of(tensor) <= MAX_ELEMENTS:
                self.known[tensor.name] = Known.of(array)
            grid = grids.from_table(array)
            if grid is not None:
                self.grids[tensor.name] = grid

    def _parse_graph_input(self, graph: onnx.GraphProto) -> None:
        super()._parse_graph_input(graph)
        for value in self._inputs.values():
            for size in shape_of(value):
                if isinstance(size, tirx.Var):
                    self.sizes.declare(size)

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        for node in graph.node:
            known = self._evaluate(node)
            if known is not None:
                self.known.update(zip(node.output, known, strict=False))
                continue
            grid = self._grid(node)
            if grid is not None:
                self.grids[node.output[0]] = grid
            else:
                self._convert(node)
        for output in graph.output:
            self.tensor(output.name)

    def _evaluate(self, node: onnx.NodeProto) -> list[Known] | None:
        if node.op_type in ("Shape", "Size"):
            shape = self.shape(node.input[0])
            if node.op_type == "Size":
                size = self.sizes.product(shape)
                return [Known(Known.shape([size]).elements.reshape(()), "int64")]
            attributes = self._parse_attr(node.attribute)
            return [Known.shape(shape[attributes.get("start", 0) : attributes.get("end")])]
        return evaluate(node, [self.known.get(name) for name in node.input], self.sizes)

    def _grid(self, node: onnx.NodeProto) -> grids.Value | None:
        table = self.grids.get(node.input[0]) if node.op_type == "GatherElements" else None
        if isinstance(table, grids.Grid) and table.uniform is not None:
            return replace(table, shape=tuple(shape_of(self.tensor(node.input[1]))))
        attributes = self._parse_attr(node.attribute)
        return grid_rules.evaluate(node, attributes, self.known, self.grids, self.sizes)

    def _convert(self, node: onnx.NodeProto) -> None:
        op = _Operation(self, node)
        convert = CONVERTERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        value = convert(op) if convert else None
        if value is None:
            custom = {"name": node.name, "num_outputs": len(node.output)}
            attributes = {**op.attributes, "tvm_custom": custom}
            inputs = onnx_frontend.onnx_input(op.tensors())
            value = self._convert_operator(node.op_type, inputs, attributes, self.opset)
        outputs = self._outputs(self.bb.normalize(value))
        for name, output in zip(node.output, outputs, strict=False):
            _check_shape(output, op)
            if node.op_type in ELEMENTWISE:
                output = self.bb.normalize(broadcast(op, output, op.broadcast_shape()))
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
        self._is_elementwise = node.op_type in ELEMENTWISE
        self.attributes: dict[str, Any] = importer._parse_attr(node.attribute)
        self.sizes = importer.sizes

    def known(self, index: int) -> Known | None:
        return self._importer.known.get(self._name(index))

    def grid(self, index: int) -> grids.Grid | None:
        value = self._importer.grids.get(self._name(index))
        known = self.known(index)
        if value is None and known is not None:
            value = grids.from_known(known)
        return value if isinstance(value, grids.Grid) else None

    def coordinates(self, index: int) -> Sequence[grids.Grid]:
        value = self._importer.grids.get(self._name(index))
        return value.parts if isinstance(value, grids.Stack) else ()

    def tensor(self, index: int) -> relax.Expr | None:
        name = self._name(index)
        if not name:
            return None
        value = self._importer.tensor(name)
        if self._is_elementwise:
            value = self.before(value, "broadcast_to")
        return value

    def broadcast_shape(self) -> tuple[Size, ...]:
        """Return the shape of an elementwise operator's result."""
        shapes = [shape_of(self._importer.tensor(name)) for name in self._names if name]
        return grid_rules.broadcast_shape(shapes, self.sizes)

    def tensors(self) -> list[relax.Expr | None]:
        return [self.tensor(index) for index in range(len(self._names))]

    def normalize(self, value: relax.Expr) -> relax.Expr:
        return self._importer.bb.normalize(value)

    def definition(self, value: relax.Expr) -> relax.Expr:
        bound = self._importer.bb.lookup_binding(value) if isinstance(value, relax.Var) else None
        return value if bound is None else bound

    def _name(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else ""


def _check_shape(value: relax.Expr, op: Operation) -> None:
    """Demand a known shape; where two symbolic sizes did not match, ask for them to be one."""
    if isinstance(value.ty, relax.TensorType) and isinstance(value.ty.shape, relax.ShapeExpr):
        return
    shapes = [shape_of(tensor) for tensor in op.tensors() if tensor is not None]
    for first, second in combinations(shapes, 2):
        for one, other in zip(reversed(first), reversed(second), strict=False):
            symbols = [size.name for size in (one, other) if isinstance(size, tirx.Var)]
            if len(set(symbols)) == 2:
                raise SameSize(*symbols)
    raise ValueError("the shape of its output depends on the values of tensors")
