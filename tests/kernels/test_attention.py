"""Attention against NumPy: any sizes, masks, CPU and thread count, in tiles or by heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
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

from sparse_tvm.schedules.cpu.attention import attention
from sparse_tvm.schedules.cpu.attention_blocks import (
    KEYS,
    MOST_TILES,
    check_blocks,
    offered_blocks,
    usual_blocks,
)
from sparse_tvm.schedules.cpu.attention_operands import AttentionProblem, ByHeads, InTiles, Mask
from sparse_tvm.schedules.cpu.lane_tiles import Tiles, symbol

LOWEST = np.finfo(np.float32).min
IN_TILES, BY_HEADS = (False,) * 3, (True,) * 3

lengths = st.one_of(st.sampled_from([1, 8, 9, 15, 16, 17, 33]), st.integers(1, 50))
sizes = st.one_of(st.sampled_from([16, 32, 80]), st.integers(1, 21))
problems = st.fixed_dictionaries(
    {
        "lead": st.integers(1, 3),
        "queries": lengths,
        "keys": lengths,
        "key_heads": st.integers(1, 3),
        "shared": st.integers(1, 3),
        "size": sizes,
        "value_size": sizes,
        "mask": st.none() | st.builds(Mask, *[st.booleans()] * 4),
        "low": st.sampled_from([-1e4, -math.inf, LOWEST]),
        "dropped": st.sampled_from([0.2, 0.6, 1.0]),
        "by_heads": st.sampled_from([IN_TILES, BY_HEADS]) | st.tuples(*[st.booleans()] * 3),
        "symbolic": st.booleans(),
        "choice": st.none() | st.integers(0, 9),
        "threads": thread_counts,
        "seed": st.integers(0, 2**16),
    }
)


def split(t, heads):
    return t.reshape(*t.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def reference(q, k, v, scale, mask):
    """q, k and v by heads, in float64, but scores and mask are added in float32.

    A query without keys gives zeros.
    """
    k, v = (np.repeat(t, q.shape[1] // t.shape[1], axis=1) for t in (k, v))
    scores = (q @ k.swapaxes(2, 3) * np.float32(scale)).astype("float32")
    scores = np.broadcast_to(scores if mask is None else scores + mask, scores.shape)
    scores = scores.astype("float64")
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    return (weights @ v).transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


def operand(x, heads, by_heads, lead, symbolic, name):
    """Where a kernel finds ``[lead, rows, features]``, and the array that it is given."""
    rows, size = x.shape[1], x.shape[2] // heads
    if by_heads:
        place = ByHeads(lead, symbol(name) if symbolic else rows, heads, size)
        return place, np.ascontiguousarray(split(x, heads))
    tiles = Tiles(lead, tiles_for(x.shape[0], rows, symbolic).per_lead)
    return InTiles(tiles, heads, size), to_tiles(x)


@given(problem=problems)
@example(
    problem={
        "lead": 2,
        "queries": 33,
        "keys": 17,
        "key_heads": 2,
        "shared": 1,
        "size": 7,
        "value_size": 5,
        "mask": Mask(lead=True, heads=False, queries=True, keys=True),
        "low": -math.inf,
        "dropped": 1.0,
        "by_heads": IN_TILES,
        "symbolic": True,
        "choice": 2,
        "threads": 2,
        "seed": 0,
    }
)
@PER_FORM
@every_form
def test_attention(target, problem):
    check(target=target, **problem)


@pytest.mark.parametrize("symbolic", [False, True], ids=["known", "symbolic"])
@pytest.mark.parametrize("queries", [1, 3, 8, 9])
@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "masked"])
@every_form
def test_a_few_queries_of_a_cache(target, masked, queries, symbolic):
    mask = Mask(lead=True, heads=False, queries=True, keys=True) if masked else None
    check(
        lead=2,
        queries=queries,
        keys=37,
        key_heads=2,
        shared=3,
        size=64,
        value_size=48,
        mask=mask,
        low=LOWEST,
        dropped=0.6,
        by_heads=BY_HEADS,
        symbolic=symbolic,
        target=target,
        threads=2,
        seed=queries,
    )


def check(
    lead,
    queries,
    keys,
    key_heads,
    shared,
    size,
    value_size,
    mask,
    low,
    dropped,
    by_heads,
    symbolic,
    target,
    threads,
    seed,
    choice=None,
):
    """``choice`` is the number of one of the blocks that are offered, None for the usual ones."""
    rng = np.random.default_rng(seed)
    heads = key_heads * shared
    rows = (queries, keys, keys)
    counts = (heads, key_heads, key_heads)
    features = (heads * size, key_heads * size, key_heads * value_size)
    qkv = [
        rng.standard_normal((lead, *extents)).astype("float32")
        for extents in zip(rows, features, strict=True)
    ]
    scale = size**-0.5
    of_result = tiles_for(lead, queries, symbolic)
    names = ("q_rows", "k_rows", "v_rows")
    found = zip(qkv, counts, by_heads, names, strict=True)
    places, arguments = zip(
        *(operand(x, n, by, of_result.lead, symbolic, name) for x, n, by, name in found),
        strict=True,
    )
    arguments = list(arguments)
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
    counts_queries = by_heads[1] and by_heads[2]
    numbers = [keys, queries] if counts_queries else [keys]
    if symbolic:
        arguments += numbers
        numbers = [symbol("key_rows"), symbol("query_rows")][: len(numbers)]
    problem = AttentionProblem(
        *places, of_result, numbers[1] if counts_queries else None, numbers[0], scale, mask
    )
    blocks = None if choice is None else offered(target)[choice % len(offered(target))]
    kernel = attention(problem, simd(target), blocks)
    out_shape = (lead, -(-queries // 16), heads * value_size, 16)
    tiled = run(kernel, target, threads, arguments, out_shape)
    with np.errstate(invalid="ignore", over="ignore"):
        parts = [split(x, n) for x, n in zip(qkv, (heads, key_heads, key_heads), strict=True)]
        expected = reference(*parts, scale, added)
    # Float32 has steps of a thousandth where every score of a query is about -1e4.
    coarse = added is not None and low == -1e4 and (added.max(axis=-1) < -1e3).any()
    atol = 2e-3 if coarse else 5e-6
    np.testing.assert_allclose(from_tiles(tiled, queries), expected, rtol=0, atol=atol)


def offered(target):
    return offered_blocks(simd(target), KEYS, MOST_TILES, None)


@pytest.mark.parametrize("by_heads", [IN_TILES, BY_HEADS], ids=["in tiles", "by heads"])
@every_form
def test_all_blocks_that_are_offered(target, by_heads):
    """Seven tiles of queries are no multiple of two, three or four; 37 keys end within a block."""
    for choice in range(len(offered(target))):
        check(
            lead=2,
            queries=7 * 16 - 5,
            keys=37,
            key_heads=2,
            shared=1,
            size=21,
            value_size=13,
            mask=Mask(lead=True, heads=False, queries=True, keys=True),
            low=LOWEST,
            dropped=0.6,
            by_heads=by_heads,
            symbolic=choice % 2 == 0,
            target=target,
            threads=2,
            seed=choice,
            choice=choice,
        )


@every_form
def test_blocks_are_offered_once_and_fit(target):
    unit = simd(target)
    found = offered(target)
    assert len(set(found)) == len(found) >= 1
    assert usual_blocks(unit) in offered_blocks(unit, KEYS, MOST_TILES, 1)
    assert all(tiles == 1 for _, tiles in offered_blocks(unit, KEYS, MOST_TILES, 1))
    for blocks in [*found, usual_blocks(unit)]:
        check_blocks(blocks, unit)


@pytest.mark.parametrize("blocks", [(25, 1), (16, 4), (0, 1), (4, -1)])
@every_form
def test_blocks_beyond_the_registers_are_refused(target, blocks):
    rows = InTiles(Tiles(1, 2), 2, 8)
    problem = AttentionProblem(rows, rows, rows, Tiles(1, 2), None, 20, 0.5, None)
    with pytest.raises(ValueError, match=f"blocks of {blocks[0]} keys x {blocks[1]} tiles"):
        attention(problem, simd(target), blocks)


def test_causal_mask():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 20, 16)).astype("float32") for _ in range(3))
    mask = np.where(np.tri(20, dtype=bool), 0, LOWEST).astype("float32")[None, None]
    target = PORTABLE
    tiles = tiles_for(1, 20, symbolic=False)
    form = Mask(lead=False, heads=False, queries=True, keys=True)
    rows = InTiles(tiles, 2, 8)
    problem = AttentionProblem(rows, rows, rows, tiles, None, 20, 0.5, form)
    kernel = attention(problem, simd(target))
    arguments = [*map(to_tiles, (q, k, v)), to_tiles(mask[0])]
    tiled = run(kernel, target, 1, arguments, (1, 2, 16, 16))
    expected = reference(*(split(x, 2) for x in (q, k, v)), 0.5, mask)
    np.testing.assert_allclose(from_tiles(tiled, 20), expected, rtol=0, atol=5e-6)
    np.testing.assert_allclose(from_tiles(tiled, 20)[0, 0], v[0, 0], atol=1e-6)


SHOWN = {
    "causal": lambda query, key: key <= query,
    "after a cache": lambda query, key: key <= query + 40,
    "window": lambda query, key: abs(key - query) <= 9,
    "causal, but some without keys": lambda query, key: (key <= query) & (query > 20),
    "padded on both ends": lambda query, key: (key >= 35) & (key < 60) & (query >= 0),
    "nothing": lambda query, key: (key < 0) & (query < 0),
}


@pytest.mark.parametrize("queries", [64, 70])
@pytest.mark.parametrize("by_heads", [IN_TILES, BY_HEADS], ids=["in tiles", "by heads"])
@every_form
def test_hidden_keys(target, by_heads, queries):
    """Attention to what masks show; what they hide from all queries of a tile is not even read."""
    keys, heads, size, lows = 90, 2, 8, (LOWEST, -math.inf)
    key, query = np.arange(keys)[None], np.arange(queries)[:, None]
    seen = np.stack([np.broadcast_to(f(query, key), (queries, keys)) for f in SHOWN.values()] * 2)
    low = np.repeat(np.float32(lows), len(SHOWN))[:, None, None]
    rng, lead = np.random.default_rng(0), len(seen)
    q, k, v = (
        rng.standard_normal((lead, n, heads * size)).astype("float32")
        for n in (queries, keys, keys)
    )
    mask = np.where(seen, rng.standard_normal(seen.shape), low).astype("float32")[:, None]
    with np.errstate(invalid="ignore"):
        expected = reference(*(split(x, heads) for x in (q, k, v)), 0.5, mask)
    whole_tiles = queries % 16 == 0  # beside padding, all keys are read
    for i in np.flatnonzero(seen.any(axis=2).all(axis=1) & whole_tiles):
        groups = np.pad(seen[i].any(axis=0), (0, -keys % 16)).reshape(-1, 16).any(axis=1)
        v[i, ~np.repeat(groups, 16)[:keys]] = np.nan
    assert np.isnan(v).any() == whole_tiles
    tiles = tiles_for(lead, queries, symbolic=False)
    found = zip((q, k, v), by_heads, strict=True)
    places, arguments = zip(
        *(operand(x, heads, by, lead, False, "") for x, by in found), strict=True
    )
    form = Mask(lead=True, heads=False, queries=True, keys=True)
    known = queries if by_heads == BY_HEADS else None
    problem = AttentionProblem(*places, tiles, known, keys, 0.5, form)
    kernel, out_shape = attention(problem, simd(target)), (lead, -(-queries // 16), 16, 16)
    tiled = run(kernel, target, 1, [*arguments, to_tiles(mask[:, 0])], out_shape)
    np.testing.assert_allclose(from_tiles(tiled, queries), expected, rtol=0, atol=5e-6)
