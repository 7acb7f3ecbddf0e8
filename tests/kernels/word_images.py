"""What tests of int8 images share: images of bytes, and planes of words with poisoned borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from harness import PORTABLE
from image_harness import from_planes, to_planes
from low_precision import DOT_TARGETS, runnable

from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.planes import Planes
from sparse_tvm.schedules.cpu.word_output import PackBytes, plain_bytes
from sparse_tvm.schedules.x86.instructions import HALVES, MULTIPLY_ADD, saturated_bytes
from sparse_tvm.schedules.x86.units import IMAGE_DOTS, SPARSE_IMAGE_DOTS
from sparse_tvm.targets import Target

_PLAIN = [one for one in DOT_TARGETS if one[0].name == "plain"]
_PLAIN_HALVES = [(replace(dot, name="plain-halves", halves=True), target) for dot, target in _PLAIN]
_PLAIN_PAIRS = [(replace(dot, largest_weight=64), target) for dot, target in _PLAIN]


def _runnable(dots: Sequence[Dot]) -> list[tuple[Dot, Target]]:
    return [(dot, target) for dot in dots if (target := runnable(dot.features))]


DENSE_DOTS = [*_PLAIN, *_PLAIN_HALVES, *_runnable(IMAGE_DOTS)]
SPARSE_DOTS = [*_PLAIN, *_PLAIN_PAIRS, *_runnable(SPARSE_IMAGE_DOTS)]
"""Dot products of x86, and a target of this machine with each."""

POISON = 0xA5
"""Fills what nobody may read."""


def multiply_add(dot: Dot):
    """The instruction itself."""
    return (HALVES if dot.halves else MULTIPLY_ADD)[dot.name]


def packing(target: Target) -> PackBytes:
    """How bytes are packed on a target: on the portable one, by the twin."""
    return plain_bytes if target is PORTABLE else saturated_bytes


def as_planes(x: np.ndarray) -> np.ndarray:
    """Bytes ``[batch, channels, height, width]`` as words, int32 ``[batch, planes, ...]``."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 4), (0, 0), (0, 0)), constant_values=POISON)
    batch, channels, height, width = padded.shape
    quads = padded.reshape(batch, channels // 4, 4, height, width)
    return np.ascontiguousarray(np.moveaxis(quads, 2, -1)).view(np.int32)[..., 0]


def as_bytes(words: np.ndarray, channels: int) -> np.ndarray:
    """Words ``[batch, planes, height, width]`` as bytes ``[batch, channels, height, width]``."""
    batch, planes, height, width = words.shape
    quads = np.ascontiguousarray(words)[..., None].view(np.uint8)
    found = np.moveaxis(quads, -1, 2).reshape(batch, planes * 4, height, width)
    return found[:, :channels]


def fill(zero: int) -> np.float32:
    """Four bytes of a zero point, as the bits of a float32."""
    return np.full(4, zero, np.uint8).view(np.float32)[0]


def to_word_planes(x: np.ndarray, planes: Planes, zero: int = 0) -> np.ndarray:
    """An image of bytes in planes of words."""
    border = fill(zero if planes.border.padded else POISON)
    return to_planes(as_planes(x).view(np.float32), planes, border).view(np.int32)


def from_word_planes(stored: np.ndarray, planes: Planes, channels: int) -> np.ndarray:
    """An image of bytes out of planes of words."""
    return as_bytes(from_planes(stored, planes), channels)
