"""Rotary positions on lane tiles: a head's features are its lines, so nothing is moved.

Heads are taken out of an activation that may hold more, such as keys and values beside queries,
and turned on the way. Without anything to turn it is a copy of heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    Registers,
    Tiles,
    argument,
    prim_func,
    ramp,
    scalar,
)
from sparse_tvm.schedules.cpu.operators import RotateHeads
from sparse_tvm.schedules.cpu.simd import Simd


def rotate_heads(
    op: RotateHeads, tiles: Tiles, features: int, angle_lead: Expr, simd: Simd
) -> tirx.PrimFunc:
    """Build the kernel.

    Arguments of the PrimFunc: x ``[lead, tiles, features, LANES]``; if anything is turned, cos and
    sin ``[angle_lead, tiles, op.turned, LANES]``, whose lead is x's or 1; y ``[lead, tiles,
    op.heads * op.size, LANES]``.
    """
    with prim_func() as result:
        x = argument("x", tiles.shape(features))
        angles = [
            argument(name, Tiles(angle_lead, tiles.per_lead).shape(op.turned))
            for name in ("cos", "sin")
            if op.turned
        ]
        y = argument("y", tiles.shape(op.heads * op.size))
        with T.parallel(0, tiles.count * op.heads) as job:
            head, index = scalar(job % op.heads), scalar(job // op.heads)
            lead, tile = scalar(index // tiles.per_lead), scalar(index % tiles.per_lead)
            same = isinstance(angle_lead, int) and angle_lead == 1
            _Head(op, x, y, simd, lead, tile, head).run(angles, 0 if same else lead)
    return result["func"]


@dataclass(frozen=True)
class _Head:
    """One head of one tile."""

    op: RotateHeads
    x: Buffer
    y: Buffer
    simd: Simd
    lead: Expr
    tile: Expr
    head: Expr

    def run(self, angles: list[Buffer], angle_lead: Expr) -> None:
        op, simd = self.op, self.simd
        half = op.turned // 2
        for part in range(simd.per_tile):
            lanes = ramp(part * simd.lanes, simd)
            if angles:
                with T.serial(0, half) as i:
                    self._turn(angles, angle_lead, i, i + half, lanes)
            with T.serial(0, op.size - op.turned) as i:
                self._store(i + op.turned, self._load(i + op.turned, lanes), lanes)

    def _turn(
        self, angles: list[Buffer], angle_lead: Expr, first: Expr, second: Expr, lanes: Expr
    ) -> None:
        """Two features that turn together."""
        (cos, sin), pair = angles, Registers(2, 1, self.simd)
        pair.fill(lambda row, _: self._load((first, second)[row], lanes))
        for one, sign, other in ((0, -1, 1), (1, 1, 0)):
            feature = (first, second)[one]
            at = (angle_lead, self.tile, feature, lanes)
            turned = pair.get(other, 0) * sin[at]
            kept = pair.get(one, 0) * cos[at]
            self._store(feature, kept + turned if sign > 0 else kept - turned, lanes)

    def _load(self, feature: Expr, lanes: Expr) -> Expr:
        op = self.op
        at = op.first + self.head * op.stride + feature
        return self.x[self.lead, self.tile, at, lanes]

    def _store(self, feature: Expr, value: Expr, lanes: Expr) -> None:
        at = self.head * self.op.size + feature
        T.buffer_store(self.y, value, [self.lead, self.tile, at, lanes])
