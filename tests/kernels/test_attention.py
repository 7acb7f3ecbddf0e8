"""The attention kernel against NumPy: any sizes, masks, CPU and thread count."""

from __future__ import annotations

import math

import numpy as np
from harness import (
    PER_FORM,
    PORTABLE,
    every_form,
    from_tiles,
    run,
    simd,
    thread_counts,
    tiles_for,
    to_tiles,
)
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_tvm.schedules.cpu.attention import Mask, attention
from sparse_tvm.schedules.cpu.lane_tiles import Tiles

LOWEST = np.finfo(np.float32).min

lengths = st.one_of(st.sampled_from([1, 15, 16, 17, 33]), st.integers(1, 50))
problems = st.fixed_dictionaries(
    {
        "lead": st.integers(1, 3),
        "queries": lengths,
        "keys": lengths,
        "heads": st.integers(1, 3),
        "head_size": st.integers(1, 21),
        "value_size": st.integers(1, 21),
        "mask": st.none() | st.builds(Mask, *[st.booleans()] * 4),
        "low": st.sampled_from([-1e4, -math.inf, LOWEST]),
        "dropped": st.sampled_from([0.2, 0.6, 1.0]),
        "symbolic": st.booleans(),
        "threads": thread_counts,
        "seed": st.integers(0, 2**16),
    }
)


def reference(q, k, v, heads, scale, mask):
    """float64, but scores and mask are added in float32; a query without keys gives zeros."""

    def split(t):
        return t.reshape(*t.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    scores = (split(q) @ split(k).swapaxes(2, 3) * np.float32(scale)).astype("float32")
    scores = np.broadcast_to(scores if mask is None else scores + mask, scores.shape)
    scores = scores.astype("float64")
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    return (weights @ split(v)).transpose(0, 2, 1, 3).reshape(*q.shape[:2], -1)


@given(problem=problems)
@example(
    problem={
        "lead": 2,
        "queries": 33,
        "keys": 17,
        "heads": 2,
        "head_size": 7,
        "value_size": 5,
        "mask": Mask(lead=True, heads=False, queries=True, keys=True),
        "low": -math.inf,
        "dropped": 1.0,
        "symbolic": True,
        "threads": 2,
        "seed": 0,
    }
)
@PER_FORM
@every_form
def test_attention(target, problem):
    check(target=target, **problem)


def check(
    lead,
    queries,
    keys,
    heads,
    head_size,
    value_size,
    mask,
    low,
    dropped,
    symbolic,
    target,
    threads,
    seed,
):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((lead, queries, heads * head_size)).astype("float32")
    k = rng.standard_normal((lead, keys, heads * head_size)).astype("float32")
    v = rng.standard_normal((lead, keys, heads * value_size)).astype("float32")
    scale = head_size**-0.5
    arguments = [to_tiles(q), to_tiles(k), to_tiles(v)]
    added = None
    if mask is not None:
        real = (mask.lead, mask.heads, mask.queries, mask.keys)
        shape = [
            n if is_real else 1
            for n, is_real in zip((lead, heads, queries, keys), real, strict=True)
        ]
        added = np.where(rng.random(shape) < dropped, low, rng.standard_normal(shape))
        added = added.astype("float32")
        merged = added.reshape(-1, *added.shape[2:])
        arguments.append(to_tiles(merged) if mask.queries else added)
    if symbolic:
        arguments.append(keys)

    over_queries = tiles_for(lead, queries, symbolic)
    over_keys = Tiles(over_queries.lead, tiles_for(lead, keys, symbolic).per_lead)
    kernel = attention(
        over_queries,
        over_keys,
        None if symbolic else keys,
        heads,
        head_size,
        value_size,
        scale,
        mask,
        simd(target),
    )
    out_shape = (lead, -(-queries // 16), heads * value_size, 16)
    tiled = run(kernel, target, threads, arguments, out_shape)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = reference(q, k, v, heads, scale, added)
    np.testing.assert_allclose(from_tiles(tiled, queries), expected, rtol=0, atol=5e-6)


def test_causal_mask():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 20, 16)).astype("float32") for _ in range(3))
    mask = np.where(np.tri(20, dtype=bool), 0, LOWEST).astype("float32")[None, None]
    target = PORTABLE
    tiles = tiles_for(1, 20, symbolic=False)
    form = Mask(lead=False, heads=False, queries=True, keys=True)
    kernel = attention(tiles, tiles, 20, 2, 8, 8, 0.5, form, simd(target))
    arguments = [*map(to_tiles, (q, k, v)), to_tiles(mask[0])]
    tiled = run(kernel, target, 1, arguments, (1, 2, 16, 16))
    np.testing.assert_allclose(
        from_tiles(tiled, 20), reference(q, k, v, 2, 0.5, mask), rtol=0, atol=5e-6
    )
    np.testing.assert_allclose(from_tiles(tiled, 20)[0, 0], v[0, 0], atol=1e-6)
