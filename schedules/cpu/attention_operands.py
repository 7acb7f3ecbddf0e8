"""Where attention finds q, k and v: as layers leave them, or by heads, as a cache keeps them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from sparse_tvm.schedules.cpu.lane_tiles import Buffer, Expr, Tiles, argument, broadcast, symbol
from sparse_tvm.schedules.cpu.simd import LANES, tiles_of

LOWEST = float(np.finfo(np.float32).min)
"""Where the search for a query's largest score begins."""


@dataclass(frozen=True)
class InTiles:
    """Heads that are slices of the features of lane tiles, ``[lead, tiles, heads * size, LANES]``.

    Attributes
    ----------
    tiles : Tiles
        How many there are.
    heads, size : int
        Heads, and features of one.
    """

    tiles: Tiles
    heads: int
    size: int

    neighbours = "rows"
    """What lies side by side in memory: rows of a feature."""

    @property
    def shape(self) -> tuple[Expr, ...]:
        """Shape of the tensor."""
        return self.tiles.shape(self.heads * self.size)

    @property
    def full_tiles(self) -> Expr:
        """Tiles that may be read whole."""
        return self.tiles.per_lead

    def at(self, lead: Expr, head: Expr, tile: Expr, row: Expr, feature: Expr) -> tuple[Expr, ...]:
        """Indices of a feature of one row of a tile."""
        return lead, tile, head * self.size + feature, row


@dataclass(frozen=True)
class ByHeads:
    """Heads by themselves, ``[lead, heads, rows, size]``.

    Attributes
    ----------
    lead, rows : int or expression
        Batch, and rows of each head.
    heads, size : int
        Heads, and features of one.
    """

    lead: Expr
    rows: Expr
    heads: int
    size: int

    neighbours = "features"
    """What lies side by side in memory: features of a row."""

    @property
    def shape(self) -> tuple[Expr, ...]:
        """Shape of the tensor."""
        return self.lead, self.heads, self.rows, self.size

    @property
    def full_tiles(self) -> Expr:
        """Groups of ``LANES`` rows that may be read whole."""
        return self.rows // LANES

    def at(self, lead: Expr, head: Expr, tile: Expr, row: Expr, feature: Expr) -> tuple[Expr, ...]:
        """Indices of a feature of one row of a group of ``LANES`` rows."""
        return lead, head, tile * LANES + row, feature

    def at_most(
        self, lead: Expr, head: Expr, tile: Expr, row: Expr, feature: Expr
    ) -> tuple[Expr, ...]:
        """The same, the last row standing for those behind it."""
        return lead, head, tirx.min(tile * LANES + row, self.rows - 1), feature


Heads = InTiles | ByHeads


@dataclass(frozen=True)
class Mask:
    """An additive attention mask ``[B, H, Sq, Sk]``, by the axes it really has.

    Attributes
    ----------
    lead, heads, queries, keys : bool
        False where the mask has extent 1 and broadcasts. A mask with queries is given lane-tiled
        over them, ``[B * H, tiles, Sk, LANES]``; any other as it is, ``[B, H, 1, Sk]``.
    """

    lead: bool
    heads: bool
    queries: bool
    keys: bool


@dataclass(frozen=True)
class AttentionProblem:
    """``softmax(scale * Q K^T + mask) V`` for every head.

    Attributes
    ----------
    q, k, v : InTiles or ByHeads
        Where they are. Keys and values may have fewer heads, each for as many heads of q.
    queries : Tiles
        Of the result, and of a mask that has queries.
    query_rows : int or expression or None
        Queries of each leading index; None unless keys and values are by heads.
    key_rows : int or expression
        Keys of each leading index.
    scale : float
        Factor of the scores.
    mask : Mask or None
        What is added to them.
    """

    q: Heads
    k: Heads
    v: Heads
    queries: Tiles
    query_rows: Expr | None
    key_rows: Expr
    scale: float
    mask: Mask | None

    @property
    def heads(self) -> int:
        """Heads of q, and of the result."""
        return self.q.heads

    @property
    def key_tiles(self) -> Expr:
        """Groups of ``LANES`` keys, the last of which may have fewer."""
        return self.k.tiles.per_lead if isinstance(self.k, InTiles) else tiles_of(self.key_rows)

    def key_head(self, head: Expr) -> Expr:
        """The head of keys and values that a head of q attends to."""
        shared = self.heads // self.k.heads
        return head // shared if shared > 1 else head


def mask_argument(mask: Mask, queries: Tiles) -> Buffer:
    """Declare the mask; extents it broadcasts over are 1."""
    lead = symbol("mask_lead") if mask.lead else 1
    heads = symbol("mask_heads") if mask.heads else 1
    keys = symbol("mask_keys") if mask.keys else 1
    if mask.queries:
        lead_and_heads = symbol("mask_lead") if mask.lead or mask.heads else 1
        return argument("mask", (lead_and_heads, queries.per_lead, keys, LANES))
    return argument("mask", (lead, heads, 1, keys))


def mask_at(
    m: Buffer, mask: Mask, lead: Expr, head: Expr, heads: int, tile: Expr, key: Expr, lanes: Expr
) -> Expr:
    """The mask of one key for the query, or the queries, in some lanes of a tile."""
    lead = lead if mask.lead else 0
    head = head if mask.heads else 0
    key = key if mask.keys else 0
    if mask.queries:
        return m[lead * (heads if mask.heads else 1) + head, tile, key, lanes]
    return broadcast(m[lead, head, 0, key], int(lanes.ty.dtype.lanes))
