"""Read heads: attention takes heads where they lie, repeated ones once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import apply, assert_becomes, assert_unchanged, build, calls, compile_and_run
from tvm import relax

from sparse_tvm.operators import PRECISIONS, Attention
from sparse_tvm.passes import dialect
from sparse_tvm.passes.cpu.read_heads import read_heads
from sparse_tvm.passes.fuse_attention import fuse_attention

OP = relax.op
HEADS, KEY_HEADS, SIZE = 6, 2, 16
SHARED = HEADS // KEY_HEADS


def repeated(emit, t):
    """``[B, KH, S, D]`` to ``[B, H, S, D]``, as PyTorch's decoders spell it."""
    batch, _, rows, _ = t.ty.shape
    one = emit(OP.reshape(t, (batch, KEY_HEADS, 1, rows, SIZE)))
    several = emit(OP.broadcast_to(one, (batch, KEY_HEADS, SHARED, rows, SIZE)))
    return emit(OP.reshape(several, (batch, HEADS, rows, SIZE)))


def split(emit, t):
    """``[B, S, KH * D]`` to ``[B, KH, S, D]``."""
    batch, rows, _ = t.ty.shape
    return emit(OP.permute_dims(emit(OP.reshape(t, (batch, rows, KEY_HEADS, SIZE))), [0, 2, 1, 3]))


def attention(k_of=lambda emit, k: k, v_of=lambda emit, v: v):
    """Attention over heads, spelled out."""

    def body(emit, q, k, v):
        k, v = k_of(emit, k), v_of(emit, v)
        turned = emit(OP.permute_dims(k, [0, 1, 3, 2]))
        scores = emit(OP.divide(emit(OP.matmul(q, turned)), relax.const(math.sqrt(SIZE))))
        mixed = emit(OP.matmul(emit(OP.nn.softmax(scores)), v))
        batch, _, rows, _ = q.ty.shape
        merged = emit(OP.permute_dims(mixed, [0, 2, 1, 3]))
        return OP.reshape(merged, (batch, rows, HEADS * SIZE))

    return body


def by_heads(rows, heads=HEADS):
    return (2, heads, rows, SIZE)


def numpy_attention(q, k, v):
    k, v = (np.repeat(t, HEADS // t.shape[1], axis=1) for t in (k, v))
    scores = q @ k.swapaxes(2, 3) / math.sqrt(SIZE)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ v
    return mixed.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


def check(body, shapes):
    """The operator after the pass; the whole pipeline's output is NumPy's."""
    sizes = {"batch": 2, "rows": 3, "keys": 37}
    before = build(body, shapes)
    (found,) = calls(apply([fuse_attention, read_heads], before), Attention)
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal([sizes.get(n, n) for n in shape]).astype("float32")
        for shape in shapes.values()
    ]
    heads = [
        t if t.ndim == 4 else t.reshape(2, -1, KEY_HEADS, SIZE).transpose(0, 2, 1, 3)
        for t in arrays
    ]
    np.testing.assert_allclose(compile_and_run(before, *arrays), numpy_attention(*heads), atol=2e-6)
    return found.op


QUERIES = [1, 3, 20, "rows"]


@pytest.mark.parametrize("rows", QUERIES)
def test_heads_of_a_cache(rows):
    keys = by_heads("keys" if rows == "rows" else 37)
    op = check(attention(), {"q": by_heads(rows), "k": keys, "v": keys})
    assert (op.by_heads, op.key_heads) == ((True, True, True), None)


@pytest.mark.parametrize("rows", QUERIES)
def test_shared_heads_are_read_once(rows):
    keys = by_heads("keys" if rows == "rows" else 37, KEY_HEADS)
    body = attention(repeated, repeated)
    op = check(body, {"q": by_heads(rows), "k": keys, "v": keys})
    assert (op.by_heads, op.key_heads) == ((True, True, True), KEY_HEADS)


def test_shared_heads_that_a_layer_left_in_rows():
    body = attention(repeated, lambda emit, v: repeated(emit, split(emit, v)))
    shapes = {
        "q": by_heads(20),
        "k": by_heads(37, KEY_HEADS),
        "v": (2, 37, KEY_HEADS * SIZE),
    }
    op = check(body, shapes)
    assert (op.by_heads, op.key_heads) == ((True, True, False), KEY_HEADS)


def test_only_one_of_keys_and_values_is_repeated():
    shapes = {"q": by_heads(20), "k": by_heads(37, KEY_HEADS), "v": by_heads(37)}
    op = check(attention(repeated), shapes)
    assert (op.by_heads, op.key_heads) == ((True, True, True), None)


def test_the_call():
    """Heads as they were, and nothing between them and the attention."""
    shape = by_heads(20)

    fused = apply(fuse_attention, build(attention(), dict.fromkeys("qkv", shape)))
    (found,) = calls(fused, Attention)

    def body(emit, q, k, v):
        op = Attention(heads=HEADS, scale=found.op.scale, by_heads=(True,) * 3)
        return dialect.call(op, [q, k, v], (2, 20, HEADS * SIZE))

    assert_becomes(read_heads, fused, build(body, dict.fromkeys("qkv", shape)).module)


def test_rows_are_left_alone():
    def body(emit, q, k, v):
        op = Attention(heads=HEADS, scale=1.0)
        return dialect.call(op, [q, k, v], (2, 20, HEADS * SIZE))

    assert_unchanged(read_heads, build(body, dict.fromkeys("qkv", (2, 20, HEADS * SIZE))))


def test_other_precisions_are_left_alone():
    def body(emit, q, k, v):
        op = Attention(heads=HEADS, scale=1.0, types=PRECISIONS["bf16"])
        merged = [
            emit(OP.reshape(emit(OP.permute_dims(t, [0, 2, 1, 3])), (2, 20, HEADS * SIZE)))
            for t in (q, k, v)
        ]
        return dialect.call(op, merged, (2, 20, HEADS * SIZE))

    assert_unchanged(read_heads, build(body, dict.fromkeys("qkv", by_heads(20))))
