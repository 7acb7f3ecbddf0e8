"""What happens to each token or element alone: layer norm, and moves of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from sparse_tvm.families import Extents, Kernel, KernelFamily, Op, Work, bytes_of
from sparse_tvm.operators import FLOAT32, LayerNorm
from sparse_tvm.schedules.cpu.families.extents import known_or_symbols, tiles_for
from sparse_tvm.schedules.cpu.operators import AppendRows, LanePack, LaneUnpack, RotateHeads
from sparse_tvm.schedules.cpu.precision import PRECISIONS
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.targets import Target

_ROWS = ("lead", "rows", "features")


class MovesOnly(KernelFamily[Op]):
    """A family whose work is to read its operands and to write its output."""

    def refuses(self, op: Op, target: Target) -> str | None:
        return None if op.types == FLOAT32 else f"{self.name} takes float32 only"

    def work(
        self,
        op: Op,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        return Work(bytes=bytes_of([*operands, output]))


@dataclass(frozen=True)
class LayerNormFamily(MovesOnly[LayerNorm]):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.normalize`."""

    name: ClassVar[str] = "layer_norm"
    operator: ClassVar[type[LayerNorm]] = LayerNorm

    def refuses(self, op: LayerNorm, target: Target) -> str | None:
        rounds = op.types == replace(FLOAT32, output=op.types.output)
        return None if rounds and op.types.output in PRECISIONS else super().refuses(op, target)

    def build(
        self, op: LayerNorm, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.normalize import layer_norm

        features: Any = operands[0].shape[2]
        out = PRECISIONS.get(op.types.output)
        tiles, simd = tiles_for(operands[0]), Simd.of(target)
        function = layer_norm(tiles, features, op.epsilon, simd, out, op.centred)
        name = self.name if op.centred else "rms_norm"
        return Kernel(f"{name}_{features}" + (f"_to_{out.name}" if out else ""), function)


@dataclass(frozen=True)
class LanePackFamily(MovesOnly[LanePack]):
    """Into lane tiles, with :mod:`sparse_tvm.schedules.cpu.pack`."""

    name: ClassVar[str] = "lane_pack"
    operator: ClassVar[type[LanePack]] = LanePack

    def build(
        self, op: LanePack, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.pack import pack

        return Kernel(self.name, pack(*known_or_symbols(operands[0], _ROWS)))


@dataclass(frozen=True)
class LaneUnpackFamily(MovesOnly[LaneUnpack]):
    """Out of lane tiles, with :mod:`sparse_tvm.schedules.cpu.pack`."""

    name: ClassVar[str] = "lane_unpack"
    operator: ClassVar[type[LaneUnpack]] = LaneUnpack

    def build(
        self, op: LaneUnpack, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.pack import unpack

        return Kernel(self.name, unpack(*known_or_symbols(output, _ROWS)))


@dataclass(frozen=True)
class AppendRowsFamily(MovesOnly[AppendRows]):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.append`."""

    name: ClassVar[str] = "append_rows"
    operator: ClassVar[type[AppendRows]] = AppendRows

    def build(
        self, op: AppendRows, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.append import append_rows
        from sparse_tvm.schedules.cpu.lane_tiles import symbol

        lead, _, size = known_or_symbols(output, _ROWS)
        rows = [
            symbol(f"rows_{i}") if part.shape[1] is None else part.shape[1]
            for i, part in enumerate(operands)
        ]
        return Kernel(f"append_rows_{size}", append_rows(lead, rows, size, Simd.of(target)))


@dataclass(frozen=True)
class RotateHeadsFamily(MovesOnly[RotateHeads]):
    """The kernel of :mod:`sparse_tvm.schedules.cpu.rotate`."""

    name: ClassVar[str] = "rotate_heads"
    operator: ClassVar[type[RotateHeads]] = RotateHeads

    def build(
        self, op: RotateHeads, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.rotate import rotate_heads

        x, *angles = operands
        tiles, features = tiles_for(x), x.shape[2]
        assert features is not None
        lead = known_or_symbols(angles[0], ("angle_lead", *_ROWS))[0] if angles else 1
        function = rotate_heads(op, tiles, features, lead, Simd.of(target))
        return Kernel(f"rotate_heads_{op.heads}x{op.size}", function)
