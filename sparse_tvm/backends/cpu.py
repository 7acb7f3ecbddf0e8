"""The CPU backend: x86 and ARM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparse_tvm.backends.base import Backend, BackendTarget
from sparse_tvm.schedules.arm.families.bf16_attention import ArmDotAttentionFamily
from sparse_tvm.schedules.arm.families.dots import ArmDotFamily
from sparse_tvm.schedules.cpu.families.attention import AttentionFamily
from sparse_tvm.schedules.cpu.families.channel_lanes import ChannelLanesFamily
from sparse_tvm.schedules.cpu.families.convolution import ConvolutionFamily, DepthwiseFamily
from sparse_tvm.schedules.cpu.families.images import (
    ImageBlocksFamily,
    ImageMaskFamily,
    ImagePackFamily,
    ImagePoolingFamily,
    ImageReductionFamily,
    ImageShuffleFamily,
    ImageToTilesFamily,
    PadFramesFamily,
    PixelShuffleFamily,
    TilesToImageFamily,
)
from sparse_tvm.schedules.cpu.families.lines import LineRoundFamily
from sparse_tvm.schedules.cpu.families.matmul import MatmulFamily
from sparse_tvm.schedules.cpu.families.product import ProductFamily
from sparse_tvm.schedules.cpu.families.recurrent import RecurrentFamily
from sparse_tvm.schedules.cpu.families.rows import (
    AppendRowsFamily,
    LanePackFamily,
    LaneUnpackFamily,
    LayerNormFamily,
    RotateHeadsFamily,
)
from sparse_tvm.schedules.cpu.families.selection import (
    HoldSizeFamily,
    LargestElementsFamily,
    SelectNonzeroFamily,
    SuppressBoxesFamily,
    UniqueRowsFamily,
)
from sparse_tvm.schedules.cpu.families.winograd import WinogradFamily
from sparse_tvm.schedules.x86.families.bf16_attention import (
    TileAttentionFamily,
    X86DotAttentionFamily,
)
from sparse_tvm.schedules.x86.families.dots import X86DotFamily
from sparse_tvm.schedules.x86.families.tiles import TileFamily
from sparse_tvm.schedules.x86.families.words import (
    TileConvolutionFamily,
    X86DotConvolutionFamily,
    X86WordRowsFamily,
)
from sparse_tvm.targets import ALIASES, NATIVE, TARGETS, Target, get_target, runs_here

if TYPE_CHECKING:
    from sparse_tvm.passes.infrastructure import Phase
    from sparse_tvm.passes.program import Program

_REACHED = 0.5
"""Share of the peak that products of activations reach."""


class CpuBackend(Backend):
    """CPUs by TVM's LLVM code generator, activations in lane tiles."""

    name: ClassVar[str] = "cpu"

    def __init__(self) -> None:
        super().__init__(
            [
                MatmulFamily(),
                ConvolutionFamily(),
                WinogradFamily(),
                ChannelLanesFamily(),
                DepthwiseFamily(),
                AttentionFamily(),
                ProductFamily(),
                RecurrentFamily(),
                LayerNormFamily(),
                LanePackFamily(),
                LaneUnpackFamily(),
                AppendRowsFamily(),
                RotateHeadsFamily(),
                ImageBlocksFamily(),
                ImagePackFamily(),
                ImageToTilesFamily(),
                TilesToImageFamily(),
                ImageMaskFamily(),
                ImagePoolingFamily(),
                ImageReductionFamily(),
                ImageShuffleFamily(),
                PadFramesFamily(),
                PixelShuffleFamily(),
                TileFamily(),
                X86DotFamily(),
                ArmDotFamily(),
                TileAttentionFamily(),
                X86DotAttentionFamily(),
                ArmDotAttentionFamily(),
                TileConvolutionFamily(),
                X86DotConvolutionFamily(),
                X86WordRowsFamily(),
                LineRoundFamily(),
                SelectNonzeroFamily(),
                HoldSizeFamily(),
                SuppressBoxesFamily(),
                UniqueRowsFamily(),
                LargestElementsFamily(),
            ]
        )

    @property
    def targets(self) -> Sequence[Target]:
        return list(TARGETS.values())

    def find_target(self, name: str) -> Target | None:
        known = name == NATIVE or name in TARGETS or name in ALIASES
        return get_target(name) if known else None

    def runs_here(self, target: BackendTarget) -> bool:
        assert isinstance(target, Target)
        return runs_here(target)

    def other_seconds(
        self, values: float, multiplications: float, target: BackendTarget
    ) -> float | None:
        assert isinstance(target, Target)
        cycles = 4 * values / target.costs.second
        cycles += multiplications / target.lanes * target.costs.fma / _REACHED
        return target.seconds(cycles)

    def phases(self) -> Sequence[Phase]:
        from sparse_tvm.passes.cpu.append_rows import append_rows
        from sparse_tvm.passes.cpu.fuse_gates import fuse_gates
        from sparse_tvm.passes.cpu.image_layout import image_layout
        from sparse_tvm.passes.cpu.lane_layout import lane_layout
        from sparse_tvm.passes.cpu.legalize import legalize
        from sparse_tvm.passes.cpu.narrow_tables import narrow_tables
        from sparse_tvm.passes.cpu.read_heads import read_heads
        from sparse_tvm.passes.cpu.rotate_heads import rotate_heads
        from sparse_tvm.passes.cpu.round_activations import round_activations
        from sparse_tvm.passes.cpu.schedule_rest import schedule_rest
        from sparse_tvm.passes.infrastructure import Phase
        from sparse_tvm.passes.lower_kernels import lower_kernels

        return (
            Phase("tables", (narrow_tables,)),
            Phase("image layout", (image_layout,)),
            Phase(
                "lane layout",
                (
                    fuse_gates,
                    rotate_heads,
                    read_heads,
                    append_rows,
                    lane_layout,
                    round_activations,
                ),
            ),
            Phase("legalise", (legalize,)),
            Phase("schedule", (lower_kernels, schedule_rest)),
        )

    def generate(self, program: Program, target: BackendTarget) -> Any:
        from sparse_tvm.backends.codegen import generate

        return generate(program, target)

    def write_library(self, code: Any, target: BackendTarget, path: Path) -> None:
        from sparse_tvm.linker import Linker

        assert isinstance(target, Target)
        code.export_library(str(path), fcompile=Linker(target.triple))
