"""Resize: each output is a sum of a few inputs along an axis, at places known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.frontends.importer.forms import NotInForm
from sparse_tvm.frontends.importer.rules import Node, rule
from sparse_tvm.frontends.importer.sizes import Size
from sparse_tvm.frontends.importer.tensors import Tensor

_EXACT = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")


@rule("Resize")
def _resize(node: Node) -> Any:
    if node.form is not Tensor:
        raise NotInForm
    data, shape = node.input(0), node.shape(0)
    axes = [axis % len(shape) for axis in node.attributes.get("axes", range(len(shape)))]
    roi = _roi(node, len(axes))
    sizes, scales = _target(node, [shape[axis] for axis in axes])
    changed = {
        axis: (size, scale, ends)
        for axis, size, scale, ends in zip(axes, sizes, scales, roi, strict=True)
        if not node.sizes.equal(size, shape[axis]) or _mode(node) == "tf_crop_and_resize"
    }
    if _is_plain(node, shape, changed):
        return _image(node, data, shape, changed)
    for axis, (size, scale, ends) in changed.items():
        extent = shape[axis]
        if not isinstance(extent, int) or not isinstance(size, int) or scale is None:
            raise ValueError(f"it resizes the symbolic size {extent} in a way that depends on it")
        data = _along_axis(node, data, axis, _weights(node, extent, size, scale, ends))
    return data


def _mode(node: Node) -> str:
    default = b"half_pixel"
    mode: bytes = node.attributes.get("coordinate_transformation_mode", default)
    return mode.decode()


def _roi(node: Node, count: int) -> list[tuple[float, float]]:
    if _mode(node) != "tf_crop_and_resize":
        return [(0.0, 1.0)] * count
    roi = node.constant(1)
    if roi is None:
        raise ValueError("its region of interest depends on the values of tensors")
    return list(zip(roi[:count].tolist(), roi[count:].tolist(), strict=True))


def _target(node: Node, shape: Sequence[Size]) -> tuple[list[Size], list[float | None]]:
    """Return sizes and scales along the axes; scales of symbolic sizes may be unknown."""
    if node.has(2) and (scales := node.constant(2)) is not None and scales.size:
        ratios: list[float | None] = [float(scale) for scale in scales]
        return [
            _scaled(node, size, float(scale)) for size, scale in zip(shape, scales, strict=True)
        ], ratios
    if not node.has(3):
        raise ValueError("its scales depend on the values of tensors")
    sizes = node.vector(3)
    policy = node.attributes.get("keep_aspect_ratio_policy", b"stretch").decode()
    if policy != "stretch":
        choose = min if policy == "not_larger" else max
        scale = choose(float(size) / float(own) for size, own in zip(sizes, shape, strict=True))
        return [math.floor(scale * own + 0.5) for own in shape], [scale] * len(shape)
    pairs = list(zip(sizes, shape, strict=True))
    return sizes, [
        size / own if isinstance(size, int) and isinstance(own, int) else None
        for size, own in pairs
    ]


def _scaled(node: Node, size: Size, scale: float) -> Size:
    if isinstance(size, int):
        return math.floor(size * scale)
    if scale.is_integer():
        return node.sizes.simplify(size * int(scale))
    if (1 / scale).is_integer():
        return node.sizes.floordiv(size, int(1 / scale))
    raise ValueError(f"it scales the symbolic size {size} by {scale}")


def _is_plain(node: Node, shape: Sequence[Size], changed: dict[int, Any]) -> bool:
    """Whether it is what images are resized by: TVM has an operator for it."""
    exact = all(
        not (isinstance(size, int) and isinstance(shape[axis], int))
        or (scale is not None and math.isclose(size, scale * shape[axis], rel_tol=1e-9))
        for axis, (size, scale, _) in changed.items()
    )
    return (
        len(shape) == 4
        and set(changed) <= {2, 3}
        and exact
        and _mode(node) in _EXACT
        and not node.attributes.get("antialias", 0)
        and not node.attributes.get("exclude_outside", 0)
        and node.attributes.get("mode", b"nearest") != b"cubic"
    )


def _image(node: Node, data: Tensor, shape: Sequence[Size], changed: dict[int, Any]) -> Tensor:
    if not changed:
        return data
    sizes = [changed[axis][0] if axis in changed else shape[axis] for axis in (2, 3)]
    linear = node.attributes.get("mode", b"nearest") == b"linear"
    rounding = node.attributes.get("nearest_mode", b"round_prefer_floor").decode()
    return node.emit(
        relax.op.image.resize2d(
            data.value,
            size=relax.ShapeExpr(sizes),
            roi=[0.0] * 4,
            layout="NCHW",
            method="linear" if linear else "nearest_neighbor",
            coordinate_transformation_mode=_mode(node),
            rounding_method="" if linear else rounding,
        )
    )


def _along_axis(node: Node, data: Tensor, axis: int, weights: np.ndarray) -> Tensor:
    """Multiply an axis by a matrix ``[out, in]`` with few values in each row."""
    inside = np.isfinite(weights).all(axis=1)
    weights = np.where(inside[:, None], weights, 0)
    count = max(int(np.count_nonzero(weights, axis=1).max()), 1)
    order = np.argsort(weights == 0, axis=1, kind="stable")[:, :count]
    kept = np.take_along_axis(weights, order, 1).astype(np.float32)
    column = [1] * len(data.sizes_of_axes)
    column[axis] = len(weights)
    total = None
    for tap in range(count):
        places = relax.const(order[:, tap].astype(np.int64))
        part = relax.op.take(data.value, places, axis, mode="clip")
        if not (kept[:, tap] == 1).all():
            factors = kept[:, tap].reshape(column).astype(data.dtype)
            part = relax.op.multiply(part, relax.const(factors))
        total = part if total is None else relax.op.add(total, part)
    if not inside.all():
        outside = np.asarray(node.attributes.get("extrapolation_value", 0.0), data.dtype)
        total = relax.op.where(relax.const(inside.reshape(column)), total, relax.const(outside))
    return node.emit(total)


def _weights(
    node: Node, extent: int, size: int, scale: float, roi: tuple[float, float]
) -> np.ndarray:
    """Return what each output takes of each input: ``[out, in]``; NaN in rows from outside."""
    taps = _taps(node, scale)
    crop = _mode(node) == "tf_crop_and_resize"
    exclude = node.attributes.get("exclude_outside", 0)
    weights = np.zeros((size, extent))
    for out in range(size):
        # Places halfway between inputs are told in single precision, as engines do.
        place = float(np.float32(_place(_mode(node), out, extent, extent * scale, scale, roi)))
        if crop and not 0 <= place <= extent - 1:
            weights[out] = np.nan
            continue
        base = math.floor(place)
        first, factors = taps(place - base)
        inputs = base + first + np.arange(len(factors))
        if exclude:
            factors = np.where((inputs >= 0) & (inputs < extent), factors, 0)
            factors = factors / factors.sum()
        np.add.at(weights[out], np.clip(inputs, 0, extent - 1), factors)
    return weights


def _place(
    mode: str, out: int, extent: int, length: float, scale: float, roi: tuple[float, float]
) -> float:
    """Return where in the input an output lies; `length` is the output's, not rounded."""
    if mode == "align_corners":
        return 0.0 if length == 1 else out * (extent - 1) / (length - 1)
    if mode == "asymmetric":
        return out / scale
    if mode == "tf_crop_and_resize":
        start, end = roi
        if length == 1:
            return (start + end) * (extent - 1) / 2
        return start * (extent - 1) + out * (end - start) * (extent - 1) / (length - 1)
    if mode == "pytorch_half_pixel" and length == 1:
        return -0.5
    centre = (out + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        centre += extent / 2 * (1 - math.floor(length) / length)
    return centre


def _taps(node: Node, scale: float) -> Callable[[float], tuple[int, np.ndarray]]:
    """Return, for a place after an input, the first of the inputs that count, and their weights."""
    mode = node.attributes.get("mode", b"nearest").decode()
    if mode == "nearest":
        rounding = node.attributes.get("nearest_mode", b"round_prefer_floor").decode()
        return lambda ratio: (_rounded(rounding, ratio), np.ones(1))
    shrink = min(scale, 1.0) if node.attributes.get("antialias", 0) else 1.0
    alpha = node.attributes.get("cubic_coeff_a", -0.75)
    reach = 1 if mode == "linear" else 2

    def taps(ratio: float) -> tuple[int, np.ndarray]:
        first = math.floor(-reach / shrink) + 1
        distances = np.abs(np.arange(first, 2 - first) - ratio) * shrink
        factors = np.clip(1 - distances, 0, 1) if reach == 1 else _cubic(distances, alpha)
        return first, factors / factors.sum()

    return taps


def _rounded(rounding: str, ratio: float) -> int:
    if rounding == "floor" or ratio == 0:
        return 0
    if rounding == "ceil":
        return 1
    return int(ratio > 0.5 or (ratio == 0.5 and rounding == "round_prefer_ceil"))


def _cubic(distances: np.ndarray, alpha: float) -> np.ndarray:
    near = ((alpha + 2) * distances - (alpha + 3)) * distances**2 + 1
    far = alpha * (((distances - 5) * distances + 8) * distances - 4)
    return np.where(distances <= 1, near, np.where(distances < 2, far, 0))
