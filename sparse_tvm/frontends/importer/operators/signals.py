"""Fourier transforms, whose length is known: products with the transform of each unit vector."""

from __future__ import annotations

import numpy as np
from tvm import relax

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.tensors import Tensor

_LONGEST = 8192
"""Of which the matrix has 256 MB and more."""


@rule("DFT")
def _dft(node: Node) -> Tensor:
    if node.form is not Tensor:
        raise NotInForm
    shape = node.shape(0)
    rank, parts = len(shape), shape[-1]
    if "axis" in node.attributes or node.opset < 20:
        axis = node.attributes.get("axis", 1)
    else:
        [axis] = node.integers(2, [-2])
    axis %= rank
    inverse, onesided = (bool(node.attributes.get(name, 0)) for name in ("inverse", "onesided"))
    rows = shape[axis]
    if not isinstance(rows, int) or not isinstance(parts, int):
        raise ValueError("its length is symbolic, which --input-shape can fix")
    length = (
        node.integers(1)[0] if node.has(1) else 2 * (rows - 1) if inverse and onesided else rows
    )
    table = _transform(rows, parts, length, inverse, onesided)
    before = [a for a in range(rank - 1) if a != axis]
    x = node.emit(node.tensor(0)).transpose([*before, axis, rank - 1])
    rest = [shape[a] for a in before]
    x = x.reshape([*rest, rows * parts])
    _, bins, outputs = table.shape
    weight = relax.const(table.reshape(rows * parts, bins * outputs), node.dtype(0))
    y = node.emit(relax.op.matmul(x.value, weight)).reshape([*rest, bins, outputs])
    order = [*range(axis), rank - 2, *range(axis, rank - 2), rank - 1]
    return y.transpose(order)


def _transform(rows: int, parts: int, length: int, inverse: bool, onesided: bool) -> np.ndarray:
    """The transforms of unit vectors, real ones and imaginary ones, ``[rows * parts, bins, 2]``.

    One number per bin is left where the result is real.
    """
    if max(rows, length) > _LONGEST:
        raise ValueError(f"it is longer than {_LONGEST}")
    unit = np.eye(rows)
    vectors = np.stack([unit, 1j * unit][:parts], 1).reshape(rows * parts, rows)
    if inverse and onesided:
        return np.fft.irfft(vectors, length)[..., None]
    result = (np.fft.ifft if inverse else np.fft.fft)(vectors, length)
    if onesided:
        result = result[:, : length // 2 + 1]
    return np.stack([result.real, result.imag], -1)


@rule("STFT")
def _stft(node: Node) -> Tensor:
    """A convolution: windows of a signal, each transformed."""
    if node.form is not Tensor:
        raise NotInForm
    signal, dtype = node.emit(node.tensor(0)), node.dtype(0)
    batch, _, *last = node.shape(0)
    parts = last[0] if last else 1
    step = _number(node, 1)
    window = node.constant(2) if node.has(2) else None
    if node.has(2) and window is None:
        raise ValueError("its window depends on data")
    length = _number(node, 3) if node.has(3) else None if window is None else len(window)
    if length is None or not isinstance(parts, int):
        raise ValueError("it says how long windows are by neither a window nor a length")
    table = _transform(length, parts, length, False, bool(node.attributes.get("onesided", 1)))
    bins = table.shape[1]
    table = table.reshape(length, parts, bins * 2)
    if window is not None:
        table = table * window[:, None, None]
    weight = relax.const(np.ascontiguousarray(table.transpose(2, 1, 0)), dtype)
    channels = signal.transpose([0, 2, 1]) if last else signal.expand_dims([1])
    y = node.emit(relax.op.nn.conv1d(channels.value, weight, strides=step))
    frames = y.sizes_of_axes[2]
    if not node.sizes.demand_positive(frames):
        raise ValueError("the signal is shorter than a window")
    return y.reshape([batch, bins, 2, frames]).transpose([0, 3, 1, 2])


def _number(node: Node, position: int) -> int:
    [number] = node.integers(position)
    return number
