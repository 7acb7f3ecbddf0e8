"""Operators that make tensors out of sizes and numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from tvm import relax, tirx

from sparse_tvm.frontends.importer.forms import INTEGERS, Form, NotInForm
from sparse_tvm.frontends.importer.index_expressions import IndexExpression, index
from sparse_tvm.frontends.importer.known import MAX_ELEMENTS, Known
from sparse_tvm.frontends.importer.operators.indexing import wrap
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.tensors import Tensor


@rule("ConstantOfShape")
def _constant_of_shape(node: Node) -> Form:
    tensor = node.attributes.get("value")
    fill = np.float32(0) if tensor is None else onnx.numpy_helper.to_array(tensor)
    shape, value, dtype = node.vector(0), fill.reshape(()).item(), fill.dtype.name
    if node.form is Known:
        if not all(isinstance(size, int) for size in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise NotInForm
        return Known.of(np.full(shape, value, dtype))
    return IndexExpression(tuple(shape), value, dtype, node.sizes)


@rule("Range")
def _range(node: Node) -> Form:
    [start], [limit], [step] = (node.vector(position) for position in range(3))
    if node.form is Known:
        if not all(isinstance(value, int | float) for value in (start, limit, step)):
            raise NotInForm
        if abs(limit - start) > abs(step) * MAX_ELEMENTS:
            raise NotInForm
        return Known.of(np.arange(start, limit, step, dtype=node.dtype(0)))
    if step != 1 or node.dtype(0) not in INTEGERS:
        raise NotInForm
    extent = node.sizes.simplify(limit - start)
    return IndexExpression((extent,), start + index(0), node.dtype(0), node.sizes).simple()


@rule("OneHot")
def _one_hot(node: Node) -> Any:
    """Keep the dtype of the two values: TVM makes them float64."""
    depth, values = node.scalar(1), node.constant(2)
    if node.form is not Tensor or depth is None or values is None:
        raise NotInForm
    off, on = (tirx.const(value, values.dtype.name) for value in values.tolist())
    indices = node.input(0)
    if not indices.dtype.startswith("int"):
        indices = indices.astype("int64")
    indices = wrap(node, indices.value, [int(depth)])
    axis = node.axis(-1, len(node.shape(0)) + 1)
    return node.emit(relax.op.one_hot(indices, on, off, int(depth), axis))
