"""Which keys some queries see, found in the mask at run time.

A causal mask hides half of all keys, a window most, and a padded batch the ends of its texts. What
is hidden from all queries that are computed together has no weight, so it need not be computed.
The search comes from both ends and stops at the first keys that are seen: of most masks it looks at
nothing but what is hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.attention_operands import LOWEST, Mask, mask_at
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
"""A key with this or less in the mask has no weight beside one with more: 0, or e**-87 in bf16."""


@dataclass(frozen=True)
class MaskedKeys:
    """The keys of some heads, and what may hide them.

    Attributes
    ----------
    heads : int
        Heads of the queries.
    rows, tiles : int or expression
        Keys of each leading index, and groups of ``LANES`` of them.
    form : Mask or None
        What the mask tells apart.
    mask : Buffer or None
        The mask itself.
    """

    heads: int
    rows: Expr
    tiles: Expr
    form: Mask | None
    mask: Buffer | None

    def added(self, lead: Expr, head: Expr, tile: Expr, key: Expr, lanes: Expr) -> Expr:
        """The mask of one key for the query, or the queries, in some lanes of a tile."""
        assert self.form is not None
        return mask_at(self.mask, self.form, lead, head, self.heads, tile, key, lanes)


def visible_tiles(
    keys: MaskedKeys,
    lead: Expr,
    head: Expr,
    vectors: TileVectors,
    simd: Simd,
) -> tuple[Expr, Expr]:
    """The first group of ``LANES`` keys that any of the queries sees, and the one behind the last.

    All groups, where there is no mask of keys, or a query sees none: its weights are what they are.
    """
    if keys.form is None or not keys.form.keys:
        return 0, keys.tiles
    if keys.form.queries:
        return _seen_by_some(keys, lead, head, vectors, simd)
    return _seen_by_all(keys, lead, head)


def _seen_by_all(keys: MaskedKeys, lead: Expr, head: Expr) -> tuple[Expr, Expr]:
    """The same for a mask that tells no query from another, key by key."""
    rows, any_query = scalar(keys.rows), tirx.const(0, "int32")
    place, first, stop = local(2, "int32"), [0], [1]

    def hidden(key: Expr) -> Expr:
        return keys.added(lead, head, 0, key, any_query) <= T.float32(_HIDDEN)

    T.buffer_store(place, 0, first)
    T.buffer_store(place, rows, stop)
    # Both sides of a condition are computed, so that one must not read behind the last key.
    with T.While(tirx.all(place[0] < rows, hidden(tirx.min(place[0], rows - 1)))):
        T.buffer_store(place, place[0] + 1, first)
    with T.If(place[0] == rows):
        with T.Then():
            T.buffer_store(place, 0, first)
        with T.Else(), T.While(hidden(place[1] - 1)):
            T.buffer_store(place, place[1] - 1, stop)
    return place[0] // LANES, (place[1] + (LANES - 1)) // LANES


def _seen_by_some(
    keys: MaskedKeys, lead: Expr, head: Expr, vectors: TileVectors, simd: Simd
) -> tuple[Expr, Expr]:
    """The same for a mask with queries, group by group of keys."""
    everything = scalar(keys.tiles)
    place, first, stop, current = local(3, "int32"), [0], [1], [2]
    here, seen = (Registers(1, vectors.count, simd) for _ in range(2))

    def look() -> None:
        """Find which queries see a key of the tile."""
        here.fill(lambda row, vector: zero(simd))
        with T.serial(0, tirx.min(LANES, scalar(keys.rows) - place[2] * LANES)) as i:
            for v in range(vectors.count):
                tile, lanes = vectors.at(v)
                added = keys.added(lead, head, tile, place[2] * LANES + i, lanes)
                # Padding may be NaN, which compares as hidden.
                shown = tirx.Select(
                    added > splat(T.float32(_HIDDEN), simd), splat(T.float32(1), simd), zero(simd)
                )
                here.set(0, v, tirx.max(here.get(0, v), shown))

    for number, start in ((first, everything), (stop, everything), (current, 0)):
        T.buffer_store(place, start, number)
    seen.fill(lambda row, vector: zero(simd))
    with T.While(tirx.all(place[2] < everything, _combined(seen, tirx.min, simd) == 0)):
        look()
        seen.fill(lambda row, v: tirx.max(seen.get(0, v), here.get(0, v)))
        with T.If(_combined(here, tirx.max, simd) > 0), T.Then():
            T.buffer_store(place, tirx.min(place[0], place[2]), first)
        T.buffer_store(place, place[2] + 1, current)
    with T.If(_combined(seen, tirx.min, simd) == 0):
        with T.Then():
            T.buffer_store(place, 0, first)
        with T.Else():
            front = scalar(place[2])
            T.buffer_store(place, everything, current)
            here.fill(lambda row, vector: zero(simd))
            with T.While(tirx.all(place[2] > front, _combined(here, tirx.max, simd) == 0)):
                T.buffer_store(place, place[2] - 1, current)
                look()
            found = T.Cast("int32", _combined(here, tirx.max, simd) > 0)
            T.buffer_store(place, place[2] + found, stop)
    return place[0], place[1]


def _combined(registers: Registers, combine: Expr, simd: Simd) -> Expr:
    """All lanes of all vectors, combined."""
    values = [registers.get(0, v) for v in range(registers.vectors)]
    return joined(reduce(combine, values), simd.lanes, combine)
