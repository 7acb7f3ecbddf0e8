"""GELU as TensorFlow writes it, spelled as ONNX does since opset 20.

tf2onnx knows neither TensorFlow Lite's GELU nor the complementary error function that
TensorFlow's consists of: ``0.5 * x * erfc(-x / sqrt(2))``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

_OPSET = 20
_ONE = "sparse_tvm_one"


def spell_gelu(model: onnx.ModelProto) -> None:
    """Replace ``TFL_GELU``, and ``Erfc`` in a GELU or elsewhere, in place."""
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    constants = {
        tensor.name: float(numpy_helper.to_array(tensor).reshape(-1)[0])
        for tensor in graph.initializer
        if int(np.prod(tensor.dims)) == 1
    }
    kept = []
    found = False
    for node in graph.node:
        if node.op_type == "TFL_GELU":
            tanh = any(a.name == "approximate" and a.i for a in node.attribute)
            kept.append(_gelu(node, node.input[0], "tanh" if tanh else "none"))
        elif (x := _gelu_input(node, producers, constants)) is not None:
            kept.append(_gelu(node, x, "none"))
        elif node.op_type == "Erfc":
            erf = f"{node.output[0]}_erf"
            kept.append(helper.make_node("Erf", node.input, [erf], f"{node.name}_erf"))
            kept.append(helper.make_node("Sub", [_ONE, erf], node.output, node.name))
        else:
            kept.append(node)
            continue
        found = True
    if not found:
        return
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), _ONE))
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, _OPSET)


def _gelu(node: onnx.NodeProto, x: str, approximate: str) -> onnx.NodeProto:
    return helper.make_node("Gelu", [x], node.output, node.name, approximate=approximate)


def _gelu_input(
    node: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    constants: Mapping[str, float],
) -> str | None:
    """Return x where a node computes ``(x * 0.5) * erfc(-x * sqrt(0.5))``, factors in any order."""
    for half, erfc in _factors(node):
        tail = producers.get(erfc)
        if tail is None or tail.op_type != "Erfc":
            continue
        scaled = _scaled(tail.input[0], producers, constants)
        halved = _scaled(half, producers, constants)
        if scaled is None or halved is None or not np.isclose(halved[1], 0.5):
            continue
        x, factor = scaled
        negated = producers.get(x)
        if negated is not None and negated.op_type == "Neg":
            x, factor = negated.input[0], -factor
        if x == halved[0] and np.isclose(factor, -(0.5**0.5)):
            return x
    return None


def _factors(node: onnx.NodeProto) -> list[tuple[str, str]]:
    if node.op_type != "Mul":
        return []
    left, right = node.input
    return [(left, right), (right, left)]


def _scaled(
    name: str, producers: Mapping[str, onnx.NodeProto], constants: Mapping[str, float]
) -> tuple[str, float] | None:
    """Return a value and the constant that it is multiplied by."""
    node = producers.get(name)
    if node is None:
        return None
    if node.op_type == "Neg":
        inner = _scaled(node.input[0], producers, constants)
        return None if inner is None else (inner[0], -inner[1])
    pairs = [(x, constants[c]) for c, x in _factors(node) if c in constants]
    return pairs[0] if pairs else None
