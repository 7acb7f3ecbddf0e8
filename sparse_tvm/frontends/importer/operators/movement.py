"""Operators that move elements and change none: other shapes, orders and parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from tvm import relax

from sparse_tvm.frontends.importer.forms import Form, NotInForm
from sparse_tvm.frontends.importer.known import Known
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.sizes import Size, is_number
from sparse_tvm.frontends.importer.tensors import Tensor


@rule("Reshape")
def _reshape(node: Node) -> Form:
    data, target = node.shape(0), node.vector(1)
    if not node.attributes.get("allowzero", 0):
        target = [data[axis] if is_number(size, 0) else size for axis, size in enumerate(target)]
    given = [size for size in target if not is_number(size, -1)]
    if len(given) < len(target):
        rest = node.sizes.quotient(data, given)
        target = [rest if is_number(size, -1) else size for size in target]
    result: Form = node.input(0).reshape(target)
    return result


@rule("Flatten")
def _flatten(node: Node) -> Form:
    data, axis = node.shape(0), node.attributes.get("axis", 1)
    axis = axis if axis >= 0 else axis + len(data)
    rows, columns = node.sizes.product(data[:axis]), node.sizes.product(data[axis:])
    result: Form = node.input(0).reshape([rows, columns])
    return result


@rule("Squeeze")
def _squeeze(node: Node) -> Form:
    axes = node.axes(1)
    if axes is None:
        axes = [axis for axis, size in enumerate(node.shape(0)) if is_number(size, 1)]
    result: Form = node.input(0).squeeze(axes)
    return result


@rule("Unsqueeze")
def _unsqueeze(node: Node) -> Form:
    added = node.attributes.get("axes") or node.integers(1)
    rank = len(node.shape(0)) + len(added)
    result: Form = node.input(0).expand_dims(sorted(axis % rank for axis in added))
    return result


@rule("Transpose")
def _transpose(node: Node) -> Form:
    order = node.attributes.get("perm", range(len(node.shape(0)))[::-1])
    result: Form = node.input(0).transpose(list(order))
    return result


@rule("Expand")
def _expand(node: Node) -> Form:
    """Broadcast both ways: a size of 1 in the target leaves the tensor's own size."""
    shape = node.sizes.broadcast([node.vector(1), node.shape(0)])
    result: Form = node.input(0).broadcast_to(shape)
    return result


@rule("Tile")
def _tile(node: Node) -> Form:
    """Broadcast along a new axis before each that is repeated."""
    data, repeats = node.shape(0), node.vector(1)
    split: list[Size] = []
    tiled: list[Size] = []
    for size, repeat in zip(data, repeats, strict=True):
        split += [1, size]
        tiled += [repeat, size]
    whole = [node.sizes.product(pair) for pair in zip(data, repeats, strict=True)]
    result: Form = node.input(0).reshape(split).broadcast_to(tiled).reshape(whole)
    return result


@rule("Concat")
def _concat(node: Node) -> Any:
    axis = node.axis()
    parts = node.inputs()
    if node.form is Tensor:
        parts = [p for p in parts if not is_number(p.sizes_of_axes[axis], 0)] or parts[:1]
    first, *others = parts
    return first.concat(others, axis) if others else first


@rule("Split")
def _split(node: Node) -> tuple[Form, ...]:
    axis, data = node.axis(0), node.input(0)
    extent = node.shape(0)[axis]
    parts: list[Size] = list(node.attributes.get("split", ())) or node.vector(1, default=())
    if not parts:
        size = node.sizes.floordiv(extent + node.outputs - 1, node.outputs)
        parts = [size] * (node.outputs - 1)
        parts.append(node.sizes.simplify(extent - size * (node.outputs - 1)))
    bounds = [node.sizes.simplify(bound) for bound in accumulate(parts, initial=0)]
    if node.form is Tensor and all(isinstance(p, int) and p > 0 for p in parts):
        return (node.emit(relax.op.split(data.value, bounds[1:-1], axis)),)
    return tuple(data.slice({axis: (begin, end, 1)}) for begin, end in pairwise(bounds))


@rule("Shape", "Size")
def _shape(node: Node) -> Known:
    shape: Sequence[Size] = node.shape(0)
    if node.op == "Size":
        return Known.scalar(node.sizes.product(shape), "int64")
    return Known.shape(shape[node.attributes.get("start", 0) : node.attributes.get("end")])


@rule("SpaceToDepth")
def _space_to_depth(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    batch, channels, height, width = node.shape(0)
    block = node.attributes["blocksize"]
    rows, columns = node.sizes.floordiv(height, block), node.sizes.floordiv(width, block)
    split = node.input(0).reshape([batch, channels, rows, block, columns, block])
    order = [0, 1, 3, 5, 2, 4] if node.attributes.get("mode") == b"CRD" else [0, 3, 5, 1, 2, 4]
    depth = node.sizes.product([channels, block, block])
    return split.transpose(order).reshape([batch, depth, rows, columns])


@rule("DepthToSpace")
def _depth_to_space(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    batch, depth, rows, columns = node.shape(0)
    block = node.attributes["blocksize"]
    channels = node.sizes.floordiv(depth, block * block)
    by_column = node.attributes.get("mode") == b"CRD"
    blocks = [channels, block, block] if by_column else [block, block, channels]
    order = [0, 1, 4, 2, 5, 3] if by_column else [0, 3, 4, 1, 5, 2]
    split = node.input(0).reshape([batch, *blocks, rows, columns]).transpose(order)
    height, width = node.sizes.product([rows, block]), node.sizes.product([columns, block])
    return split.reshape([batch, channels, height, width])
