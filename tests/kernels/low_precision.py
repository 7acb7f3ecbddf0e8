"""What tests of low-precision kernels share: instructions to test with, and NumPy's rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from amx_emulator import emulate, emulated_target
from harness import PORTABLE, RUNNABLE, simd, to_tiles
from hypothesis import strategies as st

from sparse_tvm.schedules.arm import instructions as arm
from sparse_tvm.schedules.cpu.dots import Dot
from sparse_tvm.schedules.cpu.precision import BF16, INT8, LINES, ZERO_POINT, Precision
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.x86 import instructions as x86
from sparse_tvm.schedules.x86.instructions import Amx, PlainTiles
from sparse_tvm.schedules.x86.units import DOTS
from sparse_tvm.sparsity.quantise import (
    LARGEST,
    PEAK_STEPS,
    as_words,
    bf16_values,
    round_to_bf16,
)
from sparse_tvm.targets import TARGETS, Target

ANY = TARGETS["x86-64-v2"]
precisions = st.sampled_from([INT8, BF16])


def runnable(features: tuple[str, ...]) -> Target | None:
    """The best target of this machine with these features."""
    able = [target for target in RUNNABLE if set(features) <= set(target.features)]
    return able[0] if able else None


DOT_TARGETS: list[tuple[Dot, Target]] = [
    (Dot("plain", lanes, 16, (), 1.0), ANY) for lanes in (4, 8)
]
DOT_TARGETS += [(Dot("plain-bf16", lanes, 16, (), 1.0, precision=BF16), ANY) for lanes in (4, 8)]
DOT_TARGETS += [
    (Dot("plain-sdot", 4, 32, (), 1.0), PORTABLE),
    (Dot("plain-bf16", 4, 32, (), 1.0, precision=BF16), PORTABLE),
    (Dot("plain-smmla", 4, 32, (), 1.0, depth=2), PORTABLE),
    (Dot("plain-bfmmla", 4, 32, (), 1.0, precision=BF16, depth=2), PORTABLE),
]
DOT_TARGETS += [(dot, target) for dot in DOTS if (target := runnable(dot.features))]
CODE = {**x86.CODE, **arm.CODE}
MULTIPLY_ADD = {**x86.MULTIPLY_ADD, **arm.MULTIPLY_ADD}
TILE_TARGETS = [(PlainTiles, ANY)]
TILE_TARGETS += [(Amx, target) for target in [runnable(Amx.features)] if target]
if emulated := emulated_target():
    emulate()
    TILE_TARGETS.append((Amx, emulated))


def simd_of(dot: Dot, target: Target) -> Simd:
    """The vector unit of kernels with a dot product."""
    return replace(simd(target), lanes=dot.lanes, registers=dot.registers)


def rounded(x: np.ndarray, precision: Precision) -> np.ndarray:
    """What an activation ``[lead, rows, features]`` is worth after rounding."""
    if precision is BF16:
        return bf16_values(round_to_bf16(x)).reshape(x.shape)
    values, scales = in_steps(x)
    return values * scales.astype("float64")


def in_steps(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An int8 activation's values, and the scale of each token, ``[..., 1]``."""
    scales = (np.abs(x).max(axis=-1, keepdims=True) / PEAK_STEPS).astype(np.float32)
    steps = np.rint(x / np.where(scales > 0, scales, 1))
    return np.clip(steps, -LARGEST, LARGEST).astype(np.int8), scales


def to_lines(x: np.ndarray, precision: Precision, zero_point: int = ZERO_POINT) -> np.ndarray:
    """``[lead, rows, features]`` as a low-precision activation; the padding holds garbage."""
    lead, rows, features = x.shape
    flat = x.reshape(-1, features)
    if precision is INT8:
        values, scales = in_steps(flat)
        stored = (values.astype(np.int16) + zero_point).astype(np.uint8)
    else:
        stored = round_to_bf16(flat)
    words = as_words(stored).reshape(lead, rows, -1)
    lines = np.pad(words, ((0, 0), (0, 0), (0, -words.shape[2] % LINES))).view(np.float32)
    tiled = to_tiles(lines).view(np.int32)
    if precision is BF16:
        return tiled
    scale_lines = to_tiles(scales.reshape(lead, rows, 1)).view(np.int32)
    return np.concatenate([tiled, scale_lines], axis=2)


def from_lines(
    lines: np.ndarray,
    rows: int,
    features: int,
    precision: Precision,
    zero_point: int = ZERO_POINT,
) -> np.ndarray:
    """What ``[lead, rows, features]`` a low-precision activation is worth."""
    lead = len(lines)
    data = lines[:, :, : precision.data_lines(features)]
    words = np.ascontiguousarray(data.swapaxes(2, 3)).reshape(lead, -1, data.shape[2])[:, :rows]
    words = np.ascontiguousarray(words)
    if precision is BF16:
        return bf16_values(words.view(np.uint16))[..., :features]
    scales = np.ascontiguousarray(lines[:, :, -1]).view(np.float32).reshape(lead, -1)[:, :rows]
    values = words.view(np.uint8 if zero_point else np.int8).astype("float64") - zero_point
    return values[..., :features] * scales[..., None]
