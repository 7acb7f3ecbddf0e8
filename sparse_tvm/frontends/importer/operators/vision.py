"""Convolutions and regions, where TVM's importer leaves attributes out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tvm import relax, te, tirx

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.sizes import Size, as_expr
from sparse_tvm.frontends.importer.tensors import Tensor
from sparse_tvm.frontends.importer.windows import Windows


@rule("ConvTranspose")
def _conv_transpose(node: Node) -> Any:
    """Turn a wanted output shape into padding, as the standard does."""
    wanted = node.attributes.pop("output_shape", None)
    if node.form is not Tensor or wanted is None:
        raise NotInForm
    spatial, kernel = node.shape(0)[2:], node.shape(1)[2:]
    ones = [1] * len(spatial)
    strides = node.attributes.get("strides", ones)
    dilations = node.attributes.get("dilations", ones)
    extra = list(node.attributes.get("output_padding", [0] * len(spatial)))
    before, after = [], []
    upper = node.attributes.pop("auto_pad", b"NOTSET") == b"SAME_UPPER"
    for axis, size in enumerate(spatial):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        total = strides[axis] * (size - 1) + extra[axis] + reach - wanted[-len(spatial) :][axis]
        if total < 0:
            extra[axis] -= total
            total = 0
        half = total // 2
        before.append(half if upper else total - half)
        after.append(total - before[-1])
    node.attributes |= {"pads": (*before, *after), "output_padding": tuple(extra)}
    return None


@rule("RoiAlign")
def _roi_align(node: Node) -> Any:
    if node.attributes.get("mode", b"avg") != b"avg":
        raise ValueError("the largest of samples (mode max) is not supported")
    raise NotInForm


@rule("Col2Im")
def _col2im(node: Node) -> Tensor:
    """Each pixel is the sum of all elements of blocks that lie on it."""
    if node.form is not Tensor:
        raise NotInForm
    image, kernel = node.vector(1), node.integers(2)
    batch, columns, count = node.shape(0)
    windows = Windows.of(node, kernel)
    strides, dilations, pads = windows.strides, windows.dilations, windows.pads
    channels = node.sizes.floordiv(columns, prod(kernel))
    blocks = windows.counts(node, image)
    if not node.sizes.equal(node.sizes.product(blocks), count):
        raise ValueError(f"its input has {count} blocks, not {node.sizes.product(blocks)}")

    def compute(x: te.Tensor) -> te.Tensor:
        within = [te.reduce_axis((0, size), f"k{axis}") for axis, size in enumerate(kernel)]

        def pixel(at: Any, channel: Any, *place: Any) -> Any:
            from_start = [
                place[axis] + pads[axis] - within[axis] * dilations[axis]
                for axis in range(len(kernel))
            ]
            block = [tirx.floordiv(p, s) for p, s in zip(from_start, strides, strict=True)]
            inside = tirx.all(
                *(
                    tirx.all(p >= 0, tirx.floormod(p, s) == 0, b < size)
                    for p, s, b, size in zip(from_start, strides, block, blocks, strict=True)
                )
            )
            row = _flat([channel, *within], [channels, *kernel])
            value = x[at, row, _flat(block, blocks)]
            zero = tirx.const(0, x.dtype)
            return te.sum(tirx.if_then_else(inside, value, zero), axis=within)

        return te.compute((batch, channels, *image), pixel, name="col2im")

    return node.compute(compute, node.tensor(0), name="col2im")


@rule("DeformConv")
def _deform_conv(node: Node) -> Tensor:
    """A product of the weight and of what is read between pixels (arXiv:1811.11168)."""
    if node.form is not Tensor:
        raise NotInForm
    batch = node.shape(0)[0]
    outputs, inputs, *kernel = node.shape(1)
    if len(kernel) != 2:
        raise ValueError("it is not of images")
    groups = node.attributes.get("group", 1)
    out = node.shape(2)[2:]
    given = [node.tensor(0), node.tensor(2)]
    given += [node.tensor(4)] if node.has(4) else []
    columns = node.compute(_columns_of(node, kernel, out), *given, name="deformed_columns")
    pixels = node.sizes.product(out)
    by_group = columns.reshape([batch, groups, inputs * prod(kernel), pixels])
    weight = node.emit(node.tensor(1)).reshape([groups, outputs // groups, inputs * prod(kernel)])
    y = node.emit(relax.op.matmul(weight.value, by_group.value))
    y = y.reshape([batch, outputs, *out])
    if node.has(3):
        bias = node.emit(node.tensor(3)).reshape([outputs, 1, 1])
        y = node.emit(relax.op.add(y.value, bias.value))
    return y


def _columns_of(node: Node, kernel: Sequence[int], out: Sequence[Size]) -> Any:
    """What each output pixel is the sum of: ``[batch, channels, kernel, rows, columns]``."""
    batch, channels, *size = node.shape(0)
    windows = Windows.of(node, kernel)
    strides, dilations, pads = windows.strides, windows.dilations, windows.pads
    per_offset = channels // node.attributes.get("offset_group", 1)
    taps = prod(kernel)

    def compute(x: te.Tensor, offset: te.Tensor, mask: te.Tensor | None = None) -> te.Tensor:
        def pixel(at: Any, channel: Any, tap: Any, *place: Any) -> Any:
            steps = (tirx.floordiv(tap, kernel[1]), tirx.floormod(tap, kernel[1]))
            own = tirx.floordiv(channel, per_offset) * taps + tap
            points = [
                tirx.Cast("float32", place[i] * strides[i] - pads[i] + steps[i] * dilations[i])
                + offset[at, own * 2 + i, place[0], place[1]]
                for i in (0, 1)
            ]
            value = _between(x, (at, channel), points, size)
            return value if mask is None else value * mask[at, own, place[0], place[1]]

        return te.compute((batch, channels, taps, *out), pixel, name="columns")

    return compute


def _between(x: te.Tensor, where: Any, points: Sequence[Any], size: Sequence[Size]) -> Any:
    """A value between four pixels, those outside of the image being 0."""
    total: Any = tirx.const(0, x.dtype)
    low = [tirx.floor(point) for point in points]
    for down in (0, 1):
        for right in (0, 1):
            corner = [low[0] + down, low[1] + right]
            shares = [1 - _distance(p - c) for p, c in zip(points, corner, strict=True)]
            at = [tirx.Cast("int64", c) for c in corner]
            inside = tirx.all(*(tirx.all(a >= 0, a < s) for a, s in zip(at, size, strict=True)))
            value = tirx.if_then_else(inside, x[(*where, *at)], tirx.const(0, x.dtype))
            total = total + value * shares[0] * shares[1]
    return total


def _distance(value: Any) -> Any:
    """The distance from 0."""
    return tirx.max(value, -value)


def _flat(indices: Sequence[Any], sizes: Sequence[Size]) -> Any:
    """The place of an element in all axes taken as one."""
    place: Any = 0
    for index, size in zip(indices, sizes, strict=True):
        place = place * as_expr(size) + index
    return place
