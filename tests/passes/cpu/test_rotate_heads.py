"""Rotary positions turn heads in lane tiles; what only looks like such is left alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import apply, assert_unchanged, build, calls, compile_and_run, operators
from tvm import relax

from sparse_tvm.operators import Attention
from sparse_tvm.passes.cpu.read_heads import read_heads
from sparse_tvm.passes.cpu.rotate_heads import rotate_heads
from sparse_tvm.passes.fuse_attention import fuse_attention
from sparse_tvm.schedules.cpu.operators import RotateHeads

OP = relax.op
HEADS, SIZE = 4, 8


def part(emit, t, start, stop, axis=3):
    return emit(OP.strided_slice(t, [axis], [start], [stop]))


def swapped(emit, t):
    return emit(OP.permute_dims(t, [0, 2, 1, 3]))


def split(emit, t, heads=HEADS):
    """``[B, S, H * D]`` to ``[B, H, S, D]``."""
    batch, rows, width = t.ty.shape
    return swapped(emit, emit(OP.reshape(t, (batch, rows, heads, int(width) // heads))))


def turned(emit, t, cos, sin, sign=True):
    """Heads by angles ``[1 or B, S, turned]``; features that have none stay."""
    whole, size = int(t.ty.shape[3]), int(cos.ty.shape[2])
    x = part(emit, t, 0, size) if size < whole else t
    second = part(emit, x, size // 2, size)
    second = emit(OP.negative(second)) if sign else second
    other = emit(OP.concat([second, part(emit, x, 0, size // 2)], axis=3))
    cos, sin = (emit(OP.expand_dims(angle, 1)) for angle in (cos, sin))
    total = emit(OP.add(emit(OP.multiply(x, cos)), emit(OP.multiply(other, sin))))
    if size == whole:
        return total
    return emit(OP.concat([total, part(emit, t, size, whole)], axis=3))


def repeated(emit, t, times):
    batch, heads, rows, size = t.ty.shape
    one = emit(OP.reshape(t, (batch, heads, 1, rows, size)))
    several = emit(OP.broadcast_to(one, (batch, heads, times, rows, size)))
    return emit(OP.reshape(several, (batch, int(heads) * times, rows, size)))


def attended(emit, q, k, v):
    """Attention over heads, spelled out."""
    scores = emit(OP.matmul(q, emit(OP.permute_dims(k, [0, 1, 3, 2]))))
    scores = emit(OP.divide(scores, relax.const(math.sqrt(SIZE))))
    mixed = emit(OP.matmul(emit(OP.nn.softmax(scores)), v))
    batch, heads, rows, size = q.ty.shape
    return OP.reshape(swapped(emit, mixed), (batch, rows, int(heads) * int(size)))


def separate(key_heads):
    def body(emit, q, k, v, cos, sin):
        q = turned(emit, split(emit, q), cos, sin)
        k = turned(emit, split(emit, k, key_heads), cos, sin)
        v = split(emit, v, key_heads)
        if key_heads != HEADS:
            k, v = (repeated(emit, t, HEADS // key_heads) for t in (k, v))
        return attended(emit, q, k, v)

    return body


def by_head(emit, merged, cos, sin):
    """GPT-NeoX: q, k and v of each head lie together."""
    parts = emit(OP.split(split(emit, merged), [SIZE, 2 * SIZE], axis=3))
    q, k, v = (emit(parts[i]) for i in range(3))
    return attended(emit, turned(emit, q, cos, sin), turned(emit, k, cos, sin), v)


def one_of_three(emit, merged, cos, sin):
    """ModernBERT: all of q, then all of k, then all of v."""
    batch, rows, _ = merged.ty.shape
    five = emit(OP.reshape(merged, (batch, rows, 3, HEADS, SIZE)))
    q, k, v = (
        swapped(emit, emit(OP.squeeze(part(emit, five, i, i + 1, 2), [2]))) for i in range(3)
    )
    return attended(emit, turned(emit, q, cos, sin), turned(emit, k, cos, sin), v)


def shapes(rows, batch, key_heads=HEADS, size=SIZE, angle_lead=1, merged=False):
    width, keys = HEADS * SIZE, key_heads * SIZE
    inputs = {"q": width, "k": keys, "v": keys} if not merged else {"merged": 3 * width}
    angles = dict.fromkeys(("cos", "sin"), (angle_lead, rows, size))
    return {**{name: (batch, rows, n) for name, n in inputs.items()}, **angles}


CASES = {
    "all features": (separate(HEADS), {}, 2),
    "some features": (separate(HEADS), {"size": 4}, 2),
    "angles of a batch": (separate(HEADS), {"angle_lead": "batch"}, 2),
    "shared keys": (separate(2), {"key_heads": 2}, 2),
    "merged by head": (by_head, {"merged": True, "size": 2}, 3),
    "merged": (one_of_three, {"merged": True}, 3),
}


@pytest.mark.parametrize("rows", [1, 3, 20, "rows"])
@pytest.mark.parametrize("case", CASES)
def test_turns_in_tiles(case, rows):
    body, options, count = CASES[case]
    batch = "batch" if rows == "rows" else 2
    if batch == 2 and options.get("angle_lead"):
        options = {**options, "angle_lead": 2}
    given = shapes(rows, batch, **options)
    before = build(body, given)
    after = apply([fuse_attention, rotate_heads, read_heads], before)
    assert len(calls(after, RotateHeads)) == count
    (found,) = calls(after, Attention)
    assert found.op.by_heads == (False, False, False)
    assert found.op.key_heads == (2 if "key_heads" in options else None)
    assert sorted(operators(after)) == ["attention", *["rotate_heads"] * count]

    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "rows": 21}
    arrays = [
        rng.standard_normal([sizes.get(n, n) for n in shape]).astype("float32")
        for shape in given.values()
    ]
    expected = reference(case, *arrays)
    np.testing.assert_allclose(compile_and_run(before, *arrays), expected, atol=5e-6)


def reference(case, *arrays):
    *tensors, cos, sin = arrays
    batch, rows, _ = tensors[0].shape
    if case == "merged by head":
        q, k, v = np.split(tensors[0].reshape(batch, rows, HEADS, 3 * SIZE), 3, axis=3)
    elif case == "merged":
        q, k, v = np.moveaxis(tensors[0].reshape(batch, rows, 3, HEADS, SIZE), 2, 0)
    else:
        q, k, v = (t.reshape(batch, rows, -1, SIZE) for t in tensors)
    size = cos.shape[-1]

    def turn(t):
        x, rest = t[..., :size], t[..., size:]
        other = np.concatenate([-x[..., size // 2 :], x[..., : size // 2]], axis=-1)
        return np.concatenate([x * cos[:, :, None] + other * sin[:, :, None], rest], axis=-1)

    q, k = turn(q), turn(k)
    k, v = (np.repeat(t, HEADS // t.shape[2], axis=2) for t in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(SIZE)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, rows, -1)


def test_leaves_alone_what_only_queries_turn():
    def body(emit, q, k, v, cos, sin):
        q = turned(emit, split(emit, q), cos, sin)
        return attended(emit, q, split(emit, k), split(emit, v))

    assert_unchanged([rotate_heads], apply(fuse_attention, build(body, shapes(5, 2))))


def test_leaves_alone_keys_that_are_an_output():
    def body(emit, q, k, v, cos, sin):
        q, k = (turned(emit, split(emit, t), cos, sin) for t in (q, k))
        return relax.Tuple([emit(attended(emit, q, k, split(emit, v))), k])

    assert_unchanged([rotate_heads], apply(fuse_attention, build(body, shapes(5, 2))))


def test_leaves_alone_another_turn():
    def body(emit, q, k, v, cos, sin):
        q, k = (turned(emit, split(emit, t), cos, sin, sign=False) for t in (q, k))
        return attended(emit, q, k, split(emit, v))

    assert_unchanged([rotate_heads], apply(fuse_attention, build(body, shapes(5, 2))))
