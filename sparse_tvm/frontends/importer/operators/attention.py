"""Attention of the standard, spelled as exporters spell it: the passes know that."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax, tirx

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.index_expressions import IndexExpression, index, materialise
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.sizes import as_expr
from sparse_tvm.frontends.importer.tensors import Tensor

_MASK, _PAST_KEY, _PAST_VALUE, _VALID = 3, 4, 5, 6  # positions of inputs
_QK_OUTPUT = 3  # position of the output


@rule("Attention")
def _attention(node: Node) -> Any:
    """See the operator's definition; what it calls bias is one mask of 0 and -inf here."""
    if node.form is not Tensor:
        raise NotInForm
    query = _split(node, node.input(0), "q_num_heads")
    key = _split(node, node.input(1), "kv_num_heads")
    value = _split(node, node.input(2), "kv_num_heads")
    if node.has(_PAST_KEY):
        key = node.input(_PAST_KEY).concat([key], 2)
        value = node.input(_PAST_VALUE).concat([value], 2)
    present = (key, value)
    heads = query.sizes_of_axes[1]
    key, value = (_repeated(node, tensor, heads) for tensor in (key, value))
    transposed = key.transpose([0, 1, 3, 2])
    size = query.sizes_of_axes[3]
    scale = node.attributes.get("scale") or 1 / math.sqrt(size)
    scores = relax.op.matmul(query.value, transposed.value)
    scores = relax.op.multiply(scores, relax.const(scale, query.dtype))
    raw = scores
    cap = node.attributes.get("softcap", 0.0)
    if cap:
        limit = relax.const(cap, query.dtype)
        scores = relax.op.multiply(relax.op.tanh(relax.op.divide(scores, limit)), limit)
    capped, masked = scores, False
    for mask in _masks(node, query, key):
        scores, masked = relax.op.add(scores, mask.value), True
    weights = node.emit(relax.op.nn.softmax(node.emit(scores).value, -1))
    if masked:  # a query without any key has weights of 0
        nothing = relax.const(0.0, query.dtype)
        weights = node.emit(relax.op.where(relax.op.isnan(weights.value), nothing, weights.value))
    result = node.emit(relax.op.matmul(weights.value, value.value))
    if len(node.shape(0)) == 3:
        result = result.transpose([0, 2, 1, 3])
        batch, rows, count, width = result.sizes_of_axes
        result = result.reshape([batch, rows, node.sizes.product([count, width])])
    if not node.wants(_QK_OUTPUT):
        return (result, *present)
    shown = (raw, capped, scores, weights.value)[node.attributes.get("qk_matmul_output_mode", 0)]
    return (result, *present, node.emit(shown))


def _split(node: Node, tensor: Tensor, attribute: str) -> Tensor:
    """Return ``[batch, heads, rows, size]``, from ``[batch, rows, heads * size]`` if need be."""
    shape = tensor.sizes_of_axes
    if len(shape) == 4:
        return tensor
    heads = node.attributes[attribute]
    batch, rows, width = shape
    return tensor.reshape([batch, rows, heads, width // heads]).transpose([0, 2, 1, 3])


def _repeated(node: Node, tensor: Tensor, heads: int) -> Tensor:
    """Repeat heads that several queries share."""
    batch, own, rows, size = tensor.sizes_of_axes
    if own == heads:
        return tensor
    grouped = tensor.expand_dims([2]).broadcast_to([batch, own, heads // own, rows, size])
    return grouped.reshape([batch, heads, rows, size])


def _masks(node: Node, query: Tensor, key: Tensor) -> list[Tensor]:
    """Return what is added to the scores."""
    dtype = query.dtype
    masks = [_given_mask(node, key, dtype)] if node.has(_MASK) else []
    allowed = _window(node, query, key)
    if node.has(_VALID):
        keys = IndexExpression((1, 1, 1, key.sizes_of_axes[2]), index(3), "int64", node.sizes)
        allowed.append(_less(node, keys, _valid_keys(node)))
    return [*masks, *(_additive(node, condition, dtype) for condition in allowed)]


def _given_mask(node: Node, key: Tensor, dtype: str) -> Tensor:
    mask = node.input(_MASK)
    *rest, columns = mask.sizes_of_axes
    missing = node.sizes.simplify(key.sizes_of_axes[2] - columns)
    if not node.sizes.equal(missing, 0):
        fill = np.asarray(False if mask.dtype == "bool" else -np.inf, mask.dtype)
        filler = relax.op.broadcast_to(relax.const(fill), [*rest, missing])
        mask = mask.concat([node.emit(filler)], len(rest))
    return _additive(node, mask, dtype) if mask.dtype == "bool" else mask


def _window(node: Node, query: Tensor, key: Tensor) -> list[Tensor]:
    """Return which keys each query may see by their distance."""
    left = node.attributes.get("left_window_size", -1)
    right = node.attributes.get("right_window_size", -1)
    bounds = [(0, False)] if node.attributes.get("is_causal", 0) else []
    bounds += [(right, False)] if right >= 0 else []
    bounds += [(left, True)] if left >= 0 else []
    rows, columns = query.sizes_of_axes[2], key.sizes_of_axes[2]
    if not node.has(_VALID):
        offset = node.shape(_PAST_KEY)[2] if node.has(_PAST_KEY) else 0
        conditions = [
            tirx.GE(index(3) + reach, index(2) + as_expr(offset))
            if backward
            else tirx.LE(index(3), index(2) + as_expr(offset) + reach)
            for reach, backward in bounds
        ]
        shape = (1, 1, rows, columns)
        return [
            node.emit(materialise(IndexExpression(shape, value, "bool", node.sizes), node.sizes))
            for value in conditions
        ]
    distance = IndexExpression((1, 1, rows, columns), index(3) - index(2), "int64", node.sizes)
    offset = relax.op.subtract(_valid_keys(node), relax.const(rows, "int64"))
    limits = [
        (relax.op.add(offset, relax.const(-reach if backward else reach, "int64")), backward)
        for reach, backward in bounds
    ]
    tensor = materialise(distance, node.sizes)
    return [
        node.emit(
            relax.op.greater_equal(tensor, limit)
            if backward
            else relax.op.less_equal(tensor, limit)
        )
        for limit, backward in limits
    ]


def _valid_keys(node: Node) -> relax.Expr:
    counts = relax.op.astype(node.tensor(_VALID), "int64")
    return relax.op.reshape(counts, [node.shape(_VALID)[0], 1, 1, 1])


def _less(node: Node, left: IndexExpression, right: relax.Expr) -> Tensor:
    return node.emit(relax.op.less(materialise(left, node.sizes), right))


def _additive(node: Node, allowed: Tensor, dtype: str) -> Tensor:
    keep, drop = relax.const(0.0, dtype), relax.const(-np.inf, dtype)
    return node.emit(relax.op.where(allowed.value, keep, drop))


@rule("RotaryEmbedding")
def _rotary_embedding(node: Node) -> Any:
    """Turn pairs of the first elements of each head by angles that positions choose."""
    if node.form is not Tensor:
        raise NotInForm
    data, shape = node.input(0), node.shape(0)
    if len(shape) == 3:
        heads = node.attributes["num_heads"]
        data = data.reshape([shape[0], shape[1], heads, shape[2] // heads])
    else:
        data = data.transpose([0, 2, 1, 3])
    batch, rows, heads, size = data.sizes_of_axes
    turned = node.attributes.get("rotary_embedding_dim", 0) or size
    half = turned // 2
    cos, sin = (_angles(node, position, [batch, rows, 1, half]) for position in (1, 2))
    if node.attributes.get("interleaved", 0):
        joined = _turned_pairs(data, [batch, rows, heads, turned], cos, sin)
    else:
        low, high = (data.slice({3: bounds}) for bounds in ((0, half, 1), (half, turned, 1)))
        across = relax.op.concat([relax.op.negative(high.value), low.value], -1)
        along = data.slice({3: (0, turned, 1)}).value
        joined = relax.op.add(
            relax.op.multiply(along, relax.op.concat([cos, cos], -1)),
            relax.op.multiply(across, relax.op.concat([sin, sin], -1)),
        )
    result = node.emit(joined)
    if turned < size:
        result = result.concat([data.slice({3: (turned, size, 1)})], 3)
    return result.reshape(shape) if len(shape) == 3 else result.transpose([0, 2, 1, 3])


def _angles(node: Node, position: int, shape: list[Any]) -> relax.Expr:
    table = node.tensor(position)
    if node.has(3):
        table = relax.op.take(table, node.tensor(3), 0, mode="clip")
    return relax.op.reshape(table, shape)


def _turned_pairs(data: Tensor, shape: list[Any], cos: relax.Expr, sin: relax.Expr) -> relax.Expr:
    """Turn neighbours: an even element and the odd one after it."""
    even, odd = (data.slice({3: (first, shape[-1], 2)}).value for first in (0, 1))
    real = relax.op.subtract(relax.op.multiply(even, cos), relax.op.multiply(odd, sin))
    imaginary = relax.op.add(relax.op.multiply(even, sin), relax.op.multiply(odd, cos))
    parts = [relax.op.expand_dims(part, [-1]) for part in (real, imaginary)]
    return relax.op.reshape(relax.op.concat(parts, -1), shape)
