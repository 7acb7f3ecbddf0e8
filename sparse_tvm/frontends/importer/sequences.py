"""Sequences and optionals: while a graph is imported they are lists of its values' names.

Which elements there are is known then, and nothing of a sequence is left at run time: what loops
put into one is read out of it, or joined, by plain nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx
from onnx import helper

from sparse_tvm.frontends.importer.known import Known
from sparse_tvm.frontends.importer.sizes import Size

Elements: TypeAlias = tuple[str, ...] | None
"""The names of a sequence's elements; None is an optional without an element."""


class Graph(Protocol):
    """The function that is being built."""

    known: dict[str, Known]
    sequences: dict[str, Elements]

    def define(self, name: str, value: Known) -> None:
        """Give a value a name."""

    def alias(self, name: str, of: str) -> None:
        """Give a value another name."""

    def shape(self, name: str) -> list[Size]:
        """Return the sizes of a value of the graph."""

    def import_node(self, node: onnx.NodeProto) -> None:
        """Import a node."""


def apply(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    """Import an operator on sequences or optionals.

    Raises
    ------
    ValueError
        When which elements there are depends on data.
    """
    OPERATORS[node.op_type](node, attributes, graph)


def join(graph: Graph, names: Sequence[str], result: str, axis: int, *, new: bool) -> None:
    """Concatenate values along an axis, or stack them along a new one."""
    if new:
        axis %= len(graph.shape(names[0])) + 1
        names = [_reshaped(graph, "Unsqueeze", name, axis, result) for name in names]
    graph.import_node(helper.make_node("Concat", list(names), [result], name=result, axis=axis))


def _reshaped(graph: Graph, op: str, name: str, axis: int, result: str) -> str:
    """Add an axis of size 1 to a value, or drop one."""
    changed, axes = f"{result}.{name}", f"{result}.{op}.axes"
    graph.define(axes, Known.of(np.array([axis])))
    graph.import_node(helper.make_node(op, [name, axes], [changed], name=result))
    return changed


def _empty(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    graph.sequences[node.output[0]] = ()


def _construct(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    graph.sequences[node.output[0]] = tuple(node.input)


def _insert(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    elements, new = _elements(node, graph), node.input[1]
    at = _position(node, graph, 2, len(elements), last=len(elements), default=len(elements))
    graph.sequences[node.output[0]] = (*elements[:at], new, *elements[at:])


def _erase(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    elements = _elements(node, graph)
    count = len(elements)
    at = _position(node, graph, 1, count, last=count - 1, default=-1)
    graph.sequences[node.output[0]] = elements[:at] + elements[at + 1 :]


def _at(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    elements = _elements(node, graph)
    count = len(elements)
    graph.alias(node.output[0], elements[_position(node, graph, 1, count, last=count - 1)])


def _length(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    graph.define(node.output[0], Known.scalar(len(_elements(node, graph)), "int64"))


def _concat(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    elements = _elements(node, graph)
    if not elements:
        raise ValueError("the sequence is empty")
    new = bool(attributes.get("new_axis", 0))
    join(graph, elements, node.output[0], attributes["axis"], new=new)


def _split(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    """Split as the operator of that name does, and drop the axis where single rows shall lose it.

    How many parts there are must be known, how long they are need not.
    """
    whole, (part, *_) = node.input[0], node.output
    shape = graph.shape(whole)
    axis = attributes.get("axis", 0) % len(shape)
    given = node.input[1] if len(node.input) > 1 else ""
    lengths = _lengths(graph, given, shape[axis])
    names = [f"{part}.{index}" for index in range(len(lengths))]
    if len(names) == 1:
        graph.alias(names[0], whole)
    else:
        graph.define(f"{part}.split", Known.shape(lengths))
        graph.import_node(
            helper.make_node("Split", [whole, f"{part}.split"], names, name=part, axis=axis)
        )
    if not given and not attributes.get("keepdims", 1):
        names = [_reshaped(graph, "Squeeze", name, axis, part) for name in names]
    graph.sequences[part] = tuple(names)


def _lengths(graph: Graph, given: str, extent: Size) -> list[Size]:
    """How long the parts are: each as it is given, or all the same, but for the last."""
    known = graph.known.get(given) if given else Known.scalar(1, "int64")
    if known is None:
        raise ValueError("the lengths of its parts depend on data")
    if known.elements.ndim:
        return known.sizes()
    [each] = known.sizes()
    if not isinstance(each, int) or not isinstance(extent, int):
        raise ValueError("how many parts there are depends on sizes, which --input-shape fixes")
    return [min(each, extent - begin) for begin in range(0, extent, each)]


def _optional(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    if _is_given(node):
        graph.alias(node.output[0], node.input[0])
    else:
        graph.sequences[node.output[0]] = None


def _has_element(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    graph.define(node.output[0], Known.scalar(_is_given(node) and _is_full(node, graph), "bool"))


def _get_element(node: onnx.NodeProto, attributes: dict[str, Any], graph: Graph) -> None:
    if not _is_full(node, graph):
        raise ValueError("the optional has no element")
    graph.alias(node.output[0], node.input[0])


def _is_given(node: onnx.NodeProto) -> bool:
    return bool(node.input and node.input[0])


def _is_full(node: onnx.NodeProto, graph: Graph) -> bool:
    return graph.sequences.get(node.input[0], ()) is not None


def _elements(node: onnx.NodeProto, graph: Graph) -> tuple[str, ...]:
    elements = graph.sequences[node.input[0]]
    if elements is None:
        raise ValueError("the optional has no element")
    return elements


def _position(
    node: onnx.NodeProto,
    graph: Graph,
    place: int,
    count: int,
    *,
    last: int,
    default: int | None = None,
) -> int:
    """Return an input that is a place among `count` elements, from their end if negative."""
    if default is not None and not any(node.input[place:]):
        position = default
    else:
        known = graph.known.get(node.input[place])
        if known is None or not known.is_constant:
            raise ValueError("which element of the sequence it takes depends on data")
        position = int(known.constant().item())
    if not -count <= position <= last:
        raise ValueError(f"a sequence of {count} has no place {position}")
    return position + count if position < 0 else position


OPERATORS: dict[str, Callable[[onnx.NodeProto, dict[str, Any], Graph], None]] = {
    "ConcatFromSequence": _concat,
    "Optional": _optional,
    "OptionalGetElement": _get_element,
    "OptionalHasElement": _has_element,
    "SequenceAt": _at,
    "SequenceConstruct": _construct,
    "SequenceEmpty": _empty,
    "SequenceErase": _erase,
    "SequenceInsert": _insert,
    "SequenceLength": _length,
    "SplitToSequence": _split,
}
"""By ONNX's name."""
