"""Slices: of bounds that are known, at least as sizes, and of bounds that are data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import relax, te

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.known import Known
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.sizes import Size
from sparse_tvm.frontends.importer.tensors import Tensor, materialise
from sparse_tvm.spec import LARGEST_SIZE


@rule("Slice")
def _slice(node: Node) -> Any:
    if node.form is Tensor and any(map(node.depends_on_data, (1, 2))):
        return _by_data(node)
    starts, ends = node.vector(1), node.vector(2)
    axes = node.integers(3, default=range(len(starts)))
    steps = node.integers(4, default=[1] * len(starts))
    shape = node.shape(0)
    window: dict[int, tuple[Size, Size, int]] = {}
    backwards: dict[int, int] = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis %= len(shape)
        if step > 0:
            window[axis] = *_span(node, shape[axis], start, end), step
            continue
        # ONNX moves the first element into the axis, so there is one before its end.
        first, last = _span(node, shape[axis], *_turned(shape[axis], start, end), least=1)
        if isinstance(first, int) and isinstance(last, int):
            window[axis] = (last - 1, first - 1, step) if first < last else (0, 0, 1)
            continue
        if node.form is not Tensor:
            raise NotInForm
        # TVM's size of a part taken backwards may be negative: first the part, then all of it.
        window[axis] = first, last, 1
        backwards[axis] = step
    result = node.input(0).slice(window)
    return _backwards(node, result, backwards) if backwards else result


def _backwards(node: Node, part: Tensor, steps: Mapping[int, int]) -> Tensor:
    """From the last element on, in negative steps along these axes.

    A nest of ours: TVM's is full of conditions on sizes, and may divide by one that is 0.
    """
    shape = part.sizes_of_axes
    result = [
        node.sizes.floordiv(size - steps[axis] - 1, -steps[axis]) if axis in steps else size
        for axis, size in enumerate(shape)
    ]

    def compute(x: te.Tensor) -> te.Tensor:
        def element(*at: Any) -> Any:
            places = [
                x.shape[axis] - 1 + index * steps[axis] if axis in steps else index
                for axis, index in enumerate(at)
            ]
            return x[tuple(places)]

        return te.compute(result, element, name="backwards", tag="injective")

    return node.compute(compute, part.value, name="backwards")


def _span(node: Node, extent: Size, start: Size, end: Size, least: int = 0) -> tuple[Size, Size]:
    """Where the elements from `start` to `end` begin and end in an axis of any extent.

    The end is at least `least`.
    """
    first, last = (node.sizes.slice_bound(bound, extent) for bound in (start, end))
    for low in (least, first):
        if not node.sizes.compare("GreaterOrEqual", last, low):
            last = node.sizes.maximum(last, low)
    return first, last


def _turned(extent: Size, start: Size, end: Size) -> tuple[Size, Size]:
    """The bounds, from the lowest on, of the elements of a slice whose step is negative."""
    return _behind(end, extent), _behind(start, extent)


def _behind(position: Size, extent: Size) -> Size:
    """The position behind another; behind -1, the last element, there is none."""
    if not isinstance(position, int):
        return position + 1
    if position == -1 or position > LARGEST_SIZE:
        return extent
    return position + 1 if position >= -LARGEST_SIZE else 0


def _by_data(node: Node) -> Tensor:
    """From where to where is read at run time, and how many elements that are is counted."""
    start, end = (node.emit(node.tensor(position)).astype("int64") for position in (1, 2))
    [count] = start.sizes_of_axes
    if not isinstance(count, int):
        raise ValueError("along how many axes it cuts depends on sizes")
    shape = node.shape(0)
    axes = [axis % len(shape) for axis in node.integers(3, default=range(count))]
    steps = node.integers(4, default=[1] * count)
    extents = materialise(Known.shape([shape[axis] for axis in axes]))
    first, many = _cut(start.value, end.value, extents, np.array(steps))
    sizes = list(shape)
    for axis, size in zip(axes, node.counts(many), strict=True):
        sizes[axis] = size

    def compute(x: te.Tensor, begin: te.Tensor) -> te.Tensor:
        def element(*at: Any) -> Any:
            places = list(at)
            for place, (axis, step) in enumerate(zip(axes, steps, strict=True)):
                places[axis] = begin[place] + at[axis] * step
            return x[tuple(places)]

        return te.compute(sizes, element, name="cut", tag="injective")

    return node.compute(compute, node.tensor(0), node.emit(first).value, name="cut")


def _cut(
    start: relax.Expr, end: relax.Expr, extents: relax.Expr, steps: np.ndarray
) -> tuple[relax.Expr, relax.Expr]:
    """Return where ONNX begins in axes of such extents, and how many elements it takes there.

    It counts negative bounds from the end, and then moves them into the axis: going down, the
    first element is the last that a slice may begin at, and the end is before it.
    """
    down = relax.const((steps < 0).astype(np.int64), "int64")
    zero, step = relax.const(0, "int64"), relax.const(steps, "int64")

    def moved(bound: relax.Expr, lowest: relax.Expr) -> relax.Expr:
        bound = relax.op.where(relax.op.less(bound, zero), relax.op.add(bound, extents), bound)
        highest = relax.op.subtract(extents, down)
        return relax.op.minimum(relax.op.maximum(bound, lowest), highest)

    begin, behind = moved(start, zero), moved(end, relax.op.negative(down))
    way = relax.op.subtract(begin, behind)  # rounded down below zero, it is rounded up
    return begin, relax.op.negative(relax.op.floor_divide(way, step))
