"""Operators that read at indices: slices and broadcasts where the indices tell, else gathers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import GenericConst

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.index_expressions import (
    IndexExpression,
    affine_start,
    index,
)
from sparse_tvm.frontends.importer.known import Known
from sparse_tvm.frontends.importer.operators.selection import held
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.sizes import Size, is_number
from sparse_tvm.frontends.importer.tensors import Tensor, materialise, shape_of


@rule("Gather")
def _gather(node: Node) -> Any:
    """Slice for indices that count up; else take with indices in bounds."""
    axis = node.axis(0)
    if node.form is Known:
        indices = node.input(1)
        return node.input(0).take(indices.constant(), axis)
    if node.form is IndexExpression:
        raise NotInForm
    data, shape = node.input(0), node.shape(0)
    if isinstance(data.value, GenericConst) and isinstance(node.tensor(1), GenericConst):
        return None
    expression = node.index_expression(1)
    if expression is not None:
        find = _rows if len(expression.axes) <= 1 else _unflattened
        part = find(node, expression, axis)
        if part is not None:
            return part
    if node.sizes.depends_on_data(shape[axis]):  # which may be 0: there is nothing to clip to
        data = held(node, data, axis, _least(node.known(1)))
        shape = list(data.sizes_of_axes)
    extent, known = shape[axis], node.known(1)
    if known is not None and known.elements.ndim == 0 and not isinstance(extent, int):
        [at] = known.sizes()
        if node.sizes.compare("Less", at, 0):
            first = node.sizes.simplify(at + extent)
            return data.slice({axis: (first, first + 1, 1)}).squeeze([axis])
    return node.emit(
        relax.op.take(data.value, wrap(node, node.tensor(1), [extent]), axis, mode="clip")
    )


def _least(indices: Known | None) -> int:
    """How many elements an axis has at least that these indices are for."""
    if indices is None or not indices.is_constant or not indices.elements.size:
        return 1
    each = indices.constant()
    return max(1, int(each.max()) + 1, -int(each.min()))


def _rows(node: Node, indices: IndexExpression, axis: int) -> Tensor | None:
    """Gather with indices that count up along one of their axes, or are all the same."""
    shape, sizes = node.shape(0), node.sizes
    start: Any = indices.value
    if indices.axes:
        start = affine_start(indices.value, indices.axes[0], sizes)
    extent = indices.shape[indices.axes[0]] if indices.axes else 1
    if start is None or not indices.shape or not sizes.compare("GreaterOrEqual", start, 0):
        return None
    end = sizes.simplify(start + extent)
    if not sizes.fits(end, shape[axis]):
        return None
    part = node.emit(node.tensor(0)).slice({axis: (start, end, 1)})
    own = [size if a in indices.axes else 1 for a, size in enumerate(indices.shape)]
    part = _in_shape(part, [*shape[:axis], *own, *shape[axis + 1 :]])
    return part.broadcast_to([*shape[:axis], *indices.shape, *shape[axis + 1 :]])


def _in_shape(value: Tensor, shape: Sequence[Size]) -> Tensor:
    """Reshape where that changes the shape, and look through nothing."""
    if value.scope.sizes.same(value.sizes_of_axes, shape):
        return value
    return replace(value, value=value.scope.normalize(relax.op.reshape(value.value, list(shape))))


def _unflattened(node: Node, indices: IndexExpression, axis: int) -> Tensor | None:
    """Gather from a flattened tensor at ``i * rows + j``, which is the tensor along other axes."""
    source = node.emit(node.tensor(0)).argument_of("reshape")
    if source is None or axis != 0:
        return None
    shape, sizes = shape_of(source), node.sizes
    rows = node.shape(0)[0]
    flat = next(
        (n for n in range(len(shape) + 1) if sizes.equal(sizes.product(shape[:n]), rows)), None
    )
    *factors, base = tvm.sym.detect_linear_equation(indices.value, [index(a) for a in indices.axes])
    if flat is None or flat != len(indices.axes) or not sizes.equal(base, 0):
        return None
    places: list[int | None] = []
    for own in range(flat):
        stride = sizes.product(shape[own + 1 : flat])
        places += [
            a
            for a, factor in zip(indices.axes, factors, strict=True)
            if sizes.equal(factor, stride) and sizes.equal(indices.shape[a], shape[own])
        ]
    if len(places) != flat:
        return None
    part = _along(node.emit(source), places, indices.shape)
    return _in_shape(part, [*indices.shape, *node.shape(0)[1:]])


def _along(data: Tensor, places: Sequence[int | None], shape: Sequence[Size]) -> Tensor:
    """Put the first axes of a tensor at other places of a shape, and broadcast the others.

    An axis without a place has size 1.
    """
    rest = data.sizes_of_axes[len(places) :]
    order = sorted(range(len(places)), key=lambda axis: places[axis] or 0)
    if order != list(range(len(places))):
        data = data.transpose([*order, *range(len(places), len(places) + len(rest))])
    own = [size if axis in places else 1 for axis, size in enumerate(shape)]
    return _in_shape(data, [*own, *rest]).broadcast_to([*shape, *rest])


@rule("GatherElements")
def _gather_elements(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    table = node.index_expression(0)
    if table is not None and table.uniform is not None:
        return replace(table, shape=tuple(node.shape(1)))
    axis = node.axis(0)
    indices = wrap(node, node.tensor(1), [node.shape(0)[axis]])
    return node.emit(relax.op.gather_elements(node.tensor(0), indices, axis))


@rule("GatherND")
def _gather_nd(node: Node) -> Any:
    batch = node.attributes.get("batch_dims", 0)
    if node.form is Known:
        raise NotInForm
    if node.form is IndexExpression:
        return _value_at(node, batch)
    places = _places(node) if batch == 0 else None
    if places is not None:
        return _along(node.input(0), places, node.shape(1)[:-1])
    coordinates = node.shape(1)[-1]
    if not isinstance(coordinates, int):
        raise ValueError("the rank of its output depends on data")
    indices = wrap(node, node.tensor(1), node.shape(0)[batch : batch + coordinates])
    return node.emit(relax.op.gather_nd(node.tensor(0), indices, batch))


def _value_at(node: Node, batch: int) -> IndexExpression:
    """Return an index expression's value at coordinates that are some too."""
    data, parts = node.index_expression(0), node.coordinates(1)
    if batch or data is None or not parts or len(parts) != len(data.shape):
        raise NotInForm
    places = {axis: part.value for axis, part in enumerate(parts)}
    return data.moved(parts[0].shape[:-1], places)


def _places(node: Node) -> list[int | None] | None:
    """Return along which axis of the result each axis runs, when each coordinate is an index."""
    places: list[int | None] = []
    for part, size in zip(node.coordinates(1), node.shape(0), strict=False):
        if part.uniform == 0 and is_number(size, 1):
            places.append(None)
        elif (
            len(part.axes) == 1
            and part.axes[0] not in places
            and node.sizes.equal(part.value, index(part.axes[0]))
            and node.sizes.equal(part.shape[part.axes[0]], size)
        ):
            places.append(part.axes[0])
        else:
            return None
    return places or None


@rule("ReverseSequence")
def _reverse_sequence(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    batch = node.attributes.get("batch_axis", 1)
    time = node.attributes.get("time_axis", 0)

    def compute(x: Any, lengths: Any) -> Any:
        def element(*at: Any) -> Any:
            many = lengths[at[batch]]
            place = list(at)
            place[time] = tirx.if_then_else(at[time] < many, many - 1 - at[time], at[time])
            return x[tuple(place)]

        return te.compute(x.shape, element, name="reversed", tag="injective")

    return node.compute(compute, node.tensor(0), node.tensor(1), name="reverse_sequence")


def wrap(node: Node, indices: relax.Expr, extents: Sequence[Size]) -> relax.Expr:
    """Let negative indices count from the end, as ONNX demands."""
    extent = Known.shape(extents) if len(extents) > 1 else Known.scalar(extents[0], "int64")
    dtype = str(indices.ty.dtype)
    if isinstance(indices, GenericConst):
        values = indices.value.numpy()
        if not (values < 0).any():
            return indices
        if extent.is_constant:  # without a type, TVM would make int32 of them
            return relax.const(np.where(values < 0, values + extent.constant(), values), dtype)
    size = node.scope.normalize(materialise(Known(extent.elements, dtype)))
    wrapped = relax.op.add(indices, size)
    negative = relax.op.less(indices, relax.const(0, dtype))
    return relax.op.where(negative, wrapped, indices)
