"""Convolutions and regions, where TVM's importer leaves attributes out."""

from __future__ import annotations

from typing import Any

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.tensors import Tensor


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
