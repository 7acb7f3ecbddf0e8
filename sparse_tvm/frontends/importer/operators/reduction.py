"""Operators that sum, multiply or compare along axes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.frontends.importer.forms import INTEGERS, NotInForm
from sparse_tvm.frontends.importer.index_expressions import IndexExpression, index
from sparse_tvm.frontends.importer.known import Known, map_elements
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.tensors import Tensor

Reduction = Callable[[relax.Expr, list[int], bool], relax.Expr]


def _of_squares(data: relax.Expr, axes: list[int], keepdims: bool) -> relax.Expr:
    return relax.op.sum(relax.op.multiply(data, data), axes, keepdims)


def _log_sum_exp(data: relax.Expr, axes: list[int], keepdims: bool) -> relax.Expr:
    """Of differences from the largest element: exp of a large one is infinite."""
    largest = relax.op.max(data, axes, True)
    finite = relax.op.where(relax.op.isfinite(largest), largest, relax.op.zeros_like(largest))
    total = relax.op.sum(relax.op.exp(relax.op.subtract(data, finite)), axes, True)
    result = relax.op.add(relax.op.log(total), finite)
    return result if keepdims else relax.op.squeeze(result, axes)


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceL1": lambda data, axes, keep: relax.op.sum(relax.op.abs(data), axes, keep),
    "ReduceL2": lambda data, axes, keep: relax.op.sqrt(_of_squares(data, axes, keep)),
    "ReduceLogSum": lambda data, axes, keep: relax.op.log(relax.op.sum(data, axes, keep)),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": relax.op.max,
    "ReduceMean": relax.op.mean,
    "ReduceMin": relax.op.min,
    "ReduceProd": relax.op.prod,
    "ReduceSum": relax.op.sum,
    "ReduceSumSquare": _of_squares,
}
# Over no elements at all.
_EMPTY = {"ReduceProd": 1, "ReduceLogSum": -np.inf, "ReduceLogSumExp": -np.inf}


@rule(*_REDUCTIONS)
def _reduce(node: Node) -> Any:
    shape = node.shape(0)
    axes = node.axes(1)
    if not axes:
        axes = [] if node.attributes.get("noop_with_empty_axes", 0) else list(range(len(shape)))
    keepdims = bool(node.attributes.get("keepdims", 1))
    if node.form is Known:
        return _on_known(node, axes, keepdims)
    if node.form is not Tensor:
        raise NotInForm
    data, dtype = node.input(0), node.dtype(0)
    if any(size == 0 for size in shape if isinstance(size, int)):
        return _of_nothing(node, axes, keepdims)
    if dtype == "bool":
        data = data.astype("int8")
    if not axes:
        # Only what the reduction does to single elements remains.
        alone = data.expand_dims([len(shape)])
        result = node.emit(_REDUCTIONS[node.op](alone.value, [len(shape)], False))
    else:
        result = node.emit(_REDUCTIONS[node.op](data.value, axes, keepdims))
    return result.astype(dtype)


def _of_nothing(node: Node, axes: list[int], keepdims: bool) -> Any:
    dtype = np.dtype(node.dtype(0))
    lowest: Any = -np.inf if dtype.kind == "f" else dtype.kind != "b" and np.iinfo(dtype).min
    highest: Any = np.inf if dtype.kind == "f" else dtype.kind == "b" or np.iinfo(dtype).max
    empty = {**_EMPTY, "ReduceMax": lowest, "ReduceMin": highest}.get(node.op, 0)
    shape = [1 if axis in axes else size for axis, size in enumerate(node.shape(0))]
    if not keepdims:
        shape = [size for axis, size in enumerate(shape) if axis not in axes]
    return node.emit(
        relax.op.broadcast_to(relax.const(np.asarray(empty, dtype), dtype.name), shape)
    )


def _on_known(node: Node, axes: list[int], keepdims: bool) -> Known:
    functions = {
        "ReduceSum": np.add,
        "ReduceProd": np.multiply,
        "ReduceMax": np.frompyfunc(node.sizes.maximum, 2, 1),
        "ReduceMin": np.frompyfunc(node.sizes.minimum, 2, 1),
    }
    if node.op not in functions or node.dtype(0) not in INTEGERS:
        raise NotInForm
    data: np.ndarray = node.input(0).elements
    for axis in axes:
        data = functions[node.op].reduce(data, axis=axis, keepdims=True)
    reduced = Known(map_elements(node.sizes.simplify, data), node.dtype(0))
    return reduced if keepdims else reduced.squeeze(axes)


@rule("CumSum", "CumProd")
def _cumulative(node: Node) -> Any:
    """Sums of numbers that are all the same are positions."""
    if node.form is Known:
        raise NotInForm
    [axis] = node.integers(1)
    axis %= len(node.shape(0))
    exclusive = bool(node.attributes.get("exclusive", 0))
    reverse = bool(node.attributes.get("reverse", 0))
    if node.form is IndexExpression:
        data = node.input(0)
        if node.op == "CumProd" or data.uniform is None or exclusive or reverse:
            raise NotInForm
        return replace(data, value=(index(axis) + 1) * data.uniform).simple()
    value, dtype = node.tensor(0), node.dtype(0)
    value = relax.op.flip(value, axis) if reverse else value
    function = relax.op.cumsum if node.op == "CumSum" else relax.op.cumprod
    value = function(value, axis, dtype, exclusive)
    return node.emit(relax.op.flip(value, axis) if reverse else value)
