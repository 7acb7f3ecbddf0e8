"""Count in integers what exporters count in floats.

Detectors number the columns of an image by ``Range(0.0, Cast(width), 1.0)``. A size that was cast
to a float is a number of the run time to the importer; the length of what it counts would be, too.
So the range is made of integers and cast, which gives the same floats, as sizes are far below 2^24.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_tvm.frontends.onnx.nodes import attribute_of

_FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)


def count_in_integers(graph: onnx.GraphProto) -> None:
    """Replace ranges of floats from an integer to a cast int64 in steps of one, in place."""
    makers = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    integers = {
        value.name
        for value in [*graph.value_info, *graph.input]
        if value.type.tensor_type.elem_type == TensorProto.INT64
    }
    nodes = []
    for node in graph.node:
        cast = makers.get(node.input[1]) if node.op_type == "Range" else None
        if cast is None or cast.op_type != "Cast" or _type(cast) not in _FLOATS:
            nodes.append(node)
            continue
        start, step = (_number(stored, node.input[i]) for i in (0, 2))
        if step != 1 or start is None or start % 1 or cast.input[0] not in integers:
            nodes.append(node)
            continue
        [result] = node.output
        for name, number in ((f"{result}.start", start), (f"{result}.step", step)):
            graph.initializer.append(numpy_helper.from_array(np.array(number, np.int64), name))
        counted = [f"{result}.start", cast.input[0], f"{result}.step"]
        nodes += [
            helper.make_node("Range", counted, [f"{result}.integers"], node.name),
            helper.make_node("Cast", [f"{result}.integers"], [result], to=_type(cast)),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def _type(cast: onnx.NodeProto) -> int:
    return int(attribute_of(cast, "to", 0))


def _number(stored: Mapping[str, onnx.TensorProto], name: str) -> float | None:
    """The constant of one element of that name."""
    if name not in stored:
        return None
    values = numpy_helper.to_array(stored[name])
    return float(values.item()) if values.size == 1 else None
