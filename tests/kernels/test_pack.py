"""Into lane tiles and back, and onto a cache: padding is zero, and nothing is lost."""

from __future__ import annotations

import numpy as np
from harness import PER_FORM, every_form, from_tiles, run, simd, thread_counts, to_tiles
from hypothesis import given
from hypothesis import strategies as st

from sparse_tvm.schedules.cpu.append import append_rows
from sparse_tvm.schedules.cpu.lane_tiles import symbol
from sparse_tvm.schedules.cpu.pack import pack, unpack

problems = {
    "lead": st.integers(1, 4),
    "rows": st.integers(1, 70),
    "features": st.integers(1, 70),
    "symbolic": st.sets(st.sampled_from(["lead", "rows", "features"])),
    "threads": thread_counts,
}


def extents(symbolic, **sizes):
    return [symbol(name) if name in symbolic else size for name, size in sizes.items()]


@given(**problems)
@PER_FORM
@every_form
def test_pack(target, lead, rows, features, symbolic, threads):
    x = np.random.default_rng(rows).standard_normal((lead, rows, features)).astype("float32")
    kernel = pack(*extents(symbolic, lead=lead, rows=rows, features=features))
    tiled = run(kernel, target, threads, [x], (lead, -(-rows // 16), features, 16))
    np.testing.assert_array_equal(tiled, np.nan_to_num(to_tiles(x)))


@given(**problems)
@PER_FORM
@every_form
def test_unpack(target, lead, rows, features, symbolic, threads):
    x = np.random.default_rng(rows).standard_normal((lead, rows, features)).astype("float32")
    kernel = unpack(*extents(symbolic, lead=lead, rows=rows, features=features))
    logical = run(kernel, target, threads, [to_tiles(x)], x.shape)
    np.testing.assert_array_equal(logical, x)
    np.testing.assert_array_equal(from_tiles(to_tiles(x), rows), x)


@given(
    lead=st.integers(1, 3),
    rows=st.lists(st.sampled_from([0, 1, 255, 256, 257, 600]), min_size=1, max_size=3),
    size=st.sampled_from([16, 48]),
    symbolic=st.booleans(),
    threads=thread_counts,
)
@PER_FORM
@every_form
def test_append_rows(target, lead, rows, size, symbolic, threads):
    rows = [*rows, 1]  # an output without rows is no output
    rng = np.random.default_rng(lead)
    parts = [rng.standard_normal((lead, count, size)).astype("float32") for count in rows]
    counts = [symbol(f"rows_{i}") for i in range(len(rows))] if symbolic else rows
    kernel = append_rows(symbol("lead") if symbolic else lead, counts, size, simd(target))
    joined = run(kernel, target, threads, parts, (lead, sum(rows), size))
    np.testing.assert_array_equal(joined, np.concatenate(parts, axis=1))
