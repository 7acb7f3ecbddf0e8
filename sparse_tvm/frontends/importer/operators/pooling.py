"""The largest of windows, with where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import te, tirx

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.sizes import Size, as_expr
from sparse_tvm.frontends.importer.tensors import Tensor
from sparse_tvm.frontends.importer.windows import Windows, with_pads


@rule("AveragePool", "LpPool")
def _pool(node: Node) -> None:
    """TVM's, which pads images of symbolic size by numbers only."""
    if node.form is not Tensor:
        raise NotInForm
    node.attributes = with_pads(node, node.attributes["kernel_shape"])


@rule("MaxPool")
def _max_pool(node: Node) -> Any:
    """With indices into the whole tensor, of the first of equal elements; else TVM's."""
    _pool(node)
    if not node.wants(1):
        return None
    if node.attributes.get("ceil_mode", 0):
        raise ValueError("it has indices, and rounds its size up")
    windows = Windows.of(node, node.attributes["kernel_shape"])
    backwards = bool(node.attributes.get("storage_order", 0))
    nest = _largest_with_index(windows, windows.counts(node, node.shape(0)[2:]), backwards)
    values = node.compute(nest, node.tensor(0), name="max_pool_with_indices")
    return node.fields(values)


def _largest_with_index(windows: Windows, rows: Sequence[Size], backwards: bool) -> Any:
    """The nest; ``backwards`` counts an image's elements with its first axis innermost."""

    kernel, strides = windows.kernel, windows.strides

    def better(one: Any, other: Any) -> Any:
        (i, a), (j, b) = one, other
        first = tirx.any(a > b, tirx.all(a == b, i < j))
        return tirx.Select(first, i, j), tirx.Select(first, a, b)

    def compute(x: te.Tensor) -> Any:
        batch, channels, *size = x.shape
        most = tirx.max_value("int64")
        largest = te.comm_reducer(better, lambda _, of: (most, tirx.min_value(of)), name="largest")
        within = [te.reduce_axis((0, k), f"k{axis}") for axis, k in enumerate(kernel)]

        def window(at: Any, channel: Any, *place: Any) -> Any:
            places = [
                place[i] * strides[i] + within[i] * windows.dilations[i] - windows.pads[i]
                for i in range(len(kernel))
            ]
            inside = tirx.all(*(tirx.all(p >= 0, p < s) for p, s in zip(places, size, strict=True)))
            index: Any = at * channels + channel
            for p, s in zip(places, size, strict=True):
                index = index * as_expr(s) + p
            least = tirx.min_value(x.dtype)
            value = tirx.if_then_else(inside, x[(at, channel, *places)], least)
            position = tirx.if_then_else(inside, tirx.Cast("int64", index), most)
            return largest((position, value), axis=within)

        shape = (batch, channels, *rows)
        indices, values = te.compute(shape, window, name="largest")
        if backwards:
            rowwise = indices
            indices = te.compute(shape, lambda *at: _first_axis_innermost(rowwise(*at), size))
        return [values, indices]

    return compute


def _first_axis_innermost(index: Any, size: Sequence[Size]) -> Any:
    """A row-major index into images of this size as one whose first axis runs fastest."""
    places = []
    for extent in reversed(size):
        places.append(tirx.floormod(index, extent))
        index = tirx.floordiv(index, extent)
    for place, extent in zip(places, reversed(size), strict=True):
        index = index * extent + place
    return index
