"""Rotary positions on lane tiles against NumPy."""

from __future__ import annotations

import numpy as np
from harness import PER_FORM, every_form, from_tiles, run, simd, thread_counts, tiles_for, to_tiles
from hypothesis import given
from hypothesis import strategies as st

from sparse_tvm.schedules.cpu.lane_tiles import symbol
from sparse_tvm.schedules.cpu.operators import RotateHeads
from sparse_tvm.schedules.cpu.rotate import rotate_heads


def numpy_rotation(x, op, cos, sin):
    """``[lead, rows, heads * size]``."""
    lead, rows, _ = x.shape
    at = op.first + op.stride * np.arange(op.heads)[:, None] + np.arange(op.size)
    y = x[:, :, at]
    if op.turned:
        turning, half = y[..., : op.turned], op.turned // 2
        other = np.concatenate([-turning[..., half:], turning[..., :half]], axis=-1)
        turned = turning * cos[:, :, None] + other * sin[:, :, None]
        y = np.concatenate([turned, y[..., op.turned :]], axis=-1)
    return y.reshape(lead, rows, -1)


@given(
    lead=st.integers(1, 3),
    rows=st.integers(1, 40),
    heads=st.integers(1, 4),
    half=st.integers(0, 5),
    kept=st.integers(0, 5),
    first=st.integers(0, 7),
    between=st.integers(0, 7),
    shared=st.booleans(),
    symbolic=st.booleans(),
    threads=thread_counts,
)
@PER_FORM
@every_form
def test_rotate_heads(
    target, lead, rows, heads, half, kept, first, between, shared, symbolic, threads
):
    size = max(1, 2 * half + kept)
    op = RotateHeads(heads=heads, size=size, first=first, stride=size + between, turned=2 * half)
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((lead, rows, first + heads * op.stride)).astype("float32")
    angles = rng.standard_normal((2, 1 if shared else lead, rows, op.turned)).astype("float32")
    angle_lead = 1 if shared else symbol("angle_lead") if symbolic else lead
    tiles = tiles_for(lead, rows, symbolic)
    kernel = rotate_heads(op, tiles, x.shape[2], angle_lead, simd(target))
    arguments = [to_tiles(x), *(to_tiles(angle) for angle in angles if op.turned)]
    tiled = run(kernel, target, threads, arguments, (lead, -(-rows // 16), heads * size, 16))
    expected = numpy_rotation(x, op, *angles)
    np.testing.assert_allclose(from_tiles(tiled, rows), expected, rtol=0, atol=1e-5)
