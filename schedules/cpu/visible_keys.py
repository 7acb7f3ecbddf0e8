"""Which keys some queries see, found in the mask at run time.

A causal mask hides half of all keys, a window most, and a padded batch the ends of its texts. What
is hidden from all queries that are computed together has weight 0, so it need not be computed.
The search comes from both ends and stops at the first keys that are seen: of most masks it looks at
nothing but what is hidden.
"""

from __future__ import annotations

from functools import reduce

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.attention_operands import LOWEST, AttentionProblem, mask_at
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    TileVectors,
    local,
    scalar,
    splat,
    zero,
)
from sparse_tvm.schedules.cpu.loops import joined
from sparse_tvm.schedules.cpu.simd import LANES, Simd

_HIDDEN = LOWEST / 2
"""A key with this or less in the mask has weight exactly 0 beside one with more."""


def visible_tiles(
    problem: AttentionProblem,
    mask: Buffer | None,
    lead: Expr,
    head: Expr,
    vectors: TileVectors,
    simd: Simd,
) -> tuple[Expr, Expr]:
    """The first group of ``LANES`` keys that any of the queries sees, and the one behind the last.

    All groups, where there is no mask of keys, or a query sees none: its weights are what they are.
    """
    if mask is None or problem.mask is None or not problem.mask.keys:
        return 0, problem.key_tiles
    if problem.mask.queries:
        return _seen_by_some(problem, mask, lead, head, vectors, simd)
    return _seen_by_all(problem, mask, lead, head)


def _seen_by_all(
    problem: AttentionProblem, mask: Buffer, lead: Expr, head: Expr
) -> tuple[Expr, Expr]:
    """The same for a mask that tells no query from another, key by key."""
    assert problem.mask is not None
    form, keys, any_query = problem.mask, scalar(problem.key_rows), tirx.const(0, "int32")
    place, first, stop = local(2, "int32"), [0], [1]

    def hidden(key: Expr) -> Expr:
        of_query = (problem.heads, 0, key, any_query)
        return mask_at(mask, form, lead, head, *of_query) <= T.float32(_HIDDEN)

    T.buffer_store(place, 0, first)
    T.buffer_store(place, keys, stop)
    # Both sides of a condition are computed, so that one must not read behind the last key.
    with T.While(tirx.all(place[0] < keys, hidden(tirx.min(place[0], keys - 1)))):
        T.buffer_store(place, place[0] + 1, first)
    with T.If(place[0] == keys):
        with T.Then():
            T.buffer_store(place, 0, first)
        with T.Else(), T.While(hidden(place[1] - 1)):
            T.buffer_store(place, place[1] - 1, stop)
    return place[0] // LANES, (place[1] + (LANES - 1)) // LANES


def _seen_by_some(
    problem: AttentionProblem,
    mask: Buffer,
    lead: Expr,
    head: Expr,
    vectors: TileVectors,
    simd: Simd,
) -> tuple[Expr, Expr]:
    """The same for a mask with queries, group by group of keys."""
    assert problem.mask is not None
    form, everything = problem.mask, scalar(problem.key_tiles)
    place, first, stop, tile = local(3, "int32"), [0], [1], [2]
    here, seen = (Registers(1, vectors.count, simd) for _ in range(2))

    def look() -> None:
        """Find which queries see a key of the tile."""
        here.fill(lambda row, vector: zero(simd))
        with T.serial(0, tirx.min(LANES, scalar(problem.key_rows) - place[2] * LANES)) as i:
            for v in range(vectors.count):
                of_query = (problem.heads, vectors.at(v)[0], place[2] * LANES + i, vectors.at(v)[1])
                added = mask_at(mask, form, lead, head, *of_query)
                # Padding may be NaN, which compares as hidden.
                shown = tirx.Select(
                    added > splat(T.float32(_HIDDEN), simd), splat(T.float32(1), simd), zero(simd)
                )
                here.set(0, v, tirx.max(here.get(0, v), shown))

    for number, start in ((first, everything), (stop, everything), (tile, 0)):
        T.buffer_store(place, start, number)
    seen.fill(lambda row, vector: zero(simd))
    with T.While(tirx.all(place[2] < everything, _combined(seen, tirx.min, simd) == 0)):
        look()
        seen.fill(lambda row, v: tirx.max(seen.get(0, v), here.get(0, v)))
        with T.If(_combined(here, tirx.max, simd) > 0), T.Then():
            T.buffer_store(place, tirx.min(place[0], place[2]), first)
        T.buffer_store(place, place[2] + 1, tile)
    with T.If(_combined(seen, tirx.min, simd) == 0):
        with T.Then():
            T.buffer_store(place, 0, first)
        with T.Else():
            front = scalar(place[2])
            T.buffer_store(place, everything, tile)
            here.fill(lambda row, vector: zero(simd))
            with T.While(tirx.all(place[2] > front, _combined(here, tirx.max, simd) == 0)):
                T.buffer_store(place, place[2] - 1, tile)
                look()
            found = T.Cast("int32", _combined(here, tirx.max, simd) > 0)
            T.buffer_store(place, place[2] + found, stop)
    return place[0], place[1]


def _combined(registers: Registers, combine: Expr, simd: Simd) -> Expr:
    """All lanes of all vectors, combined."""
    values = [registers.get(0, v) for v in range(registers.vectors)]
    return joined(reduce(combine, values), simd.lanes, combine)
