"""Attention in bf16 against NumPy, on matrix units and by dot products: sizes, masks, threads."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from harness import KERNELS, PORTABLE, from_tiles, run, simd, thread_counts, tiles_for, to_tiles
from hypothesis import example, given, settings
from hypothesis import strategies as st
from low_precision import ANY, TILE_TARGETS, from_lines, rounded, runnable, to_lines
from test_attention import LOWEST, SHOWN, reference, split

from sparse_tvm.schedules.cpu.attention_blocks import DOT_KEYS, MOST_DOT_TILES, offered_blocks
from sparse_tvm.schedules.cpu.attention_operands import Mask
from sparse_tvm.schedules.cpu.bf16_attention import Bf16Attention
from sparse_tvm.schedules.cpu.bf16_dot import plain_bf16_dot, with_code
from sparse_tvm.schedules.cpu.dot_attention import dot_attention
from sparse_tvm.schedules.cpu.lane_tiles import Tiles
from sparse_tvm.schedules.cpu.precision import BF16, INT8
from sparse_tvm.schedules.x86.instructions import CODE, vdpbf16ps
from sparse_tvm.schedules.x86.tile_attention import tile_attention
from sparse_tvm.schedules.x86.units import AVX512_BF16


def on(unit):
    """Builds the kernel for a kind of matrix unit."""
    return lambda problem, simd: tile_attention(problem, simd, unit())


def by_vdpbf16ps(problem, simd, blocks=None):
    return with_code(dot_attention(problem, simd, vdpbf16ps, blocks), CODE[AVX512_BF16.name])


def by_plain_dot(problem, simd, blocks=None):
    return dot_attention(problem, simd, plain_bf16_dot, blocks)


NATIVE = [(on(unit), target) for unit, target in TILE_TARGETS]
NATIVE += [(by_plain_dot, target) for target in (ANY, PORTABLE)]
NATIVE += [(by_vdpbf16ps, target) for target in [runnable(AVX512_BF16.features)] if target]
FEW = settings(KERNELS, max_examples=10)
lengths = st.one_of(st.sampled_from([1, 15, 16, 17, 32, 33, 128]), st.integers(1, 150))
problems = st.fixed_dictionaries(
    {
        "lead": st.integers(1, 2),
        "queries": lengths,
        "keys": lengths,
        "heads": st.integers(1, 3),
        "head_size": st.sampled_from([32, 64]),
        "value_size": st.sampled_from([32, 64]),
        "mask": st.none() | st.builds(Mask, *[st.booleans()] * 4),
        "low": st.sampled_from([-1e4, -math.inf, LOWEST]),
        "dropped": st.sampled_from([0.2, 0.6, 1.0]),
        "out": st.sampled_from([None, BF16, INT8]),
        "symbolic": st.booleans(),
        "native": st.sampled_from(NATIVE),
        "threads": thread_counts,
        "seed": st.integers(0, 2**16),
    }
)
LARGER = {
    "lead": 2,
    "queries": 150,
    "keys": 77,
    "heads": 3,
    "head_size": 64,
    "value_size": 32,
    "mask": None,
    "low": -1e4,
    "dropped": 0.2,
    "out": None,
    "symbolic": True,
    "threads": 2,
    "seed": 0,
}


def check(case):
    rng = np.random.default_rng(case["seed"])
    lead, queries, keys, heads = (case[name] for name in ("lead", "queries", "keys", "heads"))
    mask = case["mask"]

    def random(rows, size):
        x = rng.standard_normal((lead, rows, heads * size)).astype("float32")
        return rounded(x, BF16)

    q, k = random(queries, case["head_size"]), random(keys, case["head_size"])
    v = random(keys, case["value_size"])
    added = None
    if mask is not None:
        real = (mask.lead, mask.heads, mask.queries, mask.keys)
        extents = (lead, heads, queries, keys)
        shape = [n if is_real else 1 for n, is_real in zip(extents, real, strict=True)]
        dropped = rng.random(shape) < case["dropped"]
        added = np.where(dropped, case["low"], rng.standard_normal(shape)).astype("float32")
    compare(case, q, k, v, added, unread=False)


def compare(case, q, k, v, added, unread):
    """Attention against NumPy, with values of NaN for the keys that are not to be read."""
    lead, queries, keys, heads = (case[name] for name in ("lead", "queries", "keys", "heads"))
    mask, out = case["mask"], case["out"]
    arguments = [to_lines(x, BF16) for x in (q, k, np.where(unread, np.float32(np.nan), v))]
    if mask is not None:
        merged = added.reshape(-1, *added.shape[2:])
        arguments.append(to_tiles(merged) if mask.queries else added)
    if case["symbolic"]:
        arguments.append(keys)
    build, target = case["native"]
    over_queries = tiles_for(lead, queries, case["symbolic"])
    problem = Bf16Attention(
        over_queries,
        Tiles(over_queries.lead, tiles_for(lead, keys, case["symbolic"]).per_lead),
        None if case["symbolic"] else keys,
        heads,
        case["head_size"],
        case["value_size"],
        case["head_size"] ** -0.5,
        mask,
        out,
    )
    kernel = build(problem, simd(target))
    features, tiles = heads * case["value_size"], -(-queries // 16)
    if out is None:
        tiled = run(kernel, target, case["threads"], arguments, (lead, tiles, features, 16))
        result = from_tiles(tiled, queries)
    else:
        shape = (lead, tiles, out.lines(features), 16)
        lines = run(kernel, target, case["threads"], arguments, shape, "int32")
        result = from_lines(lines, queries, features, out, simd(target).zero_point)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = reference(*(split(x, heads) for x in (q, k, v)), problem.scale, added)
    quantum = {None: 0.0, BF16: 2.0**-8, INT8: 0.51 / 127}[out]
    np.testing.assert_allclose(result, expected, rtol=0, atol=(2.0**-8 + quantum) * np.abs(v).max())


@given(problems)
@example(
    {
        **LARGER,
        "mask": Mask(lead=True, heads=True, queries=True, keys=True),
        "low": -math.inf,
        "dropped": 1.0,
        "native": NATIVE[-1],
    }
)
@FEW
def test_bf16_attention(case):
    check(case)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("out", [None, BF16, INT8])
def test_many_tiles(native, out):
    check({**LARGER, "native": native, "out": out})


@pytest.mark.parametrize("per_query", [True, False], ids=["for queries", "for all"])
@pytest.mark.parametrize("queries", [160, 150])
@pytest.mark.parametrize("native", NATIVE)
def test_hidden_keys(native, queries, per_query):
    """Attention to what masks show; tiles of values hidden from all queries are not even read."""
    keys, rng, size = 139, np.random.default_rng(0), LARGER["value_size"]
    key, query = np.arange(keys)[None], np.arange(queries)[:, None]
    shown = {**SHOWN, "padded at the end": lambda query, key: (key < 67) & (query >= 0)}
    seen = [np.broadcast_to(f(query, key), (queries, keys)) for f in shown.values()]
    mask = Mask(lead=True, heads=False, queries=per_query, keys=True)
    for low, symbolic in (LOWEST, True), (-math.inf, False):
        case = {**LARGER, "lead": len(seen), "heads": 2, "head_size": 32, "mask": mask}
        case |= {"queries": queries, "keys": keys, "symbolic": symbolic, "native": native}
        q, k, v = (
            rounded(rng.standard_normal((len(seen), rows, 2 * size)).astype("float32"), BF16)
            for rows in (queries, keys, keys)
        )
        real = np.stack(seen)[:, None] if per_query else np.stack(seen)[:, None, 30:31]
        added = np.where(real, rng.standard_normal(real.shape), low).astype("float32")
        # Beside a query without any key, and beside padding, all keys are read.
        spared = real.any(axis=3).all(axis=(1, 2)) & (queries % 16 == 0 or not per_query)
        groups = np.pad(real.any(axis=(1, 2)), ((0, 0), (0, -keys % 32)))
        read = np.repeat(groups.reshape(len(seen), -1, 32).any(axis=2), 32, axis=1)[:, :keys]
        unread = spared[:, None] & ~read
        assert unread.any() == spared.any()
        compare(case, q, k, v, added, unread[:, :, None])


@pytest.mark.parametrize(
    "native", [one for one in NATIVE if one[0] in (by_plain_dot, by_vdpbf16ps)]
)
def test_all_blocks_that_are_offered(native):
    build, target = native
    for blocks in offered_blocks(simd(target), DOT_KEYS, MOST_DOT_TILES, None):
        check({**LARGER, "native": (partial(build, blocks=blocks), target)})


@pytest.mark.parametrize(("blocks", "why"), [((3, 1), "do not divide"), ((16, 2), "registers")])
def test_blocks_that_fit_no_tile_or_no_registers_are_refused(blocks, why):
    one, unit = Tiles(1, 2), simd(PORTABLE)
    problem = Bf16Attention(one, one, 20, 1, 32, 32, 0.5)
    with pytest.raises(ValueError, match=why if unit.fits(3, unit.per_tile) else "registers"):
        by_plain_dot(problem, unit, blocks)
