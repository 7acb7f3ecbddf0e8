"""Operators that sum, multiply or compare along axes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from sparse_tvm.frontends.importer.forms import INTEGERS, NotInForm
from sparse_tvm.frontends.importer.index_expressions import IndexExpression, index
from sparse_tvm.frontends.importer.known import Known, map_elements
from sparse_tvm.frontends.importer.rules import Node, rule


@rule("ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin")
def _reduce(node: Node) -> Any:
    if node.form is not Known or node.dtype(0) not in INTEGERS:
        raise NotInForm
    data: np.ndarray = node.input(0).elements
    function = {
        "ReduceSum": np.add,
        "ReduceProd": np.multiply,
        "ReduceMax": np.frompyfunc(node.sizes.maximum, 2, 1),
        "ReduceMin": np.frompyfunc(node.sizes.minimum, 2, 1),
    }[node.op]
    axes = node.axes(1)
    if axes is None:
        axes = [] if node.attributes.get("noop_with_empty_axes", 0) else list(range(data.ndim))
    for axis in axes:
        data = function.reduce(data, axis=axis, keepdims=True)
    reduced = Known(map_elements(node.sizes.simplify, data), node.dtype(0))
    return reduced if node.attributes.get("keepdims", 1) else reduced.squeeze(axes)


@rule("CumSum")
def _cumulative_sum(node: Node) -> Any:
    """Of numbers that are all the same: positions."""
    if node.form is not IndexExpression:
        raise NotInForm
    [axis] = node.integers(1)
    data = node.input(0)
    if data.uniform is None or node.attributes.get("exclusive") or node.attributes.get("reverse"):
        raise NotInForm
    position = index(axis % len(data.shape))
    return replace(data, value=(position + 1) * data.uniform).simple()
