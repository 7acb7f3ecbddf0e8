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
    value, dtype = fill.reshape(()).item(), fill.dtype.name
    if node.form is Tensor and node.depends_on_data(0):
        shape = node.counts(node.tensor(0))
    else:
        shape = node.vector(0)
    if node.form is Known:
        if not all(isinstance(size, int) for size in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise NotInForm
        return Known.of(np.full(shape, value, dtype))
    return IndexExpression(tuple(shape), value, dtype, node.sizes)


@rule("Range")
def _range(node: Node) -> Form:
    if node.form is Tensor and any(map(node.depends_on_data, range(3))):
        return _run_time_range(node)
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


def _run_time_range(node: Node) -> Tensor:
    """As many numbers as there are steps from the first to before the limit, rounded up."""
    dtype = node.dtype(0)
    start, limit, step = (node.emit(node.tensor(i)).reshape([1]).value for i in range(3))
    way = node.emit(relax.op.subtract(limit, start)).value
    if dtype in INTEGERS:  # rounded down on the other side of zero, it is rounded up
        way = node.emit(relax.op.floor_divide(relax.op.negative(way), step)).value
        steps = node.emit(relax.op.negative(way))
    else:
        steps = node.emit(relax.op.ceil(relax.op.divide(way, step)))
    [count] = node.counts(steps.astype("int64").value)
    numbers = node.emit(relax.op.arange(0, count, 1, "int64")).astype(dtype)
    return node.emit(relax.op.add(start, relax.op.multiply(numbers.value, step)))


@rule("EyeLike")
def _eye_like(node: Node) -> Any:
    """A constant, where its size is known; else TVM's, which has the input's type."""
    shape = [size for size in node.shape(0) if isinstance(size, int)]
    if node.form is not Tensor or len(shape) != len(node.shape(0)):
        raise NotInForm
    code = node.attributes.get("dtype")
    dtype = np.dtype(node.dtype(0)) if code is None else onnx.helper.tensor_dtype_to_np_dtype(code)
    rows, columns = shape
    ones = np.eye(rows, columns, node.attributes.get("k", 0)).astype(dtype)
    return node.emit(relax.const(ones, dtype.name))


@rule("OneHot")
def _one_hot(node: Node) -> Any:
    """Keep the dtype of the two values, which may be known at run time only."""
    depth = node.scalar(1)
    if node.form is not Tensor or depth is None:
        raise NotInForm
    indices = node.input(0)
    if not indices.dtype.startswith("int"):
        indices = indices.astype("int64")
    indices = wrap(node, indices.value, [int(depth)])
    axis = node.axis(-1, len(node.shape(0)) + 1)
    if node.constant(2) is not None:
        values = node.constant(2)
        off, on = (tirx.const(value, values.dtype.name) for value in values.tolist())
        return node.emit(relax.op.one_hot(indices, on, off, int(depth), axis))
    yes, no = (tirx.const(value, "int32") for value in (1, 0))
    chosen = node.emit(relax.op.one_hot(indices, yes, no, int(depth), axis)).astype("bool")
    pair = node.emit(node.tensor(2))
    off, on = (pair.slice({0: (i, i + 1, 1)}).value for i in (0, 1))
    return node.emit(relax.op.where(chosen.value, on, off))
