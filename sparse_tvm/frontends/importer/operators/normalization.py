"""Normalisation where TVM's importer leaves outputs or attributes out."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.tensors import Tensor


@rule("LayerNormalization")
def _layer_normalization(node: Node) -> Any:
    """Mean and inverse deviation, where they are wanted, are computed beside the result."""
    if node.form is not Tensor:
        raise NotInForm
    if not node.wants(1) and not node.wants(2) and len(node.shape(1)) == _count(node):
        return None
    data = node.tensor(0)
    axes = list(range(node.axis(-1), len(node.shape(0))))
    mean = relax.op.mean(data, axes, keepdims=True)
    inverse = _inverse_deviation(node, data, axes)
    result = relax.op.multiply(relax.op.subtract(data, mean), inverse)
    result = relax.op.multiply(result, node.tensor(1))
    if node.has(2):
        result = relax.op.add(result, node.tensor(2))
    return tuple(node.emit(value) for value in (result, mean, inverse))


def _count(node: Node) -> int:
    return len(node.shape(0)) - node.axis(-1)


def _inverse_deviation(node: Node, data: relax.Expr, axes: list[int]) -> relax.Expr:
    epsilon = relax.const(node.attributes.get("epsilon", 1e-5), node.dtype(0))
    variance = relax.op.variance(data, axes, keepdims=True)
    return relax.op.divide(
        relax.const(1.0, node.dtype(0)), relax.op.sqrt(relax.op.add(variance, epsilon))
    )


@rule("BatchNormalization")
def _batch_normalization(node: Node) -> Any:
    """In training, by the batch's own mean and variance, which also move the running ones."""
    if node.form is not Tensor or not node.attributes.get("training_mode", 0):
        raise NotInForm
    data, dtype = node.tensor(0), node.dtype(0)
    rank = len(node.shape(0))
    axes = [axis for axis in range(rank) if axis != 1]
    mean, variance = relax.op.mean(data, axes), relax.op.variance(data, axes)
    momentum = node.attributes.get("momentum", 0.9)

    def along_channels(value: relax.Expr) -> relax.Expr:
        return relax.op.reshape(value, [1, node.shape(0)[1], *[1] * (rank - 2)])

    def running(before: relax.Expr, now: relax.Expr) -> relax.Expr:
        kept = relax.op.multiply(before, relax.const(momentum, dtype))
        return relax.op.add(kept, relax.op.multiply(now, relax.const(1 - momentum, dtype)))

    epsilon = relax.const(node.attributes.get("epsilon", 1e-5), dtype)
    deviation = relax.op.sqrt(relax.op.add(variance, epsilon))
    result = relax.op.divide(
        relax.op.subtract(data, along_channels(mean)), along_channels(deviation)
    )
    result = relax.op.multiply(result, along_channels(node.tensor(1)))
    result = relax.op.add(result, along_channels(node.tensor(2)))
    outputs = (result, running(node.tensor(3), mean), running(node.tensor(4), variance))
    return tuple(node.emit(value) for value in outputs[: node.outputs])


@rule("RMSNormalization")
def _rms_normalization(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    data, dtype = node.tensor(0), node.dtype(0)
    axes = list(range(node.axis(-1), len(node.shape(0))))
    square = relax.op.mean(relax.op.multiply(data, data), axes, keepdims=True)
    epsilon = relax.const(node.attributes.get("epsilon", 1e-5), dtype)
    root = relax.op.sqrt(relax.op.add(square, epsilon))
    return node.emit(relax.op.multiply(relax.op.divide(data, root), node.tensor(1)))


@rule("LpNormalization")
def _lp_normalization(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    data, dtype, axis = node.tensor(0), node.dtype(0), [node.axis(-1)]
    if node.attributes.get("p", 2) == 1:
        norm = relax.op.sum(relax.op.abs(data), axis, keepdims=True)
    else:
        norm = relax.op.sqrt(relax.op.sum(relax.op.multiply(data, data), axis, keepdims=True))
    zero = relax.const(np.zeros((), dtype), dtype)
    one = relax.const(np.ones((), dtype), dtype)
    # The standard has 0 where the norm is 0.
    divisor = relax.op.where(relax.op.equal(norm, zero), one, norm)
    return node.emit(relax.op.divide(data, divisor))


@rule("Dropout")
def _dropout(node: Node) -> Any:
    """At inference nothing is dropped, and the mask says so."""
    training = node.scalar(2) if node.has(2) else False
    ratio = node.scalar(1) if node.has(1) else node.attributes.get("ratio", 0.5)
    if node.has(2) and (training is None or (training and ratio)):
        raise ValueError("it drops at random, as in training")
    if not node.wants(1):
        return node.input(0)
    everything = relax.const(True, "bool")
    shape = node.shape(0)
    return node.input(0), node.emit(relax.op.broadcast_to(everything, shape))


@rule("IsInf")
def _is_inf(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    data = node.tensor(0)
    found = relax.op.isinf(data)
    zero = relax.const(np.zeros((), node.dtype(0)), node.dtype(0))
    if not node.attributes.get("detect_negative", 1):
        found = relax.op.logical_and(found, relax.op.greater(data, zero))
    if not node.attributes.get("detect_positive", 1):
        found = relax.op.logical_and(found, relax.op.less(data, zero))
    return node.emit(found)
