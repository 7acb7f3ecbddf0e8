"""What rewriting asks of an ONNX node, in few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx


def inputs_of(node: onnx.NodeProto, count: int) -> list[str]:
    """Return the names of so many inputs, empty for those left out."""
    return [*node.input, *[""] * count][:count]


def tensor_and_scale(names: Sequence[str], start: int) -> tuple[str, str, str]:
    """Return an integer tensor, its scale and its zero point."""
    x, scale, zero_point = [*names, "", ""][start : start + 3]
    return x, scale, zero_point


def attribute_of(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return one attribute, or what counts where it is left out."""
    return attributes_of(node).get(name, default)


def attributes_of(node: onnx.NodeProto, *dropped: str) -> dict[str, Any]:
    """Return the attributes by name, but for those dropped."""
    return {
        a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name not in dropped
    }


def names_read_in(graph: onnx.GraphProto) -> set[str]:
    """Return all names that a graph inside of a node reads."""
    names = {value.name for value in graph.output}
    for node in graph.node:
        names |= set(node.input)
        for attribute in node.attribute:
            if attribute.type == attribute.GRAPH:
                names |= names_read_in(attribute.g)
    return names
