"""Integers and the real numbers that they stand for: ``(q - zero point) * scale``."""

from __future__ import annotations

import numpy as np


def wrong_scale(scale: np.ndarray) -> float | None:
    """Return the first scale that is zero, negative, infinite or NaN, if there is one."""
    wrong = ~(np.isfinite(scale) & (scale > 0))
    return float(scale[wrong].flat[0]) if wrong.any() else None


def dequantise(
    q: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, axis: int, block: int = 0
) -> np.ndarray:
    """Return the float32 values of integers.

    Parameters
    ----------
    q : np.ndarray
        Integers of any type and shape.
    scale, zero_point : np.ndarray, np.ndarray | None
        Of one element, one for each index of `axis`, or, with a `block` above 0, one for each
        so many indices.
    axis, block : int
        See there.

    Raises
    ------
    ValueError, IndexError
        When shapes do not fit.
    """
    shift = np.zeros((), np.int32) if zero_point is None else zero_point.astype(np.int32)
    shift, factor = (broadcast(each, q.shape, axis, block) for each in (shift, scale))
    values: np.ndarray = (q.astype(np.int32) - shift).astype(np.float32) * factor
    return values


def quantise(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int, block: int = 0
) -> np.ndarray:
    """Round float32 to integers of the zero point's type, ties to even; see `dequantise`."""
    limits = np.iinfo(zero_point.dtype)
    shift, factor = (broadcast(each, x.shape, axis, block) for each in (zero_point, scale))
    rounded = np.rint(x / factor) + shift.astype(np.float32)
    integers: np.ndarray = np.clip(rounded, limits.min, limits.max).astype(zero_point.dtype)
    return integers


def broadcast(
    parameter: np.ndarray, shape: tuple[int, ...], axis: int, block: int = 0
) -> np.ndarray:
    """Return a scale or zero point so that it broadcasts to a tensor of `shape`."""
    if parameter.size == 1:
        return parameter.reshape(())
    axis = axis % len(shape)
    if block:
        return np.repeat(parameter, block, axis)[tuple(slice(size) for size in shape)]
    if parameter.shape != shape[axis : axis + 1]:
        raise ValueError(f"shape {list(parameter.shape)} along axis {axis} of {list(shape)}")
    return parameter.reshape([-1 if a == axis else 1 for a in range(len(shape))])
