"""Attention, however exporters spell it, and what only looks like it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import apply, build, calls, compile_and_run, operators
from tvm import relax

from sparse_tvm.operators import Attention
from sparse_tvm.passes.fuse_attention import fuse_attention

OP = relax.op
HEADS, SIZE = 2, 6
HIDDEN = HEADS * SIZE
LOWEST = float(np.finfo(np.float32).min)
QKV = dict.fromkeys("qkv", (3, 5, HIDDEN))


def const(value):
    return relax.const(value, "float32")


def split(emit, t, axes=(0, 2, 1, 3)):
    batch, rows, _ = t.ty.shape
    return emit(OP.permute_dims(emit(OP.reshape(t, (batch, rows, HEADS, SIZE))), list(axes)))


def transposed(emit, t):
    return split(emit, t, (0, 2, 3, 1))


def transposed_in_two_steps(emit, t):
    return emit(OP.permute_dims(split(emit, t), [0, 1, 3, 2]))


def transposed_with_batch_and_heads_merged(emit, t):
    """As torch's dynamo exporter transposes: between two reshapes."""
    batch, rows, _ = t.ty.shape
    flat = emit(OP.reshape(split(emit, t), (batch * HEADS, rows, SIZE)))
    turned = emit(OP.permute_dims(flat, [0, 2, 1]))
    return emit(OP.reshape(turned, (batch, HEADS, SIZE, rows)))


def merge(emit, o, shape):
    return OP.reshape(emit(OP.permute_dims(o, [0, 2, 1, 3])), shape)


def divided(emit, scores):
    return emit(OP.divide(scores, const(math.sqrt(SIZE))))


def attention(
    split_q=split,
    split_k=transposed,
    split_v=split,
    scale=divided,
    mask=None,
    softmax=OP.nn.softmax,
    guard=False,
    order=merge,
):
    def body(emit, q, k, v, *rest):
        scores = scale(emit, emit(OP.matmul(split_q(emit, q), split_k(emit, k))))
        if mask is not None:
            scores = mask(emit, scores, *rest)
        weights = emit(softmax(scores))
        if guard:
            weights = emit(OP.where(emit(OP.isnan(weights)), const(0.0), weights))
        return order(emit, emit(OP.matmul(weights, split_v(emit, v))), q.ty.shape)

    return body


def check(before, mask=None, inputs=QKV, given=(), exponential=""):
    """Run the whole pipeline and compare with NumPy.

    `mask` is what is added to the scores; of q, k and v, those in `exponential` are by their heads.
    """
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(inputs[name]).astype("float32") for name in "qkv"}
    got = compile_and_run(before, *arrays.values(), *given)
    q, k, v = (np.exp(t) if name in exponential else t for name, t in arrays.items())

    def heads(t):
        return t.reshape(*t.shape[:2], HEADS, SIZE).transpose(0, 2, 1, 3)

    scores = heads(q) @ heads(k).swapaxes(-1, -2) / math.sqrt(SIZE)
    scores = scores if mask is None else scores + mask
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = (weights @ heads(v)).transpose(0, 2, 1, 3).reshape(q.shape)
    np.testing.assert_allclose(got, expected, atol=2e-6)


def scaled_q(emit, t):
    return emit(OP.multiply(split(emit, t), const(SIZE**-0.25)))


def scaled_k(emit, t):
    return emit(OP.multiply(const(SIZE**-0.25), transposed(emit, t)))


def unscaled(emit, scores):
    return scores


SPELLINGS = {
    "k turned in one step": attention(),
    "k turned in two steps": attention(split_k=transposed_in_two_steps),
    "k turned between reshapes": attention(split_k=transposed_with_batch_and_heads_merged),
    "scores multiplied": attention(
        scale=lambda emit, scores: emit(OP.multiply(const(SIZE**-0.5), scores))
    ),
    "q and k scaled": attention(split_q=scaled_q, split_k=scaled_k, scale=unscaled),
    "q scaled before the split": attention(
        split_q=lambda emit, t: split(emit, emit(OP.multiply(t, const(SIZE**-0.5)))),
        scale=unscaled,
    ),
    "NaN replaced": attention(guard=True),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    before = build(SPELLINGS[name], QKV)
    after = apply(fuse_attention, before)
    assert [call.op.heads for call in calls(after, Attention)] == [HEADS]
    assert "nn.softmax" not in operators(after)
    assert after.notes == []
    check(before)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_with_symbolic_extents(name):
    before = build(SPELLINGS[name], dict.fromkeys("qkv", ("batch", "tokens", HIDDEN)))
    assert len(calls(apply(fuse_attention, before), Attention)) == 1


def test_scale_is_the_product_of_all_factors():
    def scale(emit, scores):
        return emit(OP.multiply(emit(OP.divide(scores, const(2.0))), const(3.0)))

    after = apply(fuse_attention, build(attention(split_q=scaled_q, scale=scale), QKV))
    (call,) = calls(after, Attention)
    assert call.op.scale == pytest.approx(1.5 * SIZE**-0.25)


def test_no_scale():
    (call,) = calls(apply(fuse_attention, build(attention(scale=unscaled), QKV)), Attention)
    assert call.op.scale == 1.0
    assert call.op.mask is None


def test_keys_of_another_length():
    inputs = {"q": (3, 5, HIDDEN), "k": (3, 21, HIDDEN), "v": (3, 21, HIDDEN)}
    before = build(attention(), inputs)
    assert len(calls(apply(fuse_attention, before), Attention)) == 1
    check(before, inputs=inputs)


def test_keys_of_another_symbolic_length():
    inputs = {n: ("batch", "queries" if n == "q" else "keys", HIDDEN) for n in "qkv"}
    before = build(attention(), inputs)
    assert len(calls(apply(fuse_attention, before), Attention)) == 1
    concrete = {"q": (2, 17, HIDDEN), "k": (2, 4, HIDDEN), "v": (2, 4, HIDDEN)}
    check(before, inputs=concrete)


def added(emit, scores, mask):
    return emit(OP.add(scores, mask))


def added_first(emit, scores, mask):
    return emit(OP.add(mask, scores))


MASK_SHAPES = {
    "keys": (3, 1, 1, 5),
    "keys of every batch": (1, 1, 1, 5),
    "queries and keys": (3, 1, 5, 5),
    "causal": (1, 1, 5, 5),
    "causal without batch": (5, 5),
    "heads": (1, HEADS, 5, 5),
    "everything": (3, HEADS, 5, 5),
    "three axes": (HEADS, 5, 5),
}


@pytest.mark.parametrize("name", MASK_SHAPES)
def test_additive_mask(name):
    shape = MASK_SHAPES[name]
    before = build(attention(mask=added), {**QKV, "mask": shape})
    after = apply(fuse_attention, before)
    (call,) = calls(after, Attention)
    padded = (1,) * (4 - len(shape)) + shape
    assert call.op.mask == tuple(extent > 1 for extent in padded)
    drop = np.random.default_rng(1).random(shape) < 0.4
    drop[..., 0] = False
    mask = np.where(drop, LOWEST, 0).astype("float32")
    check(before, mask, given=[mask])


def test_additive_mask_in_first_place():
    before = build(attention(mask=added_first), {**QKV, "mask": (3, 1, 1, 5)})
    assert len(calls(apply(fuse_attention, before), Attention)) == 1


def where(keep_where, low):
    def mask(emit, scores, condition):
        values = (scores, const(low)) if keep_where else (const(low), scores)
        return emit(OP.where(condition, *values))

    return mask


@pytest.mark.parametrize("low", [LOWEST, -1e4, -1e9, -math.inf])
@pytest.mark.parametrize("keep_where", [True, False])
def test_where_is_a_mask(keep_where, low):
    mask = where(keep_where, low)
    before = build(attention(mask=mask), {**QKV, "c": (3, 1, 1, 5)}, dtypes={"c": "bool"})
    after = apply(fuse_attention, before)
    assert [call.op.mask for call in calls(after, Attention)] == [(True, False, False, True)]
    assert after.notes == []


@pytest.mark.parametrize("keep_where", [True, False])
@pytest.mark.parametrize("low", [-1e4, -math.inf])
def test_where_masks_scores(low, keep_where):
    mask = where(keep_where, low)
    before = build(attention(mask=mask), {**QKV, "c": (1, 1, 5, 5)}, dtypes={"c": "bool"})
    keep = np.tri(5, dtype=bool)[None, None]
    check(before, np.where(keep, 0, -np.inf), given=[keep if keep_where else ~keep])


@pytest.mark.parametrize("low", [LOWEST, -1e4])
def test_query_without_any_key_attends_to_all_alike(low):
    mask = where(True, low)
    before = build(attention(mask=mask), {**QKV, "c": (3, 1, 5, 5)}, dtypes={"c": "bool"})
    keep = np.ones((3, 1, 5, 5), bool)
    keep[1, :, 2] = False
    check(before, np.where(keep, 0, -1e30), given=[keep])


def test_mask_and_condition():
    def both(emit, scores, mask, condition):
        return emit(OP.where(condition, emit(OP.add(scores, mask)), const(LOWEST)))

    inputs = {**QKV, "mask": (3, 1, 1, 5), "c": (1, 1, 5, 5)}
    before = build(attention(mask=both), inputs, dtypes={"c": "bool"})
    assert len(calls(apply(fuse_attention, before), Attention)) == 1
    mask = np.zeros((3, 1, 1, 5), "float32")
    mask[1, ..., 3:] = -1e4
    keep = np.tri(5, dtype=bool)[None, None]
    check(before, mask + np.where(keep, 0, -1e30), given=[mask, keep])


def test_one_mask_serves_two_layers():
    def body(emit, q, k, v, condition):
        mask = where(True, LOWEST)
        first = emit(attention(mask=mask)(emit, q, k, v, condition))
        return attention(mask=mask)(emit, first, k, v, condition)

    before = build(body, {**QKV, "c": (3, 1, 1, 5)}, dtypes={"c": "bool"})
    after = apply(fuse_attention, before)
    assert len(calls(after, Attention)) == 2
    assert operators(after).count("where") == 1


def test_symbolic_mask():
    inputs = dict.fromkeys("qkv", ("batch", "tokens", HIDDEN))
    before = build(attention(mask=added), {**inputs, "mask": ("batch", 1, 1, "tokens")})
    assert len(calls(apply(fuse_attention, before), Attention)) == 1
    mask = np.zeros((3, 1, 1, 5), "float32")
    mask[2, ..., 2:] = LOWEST
    check(before, mask, given=[mask])


def tanh_of(emit, scores):
    """Soft-capped scores."""
    return emit(OP.tanh(divided(emit, scores)))


def per_head_scale(emit, scores):
    return emit(OP.multiply(scores, relax.const(np.ones((1, HEADS, 1, 1), "float32"))))


def split_at_the_front(emit, t):
    """Heads are the fast axis of the features."""
    batch, rows, _ = t.ty.shape
    return emit(OP.permute_dims(emit(OP.reshape(t, (batch, rows, SIZE, HEADS))), [0, 3, 1, 2]))


def scaled_v(emit, t):
    return emit(OP.multiply(split(emit, t), const(2.0)))


def computed(emit, t):
    return emit(OP.exp(split(emit, t)))


def unmerged(emit, o, shape):
    return OP.reshape(emit(OP.permute_dims(o, [0, 2, 1, 3])), (shape[0], shape[1] * HEADS, SIZE))


@pytest.mark.parametrize("part", ["q", "k", "v", "rows of q"])
def test_heads_may_be_changed_after_the_split(part):
    """As by rotary positions, before heads lead or after."""

    def rows(emit, t):
        batch, length, _ = t.ty.shape
        changed = emit(OP.exp(emit(OP.reshape(t, (batch, length, HEADS, SIZE)))))
        return emit(OP.permute_dims(changed, [0, 2, 1, 3]))

    changed = {
        "q": {"split_q": computed},
        "k": {"split_k": lambda e, t: e(OP.permute_dims(computed(e, t), [0, 1, 3, 2]))},
        "v": {"split_v": computed},
        "rows of q": {"split_q": rows},
    }
    before = build(attention(**changed[part]), QKV)
    assert len(calls(apply(fuse_attention, before), Attention)) == 1
    check(before, exponential=part[-1])


NEAR_MISSES = {
    "soft-capped scores": (attention(scale=tanh_of), "the soft-max is over"),
    "a scale per head": (attention(scale=per_head_scale), "the soft-max is over"),
    "q not split": (attention(split_q=split_at_the_front), "q is not split"),
    "v scaled": (attention(split_v=scaled_v), "v is scaled"),
    "k computed": (attention(split_k=lambda e, t: e(OP.exp(transposed(e, t)))), "k is not split"),
    "heads not merged": (attention(order=unmerged), "heads are not merged back"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone_with_a_note(name):
    body, note = NEAR_MISSES[name]
    after = apply(fuse_attention, build(body, QKV))
    assert "nn.softmax" in operators(after)
    assert calls(after, Attention) == []
    assert len(after.notes) == 1
    assert note in after.notes[0]


@pytest.mark.parametrize("shared", ["q", "kv"])
def test_one_sequence_for_a_whole_batch_is_left_alone(shared):
    def merged(emit, o, shape):
        return OP.reshape(emit(OP.permute_dims(o, [0, 2, 1, 3])), (3, 5, HIDDEN))

    inputs = {name: (1 if name in shared else 3, 5, HIDDEN) for name in "qkv"}
    after = apply(fuse_attention, build(attention(order=merged), inputs))
    assert calls(after, Attention) == []
    assert len(after.notes) == 1


def test_softmax_over_queries_is_no_attention():
    body = attention(softmax=lambda scores: OP.nn.softmax(scores, axis=2))
    after = apply(fuse_attention, build(body, QKV))
    assert "nn.softmax" in operators(after)
    assert calls(after, Attention) == []


def test_grouped_queries_are_left_alone():
    """Fewer heads of keys and values than of queries."""

    def body(emit, q, k, v):
        def one_head(t, axes):
            whole = emit(OP.permute_dims(emit(OP.reshape(t, (3, 5, 1, SIZE))), axes))
            return whole

        scores = emit(OP.matmul(split(emit, q), one_head(k, [0, 2, 3, 1])))
        weights = emit(OP.nn.softmax(scores))
        return merge(emit, emit(OP.matmul(weights, one_head(v, [0, 2, 1, 3]))), q.ty.shape)

    inputs = {"q": (3, 5, HIDDEN), "k": (3, 5, SIZE), "v": (3, 5, SIZE)}
    after = apply(fuse_attention, build(body, inputs))
    assert calls(after, Attention) == []
    assert "different heads" in after.notes[0]
