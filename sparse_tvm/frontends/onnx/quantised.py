"""Quantised models in one spelling: operators of real numbers between rounding and its undoing.

There are many ways to write a quantised layer: with ``QuantizeLinear`` and ``DequantizeLinear``
around it, as one operator of integers (``QLinearConv``, ``MatMulInteger``), and ONNX Runtime's own.
All say the same: which real numbers the integers stand for. Here each becomes the operator of real
numbers, with its inputs dequantised and its output quantised. What is constant behind a
``DequantizeLinear`` becomes a float32 weight, whose zeros are found like those of any other. Only
``QuantizeLinear``, ``DequantizeLinear`` and ``DynamicQuantizeLinear`` are left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from sparse_tvm.errors import ModelError
from sparse_tvm.frontends.onnx.detach import readable_array, stored_tensors
from sparse_tvm.frontends.onnx.nodes import (
    attribute_of,
    attributes_of,
    inputs_of,
    names_read_in,
    tensor_and_scale,
)
from sparse_tvm.frontends.onnx.quantised_numbers import dequantise, quantise, wrong_scale

CONTRIB_DOMAIN = "com.microsoft"
"""ONNX Runtime's own operators; the onnx package does not know them, but models have them."""

QUANTISED = "sparse_tvm.quantised"
"""Key of the model's metadata that tells that it was spelled here."""

_DECORATED = re.compile(
    r"q_output_(.+)_\d+|(.+)_(?:quantized|quantised|quant|q|int8|uint8)"
    r"|(.+\.)parametrizations\.(\w+)\.original0"
)
"""What nncf, ONNX Runtime, torchao and others make of the names of weights."""

_MOVEMENT = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators through which a stored tensor may reach the one that dequantises it."""


def spell_quantised(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Return a quantised model in the one spelling, and any other as it is.

    A model in memory is never changed.

    Parameters
    ----------
    model : onnx.ModelProto
        Valid, without functions of its own.
    where : str
        What messages call it.

    Raises
    ------
    ModelError
        When a scale is not a positive number or a zero point does not fit; it names the layer.
    """
    if not any(_is_quantised(node) for node in model.graph.node):
        return model
    spelled = onnx.ModelProto()
    spelled.CopyFrom(model)
    mark_quantised(spelled)
    _Speller(spelled.graph, where).spell()
    return spelled


def mark_quantised(model: onnx.ModelProto) -> None:
    """Tell that a model computes with what it rounds, though none of its operators says so."""
    model.metadata_props.add(key=QUANTISED, value="yes")


def was_quantised(model: onnx.ModelProto) -> bool:
    """Whether `spell_quantised` changed the model, or it was marked."""
    return any(entry.key == QUANTISED for entry in model.metadata_props)


def _is_quantised(node: onnx.NodeProto) -> bool:
    return node.op_type in _SPELLINGS and node.domain in ("", "ai.onnx", CONTRIB_DOMAIN)


class _Speller:
    """Rebuilds the nodes of a graph."""

    def __init__(self, graph: onnx.GraphProto, where: str) -> None:
        self._graph, self._where = graph, where
        self._tensors = dict(stored_tensors(graph))
        self._given = list(graph.node)
        self._producers = {name: node for node in self._given for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self._given:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._outputs = {value.name for value in graph.output}
        self._names = {*self._tensors, *self._producers, *(value.name for value in graph.input)}
        self._folded: dict[tuple[Any, ...], str] = {}
        self._plain: dict[str, str] = {}
        self._scaled: dict[str, tuple[onnx.NodeProto, str, str]] = {}
        self._nodes: list[onnx.NodeProto] = []

    def spell(self) -> None:
        """Replace the graph's nodes."""
        skipped = self._find_scaled_integers()
        for node in self._given:
            if node.output and node.output[0] in skipped:
                continue
            if node.output and node.output[0] in self._scaled:
                integers, x_scale, w_scale = self._scaled[node.output[0]]
                self._product(integers, x_scale, w_scale, node.output[0])
            elif _is_quantised(node):
                _SPELLINGS[node.op_type](self, node)
            else:
                self._nodes.append(node)
        nodes = self._still_read(self._nodes)
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input} | self._outputs
        kept = [tensor for tensor in self._graph.initializer if tensor.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)
        self._rename(read | {name for node in nodes for name in node.output})

    def _still_read(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        read, kept = set(self._outputs), []
        for node in reversed(nodes):
            if read & set(node.output):
                kept.append(node)
                read |= set(node.input)
                read |= {n for a in node.attribute if a.type == a.GRAPH for n in names_read_in(a.g)}
        return kept[::-1]

    def _find_scaled_integers(self) -> set[str]:
        """Find products of integers that are converted and multiplied by their operands' scales.

        The scales then move into the operands. Returns the outputs of nodes that go.
        """
        skipped: set[str] = set()
        for node in self._given:
            if node.op_type not in ("MatMulInteger", "ConvInteger"):
                continue
            cast = self._only_reader(node.output[0], "Cast")
            scaling = self._only_reader(cast.output[0], "Mul") if cast is not None else None
            if cast is None or scaling is None or onnx.helper.get_node_attr_value(cast, "to") != 1:
                continue
            factor = next(name for name in scaling.input if name != cast.output[0])
            scales = self._scales_of(node, factor)
            if scales is not None:
                self._scaled[scaling.output[0]] = (node, *scales)
                skipped |= {node.output[0], cast.output[0]}
        return skipped

    def _only_reader(self, name: str, op: str) -> onnx.NodeProto | None:
        readers = self._readers.get(name, [])
        alone = len(readers) == 1 and name not in self._outputs and readers[0].op_type == op
        return readers[0] if alone else None

    def _scales_of(self, node: onnx.NodeProto, factor: str) -> tuple[str, str] | None:
        """Return the scales of a product's operands whose product is `factor`."""
        quantised = self._producers.get(node.input[0])
        product = self._producers.get(factor)
        if quantised is None or product is None or product.op_type != "Mul":
            return None
        known = quantised.output[1:2] if quantised.op_type == "DynamicQuantizeLinear" else ()
        for x_scale, w_scale in (tuple(product.input), tuple(product.input)[::-1]):
            if x_scale in known and self.constant(w_scale) is not None:
                return x_scale, w_scale
        return None

    def constant(self, name: str) -> np.ndarray | None:
        """Return what is stored, also where it is moved before it is read."""
        if name in self._tensors:
            return readable_array(self._tensors[name], self._where)
        node = self._producers.get(name)
        if node is None or node.op_type not in _MOVEMENT | {"QuantizeLinear"}:
            return None
        inputs = {n: self.constant(n) for n in node.input if n}
        if not all(isinstance(array, np.ndarray) for array in inputs.values()):
            return None
        if node.op_type == "QuantizeLinear":
            return self._quantised_constant(node)
        from onnx.reference import ReferenceEvaluator

        try:
            results: Any = ReferenceEvaluator(node).run(None, inputs)
        except Exception as error:  # whatever NumPy says of attributes that do not fit
            raise self._wrong(node, f"it does not fit {node.input[0]}: {error}") from error
        return np.asarray(results[0])

    def _quantised_constant(self, node: onnx.NodeProto) -> np.ndarray | None:
        names = tensor_and_scale(node.input, 0)
        self._check(node, names[1], names[2], None)
        x, scale, zero_point = (self.constant(name) if name else None for name in names)
        if zero_point is None:
            type_ = attribute_of(node, "output_dtype", 0) or TensorProto.UINT8
            zero_point = np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(type_))
        assert x is not None
        assert scale is not None
        axis, block = attribute_of(node, "axis", 1), attribute_of(node, "block_size", 0)
        try:
            return quantise(x, scale, zero_point, axis, block)
        except (IndexError, ValueError) as error:
            raise self._misfit(node, names[1], names[0], error) from error

    def emit(
        self,
        op: str,
        inputs: Iterable[str],
        like: onnx.NodeProto,
        output: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node, and return the name of its output."""
        output = output or self.fresh(f"{like.output[0]}.{op}")
        name = f"{like.name or like.output[0]}" if op in _LAYERS else output
        self._nodes.append(onnx.helper.make_node(op, list(inputs), [output], name, **attributes))
        return output

    def store(self, array: np.ndarray, name: str) -> str:
        """Add an initializer, and return its name."""
        name = self.fresh(name)
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        self._graph.initializer.append(tensor)
        self._tensors[name] = self._graph.initializer[-1]
        return name

    def _store_plainly(self, array: np.ndarray, integers: str) -> str:
        """Add a weight that is called as before it was quantised, if nothing else will be."""
        match = _DECORATED.fullmatch(integers)
        plain = integers if match is None else "".join(part or "" for part in match.groups())
        name = self.store(array, plain)
        self._plain[name] = plain
        return name

    def _rename(self, used: set[str]) -> None:
        """Give weights the plain names that are free now."""
        used |= {value.name for value in self._graph.input}
        chosen = {plain: name for name, plain in self._plain.items() if plain not in used}
        names = {name: plain for plain, name in chosen.items()}
        for tensor in self._graph.initializer:
            tensor.name = names.get(tensor.name, tensor.name)
        for node in self._graph.node:
            for position, name in enumerate(node.input):
                node.input[position] = names.get(name, name)

    def fresh(self, name: str) -> str:
        """Return a name that nothing has."""
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name

    def dequantised(
        self,
        node: onnx.NodeProto,
        x: str,
        scale: str,
        zero_point: str = "",
        axis: int = 1,
        block: int = 0,
        output: str = "",
    ) -> str:
        """Return the real numbers that integers stand for: a weight, where they are stored."""
        self._check(node, scale, zero_point, x)
        stored, factor = self.constant(x), self.constant(scale)
        shift = self.constant(zero_point) if zero_point else None
        if stored is None or factor is None or (zero_point and shift is None):
            axes = {"axis": axis} if axis != 1 else {}
            blocks = {"block_size": block} if block else {}
            given = [x, scale, zero_point] if zero_point else [x, scale]
            return self.emit("DequantizeLinear", given, node, output, **axes, **blocks)
        key = x, scale, zero_point, axis, block
        if key not in self._folded:
            try:
                values = dequantise(stored, factor, shift, axis, block)
            except (IndexError, ValueError) as error:
                raise self._misfit(node, scale, x, error) from error
            self._folded[key] = self._store_plainly(values, x)
        if output:
            self.emit("Identity", [self._folded[key]], node, output)
        return output or self._folded[key]

    def quantised(
        self, node: onnx.NodeProto, x: str, scale: str, zero_point: str, output: str
    ) -> None:
        """Round real numbers to the integers that stand for them."""
        self._check(node, scale, zero_point, None)
        given = [x, scale, zero_point] if zero_point else [x, scale]
        self.emit("QuantizeLinear", given, node, output)

    def _check(self, node: onnx.NodeProto, scale: str, zero_point: str, x: str | None) -> None:
        factor = self.constant(scale)
        if factor is not None and (found := wrong_scale(factor)) is not None:
            raise self._wrong(node, f"its scale {scale} is {found:g}, not a positive number")
        shift = self.constant(zero_point) if zero_point else None
        if shift is None:
            return
        if factor is not None and shift.size not in (1, factor.size):
            raise self._wrong(
                node,
                f"its zero point {zero_point} has {shift.size} values, and its scale {factor.size}",
            )
        stored = self._tensors.get(x or "")
        type_ = None if stored is None else onnx.helper.tensor_dtype_to_np_dtype(stored.data_type)
        if type_ is not None and shift.dtype != type_:
            raise self._wrong(
                node,
                f"its zero point {zero_point} is {shift.dtype}, out of the range of {x}, {type_}",
            )
        if shift.dtype == np.int32 and shift.any():
            raise self._wrong(node, f"its zero point {zero_point} must be 0, as it is of int32")

    def _wrong(self, node: onnx.NodeProto, what: str) -> ModelError:
        layer = node.name or node.output[0]
        return ModelError(" ".join(f"{self._where}: {layer} ({node.op_type}): {what}".split()))

    def _misfit(self, node: onnx.NodeProto, scale: str, x: str, why: Exception) -> ModelError:
        return self._wrong(node, f"its scale {scale} does not fit {x}: {why}")

    def product_of_scales(self, node: onnx.NodeProto, *names: str) -> str:
        """Return the scale of products of integers with these scales."""
        arrays = [self.constant(name) for name in names]
        known = [array for array in arrays if array is not None]
        if len(known) < len(arrays):
            return self.emit("Mul", names, node)
        product = np.asarray(np.prod(np.broadcast_arrays(*known), axis=0), np.float32)
        return self.store(product, f"{node.output[0]}.scale")

    def _product(self, node: onnx.NodeProto, x_scale: str, w_scale: str, output: str) -> None:
        """Spell ``MatMulInteger`` or ``ConvInteger`` with its operands' scales."""
        x, w, x_zero, w_zero = inputs_of(node, 4)
        matmul = node.op_type == "MatMulInteger"
        left = self.dequantised(node, x, x_scale, x_zero, -2 if matmul else 1)
        right = self.dequantised(node, w, w_scale, w_zero, -1 if matmul else 0)
        op = node.op_type.removesuffix("Integer")
        self.emit(op, [left, right], node, output, **attributes_of(node))

    def integers(self, node: onnx.NodeProto) -> None:
        """Spell a product of integers whose scales are unknown: they count as 1."""
        one = self.store(np.ones((), np.float32), f"{node.output[0]}.one")
        product = self.fresh(f"{node.output[0]}.product")
        self._product(node, one, one, product)
        self.emit("Cast", [product], node, node.output[0], to=TensorProto.INT32)


_LAYERS = {"Conv", "Gemm", "MatMul"}
"""Operators that keep the name of the node that they spell."""

_Spelling = Callable[[_Speller, onnx.NodeProto], None]


def _dequantize_linear(speller: _Speller, node: onnx.NodeProto) -> None:
    x, scale, zero_point = inputs_of(node, 3)
    axis, block = attribute_of(node, "axis", 1), attribute_of(node, "block_size", 0)
    speller.dequantised(node, x, scale, zero_point, axis, block, node.output[0])


def _quantize_linear(speller: _Speller, node: onnx.NodeProto) -> None:
    x, scale, zero_point = inputs_of(node, 3)
    speller._check(node, scale, zero_point, None)
    given = [x, scale, zero_point] if zero_point else [x, scale]
    speller.emit("QuantizeLinear", given, node, node.output[0], **attributes_of(node))


def _dynamic_quantize_linear(speller: _Speller, node: onnx.NodeProto) -> None:
    speller._nodes.append(node)


def _convolution(speller: _Speller, node: onnx.NodeProto) -> None:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias = inputs_of(node, 9)
    inputs = [
        speller.dequantised(node, x, x_scale, x_zero),
        speller.dequantised(node, w, w_scale, w_zero, 0),
    ]
    if bias:
        scale = speller.product_of_scales(node, x_scale, w_scale)
        inputs.append(speller.dequantised(node, bias, scale, axis=0))
    y = speller.emit("Conv", inputs, node, **attributes_of(node, "channels_last"))
    speller.quantised(node, y, y_scale, y_zero, node.output[0])


def _matmul(speller: _Speller, node: onnx.NodeProto) -> None:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = inputs_of(node, 8)
    left = speller.dequantised(node, a, a_scale, a_zero, -2)
    right = speller.dequantised(node, b, b_scale, b_zero, -1)
    y = speller.emit("MatMul", [left, right], node)
    speller.quantised(node, y, y_scale, y_zero, node.output[0])


def _gemm(speller: _Speller, node: onnx.NodeProto) -> None:
    a, a_scale, a_zero, b, b_scale, b_zero, c, y_scale, y_zero = inputs_of(node, 9)
    axis = 0 if attribute_of(node, "transB", 0) else 1
    inputs = [
        speller.dequantised(node, a, a_scale, a_zero),
        speller.dequantised(node, b, b_scale, b_zero, axis),
    ]
    alpha = attribute_of(node, "alpha", 1.0)
    if c:
        factor = speller.store(np.asarray(alpha, np.float32), f"{node.output[0]}.alpha")
        scale = speller.product_of_scales(node, a_scale, b_scale, factor)
        inputs.append(speller.dequantised(node, c, scale, axis=-1))
    y = speller.emit("Gemm", inputs, node, "" if y_scale else node.output[0], **attributes_of(node))
    if y_scale:
        speller.quantised(node, y, y_scale, y_zero, node.output[0])


def _matmul_to_float(speller: _Speller, node: onnx.NodeProto) -> None:
    a, b, a_scale, b_scale, a_zero, b_zero, bias = inputs_of(node, 7)
    left = speller.dequantised(node, a, a_scale, a_zero, -2)
    _plus(speller, node, left, speller.dequantised(node, b, b_scale, b_zero, -1), bias)


def _dynamic_matmul(speller: _Speller, node: onnx.NodeProto) -> None:
    a, b, b_scale, b_zero, bias = inputs_of(node, 5)
    x, scale, zero = (speller.fresh(f"{node.output[0]}.{part}") for part in ("x", "scale", "zero"))
    name = f"{node.name or node.output[0]}.DynamicQuantizeLinear"
    quantise_node = onnx.helper.make_node("DynamicQuantizeLinear", [a], [x, scale, zero], name)
    speller._nodes.append(quantise_node)
    left = speller.dequantised(node, x, scale, zero)
    _plus(speller, node, left, speller.dequantised(node, b, b_scale, b_zero, -1), bias)


def _plus(speller: _Speller, node: onnx.NodeProto, left: str, right: str, bias: str) -> None:
    """Spell a product, and a bias behind it where there is one."""
    product = speller.emit("MatMul", [left, right], node, "" if bias else node.output[0])
    if bias:
        speller.emit("Add", [product, bias], node, node.output[0])


def _unary(op: str) -> _Spelling:
    """Spell an operator of x, its scale and zero point, and those of its output."""

    def spell(speller: _Speller, node: onnx.NodeProto) -> None:
        x, x_scale, x_zero, y_scale, y_zero = inputs_of(node, 5)
        if attribute_of(node, "channels_last", 0):
            raise speller._wrong(node, "its channels are last, which is not supported")
        real = speller.dequantised(node, x, x_scale, x_zero)
        y = speller.emit(op, [real], node, **attributes_of(node, "channels_last", "opset"))
        speller.quantised(node, y, y_scale, y_zero, node.output[0])

    return spell


def _binary(op: str) -> _Spelling:
    """Spell an operator of two quantised inputs."""

    def spell(speller: _Speller, node: onnx.NodeProto) -> None:
        names = inputs_of(node, 8)
        real = [speller.dequantised(node, *tensor_and_scale(names, start)) for start in (0, 3)]
        y = speller.emit(op, real, node)
        speller.quantised(node, y, names[6], names[7], node.output[0])

    return spell


def _concat(speller: _Speller, node: onnx.NodeProto) -> None:
    y_scale, y_zero, *names = node.input
    starts = range(0, len(names), 3)
    real = [speller.dequantised(node, *tensor_and_scale(names, start)) for start in starts]
    y = speller.emit("Concat", real, node, **attributes_of(node))
    speller.quantised(node, y, y_scale, y_zero, node.output[0])


def _where(speller: _Speller, node: onnx.NodeProto) -> None:
    condition, *names = inputs_of(node, 9)
    real = [speller.dequantised(node, *tensor_and_scale(names, start)) for start in (0, 3)]
    y = speller.emit("Where", [condition, *real], node)
    speller.quantised(node, y, names[6], names[7], node.output[0])


_SPELLINGS: dict[str, _Spelling] = {
    "ConvInteger": _Speller.integers,
    "DequantizeLinear": _dequantize_linear,
    "DynamicQuantizeLinear": _dynamic_quantize_linear,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "MatMulInteger": _Speller.integers,
    "MatMulIntegerToFloat": _matmul_to_float,
    "QGemm": _gemm,
    "QLinearAdd": _binary("Add"),
    "QLinearAveragePool": _unary("AveragePool"),
    "QLinearConcat": _concat,
    "QLinearConv": _convolution,
    "QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "QLinearLeakyRelu": _unary("LeakyRelu"),
    "QLinearMatMul": _matmul,
    "QLinearMul": _binary("Mul"),
    "QLinearReduceMean": _unary("ReduceMean"),
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearSoftmax": _unary("Softmax"),
    "QLinearWhere": _where,
    "QuantizeLinear": _quantize_linear,
}
"""By operator, of the standard or of ONNX Runtime."""

QUANTISED_OPS = frozenset(_SPELLINGS)
"""What is spelled here."""
