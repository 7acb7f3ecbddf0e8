"""Operators whose output is as long as the data wants it.

Each is a call of a function by ONNX's name, which a pass makes an operator of ours: see
:mod:`sparse_tvm.operators.selection` for fields and results. It returns as much as there could be,
and how much of it counts. That number becomes a size of its own, read at run time, and what follows
has it in its shapes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import tvm
from tvm import relax, te

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.known import Known
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.sizes import Size
from sparse_tvm.frontends.importer.tensors import Tensor, materialise
from sparse_tvm.operators import (
    HoldSize,
    LargestElements,
    Operator,
    SelectNonzero,
    SuppressBoxes,
    UniqueRows,
    to_json,
)

_MANY = 1 << 20
"""Boxes of a class that are as good as no limit: exporters write the largest integer."""


@rule("NonZero")
def _nonzero(node: Node) -> Tensor:
    x, shape = _tensor(node, 0), node.shape(0)
    if not shape:
        raise ValueError("its input is a single number")
    positions = _selected(node, x)
    rows = [_coordinate(node, positions, shape, axis) for axis in range(len(shape))]
    return rows[0].concat(rows[1:], 0)


def _coordinate(node: Node, positions: Tensor, shape: list[Size], axis: int) -> Tensor:
    """Where positions in a flattened tensor lie along one of its axes: ``[1, positions]``."""
    at = positions
    inner = node.sizes.product(shape[axis + 1 :])
    if axis + 1 < len(shape):
        at = node.emit(relax.op.floor_divide(at.value, _number(node, inner)))
    if axis:
        at = node.emit(relax.op.floor_mod(at.value, _number(node, shape[axis])))
    return at.expand_dims([0])


@rule("Compress")
def _compress(node: Node) -> Tensor:
    x, rows = node.emit(_tensor(node, 0)), _selected(node, _tensor(node, 1))
    if "axis" not in node.attributes:
        x = x.reshape([node.sizes.product(node.shape(0))])
    axis = node.axis(0) if "axis" in node.attributes else 0
    return node.emit(relax.op.take(x.value, rows.value, axis, mode="clip"))


def _selected(node: Node, x: relax.Expr) -> Tensor:
    """The positions of what is not zero in a flattened tensor."""
    size = node.sizes.product(Tensor(x, node.scope).sizes_of_axes)
    call = _call("NonZero", SelectNonzero(), [x], [((size,), "int64"), ((1,), "int64")])
    [positions], count = _counted(node, call)
    return positions.slice({0: (0, count, 1)})


@rule("NonMaxSuppression")
def _non_max_suppression(node: Node) -> Tensor:
    boxes, scores = _tensor(node, 0), _tensor(node, 1)
    batch, classes, rows = node.shape(1)
    most = node.scalar(2) if node.has(2) else 0
    known = most is not None and most < _MANY
    room: Size = max(1, int(most)) if known else rows
    room = min(room, rows) if isinstance(room, int) and isinstance(rows, int) else room
    op = SuppressBoxes(
        centred=bool(node.attributes.get("center_point_box", 0)),
        most=room if isinstance(room, int) else None,
    )
    given = [(2, "int64", 0), (3, "float32", 0.0), (4, "float32", -np.inf)]
    limits = [_single(node, position, dtype, default) for position, dtype, default in given]
    total = node.sizes.product([batch, classes, room])
    results = [((total, 3), "int64"), ((1,), "int64")]
    call = _call("NonMaxSuppression", op, [boxes, scores, *limits], results)
    [kept], count = _counted(node, call)
    return kept.slice({0: (0, count, 1)})


def held(node: Node, data: Tensor, axis: int, least: int) -> Tensor:
    """The same tensor, of which run time demands so many elements along an axis.

    Where that size depends on data, nobody can know before; a read behind its end is an error.
    """
    sizes = list(data.sizes_of_axes)
    op = HoldSize(least=least, reader=f"{node.op} {node.output_names[0]}")
    size = node.emit(materialise(Known.shape([sizes[axis]]))).value
    [sizes[axis]] = node.counts(_call("Gather", op, [size], [((1,), "int64")]))

    def compute(x: te.Tensor) -> te.Tensor:
        return te.compute(tuple(sizes), lambda *at: x(*at), name="held", tag="injective")

    return node.compute(compute, data.value, name="held")


def _single(node: Node, position: int, dtype: str, default: float) -> relax.Expr:
    """A parameter as a tensor of one element."""
    if not node.has(position):
        return relax.const(np.array([default], dtype), dtype)
    return node.emit(_tensor(node, position)).astype(dtype).reshape([1]).value


@rule("Unique")
def _unique(node: Node) -> tuple[Tensor, ...]:
    x, shape = node.emit(_tensor(node, 0)), node.shape(0)
    axis = node.axis(0) if "axis" in node.attributes else None
    if axis is None:
        rest: list[Size] = []
        rows = node.sizes.product(shape)
    else:
        x = x.transpose([axis, *(a for a in range(len(shape)) if a != axis)])
        rows, *rest = x.sizes_of_axes
    x = x.reshape([rows, node.sizes.product(rest)])
    op = UniqueRows(ascending=bool(node.attributes.get("sorted", 1)))
    results = [((rows,), "int64")] * 3 + [((1,), "int64")]
    [first, inverse, counts], count = _counted(node, _call("Unique", op, [x.value], results))
    first, counts = (each.slice({0: (0, count, 1)}) for each in (first, counts))
    y = node.emit(relax.op.take(x.value, first.value, 0, mode="clip")).reshape([count, *rest])
    if axis:
        y = y.transpose([*range(1, axis + 1), 0, *range(axis + 1, len(shape))])
    return y, first, inverse, counts


@rule("TopK")
def _top_k(node: Node) -> tuple[Tensor, ...] | None:
    """How many may depend on sizes or on data; a number is left to TVM."""
    x, shape, axis = _tensor(node, 0), node.shape(0), node.axis(-1)
    if not node.has(1) or node.scalar(1) is not None:
        return None
    known = node.known(1)
    if known is not None:
        [count] = known.sizes()
        if isinstance(count, int):
            return None
    else:
        wanted = node.emit(_tensor(node, 1)).astype("int64").reshape([1]).value
        [count] = node.counts(relax.op.minimum(wanted, _number(node, shape[axis])))
    best = [*shape[:axis], count, *shape[axis + 1 :]]
    op = LargestElements(axis=axis, largest=bool(node.attributes.get("largest", 1)))
    results = [(best, node.dtype(0)), (best, "int64")]
    values = node.emit(_call("TopK", op, [x], results))
    return node.fields(values)


def _tensor(node: Node, position: int) -> relax.Expr:
    """An input as a run-time tensor.

    Raises
    ------
    NotInForm
        When another form is being tried.
    """
    if node.form is not Tensor:
        raise NotInForm
    return node.tensor(position)


def _call(
    name: str,
    op: Operator,
    args: Sequence[relax.Expr],
    results: Sequence[tuple[Sequence[Size], str]],
) -> relax.Call:
    text = tvm.ir.StringImm(json.dumps(to_json(op), sort_keys=True))
    types = [relax.TensorType(tuple(shape), dtype) for shape, dtype in results]
    # TVM takes a list of one for a tuple.
    returned = types if len(types) > 1 else types[0]
    return relax.call_dps_packed(f"onnx.{name}", relax.Tuple([*args, text]), returned)


def _counted(node: Node, call: relax.Call) -> tuple[list[Tensor], Size]:
    """A call's results, and the number of their elements that count."""
    *results, last = node.fields(node.emit(call))
    [count] = node.counts(last.value)
    return results, count


def _number(node: Node, size: Size) -> relax.Expr:
    return node.scope.normalize(materialise(Known.scalar(size, "int64")))
