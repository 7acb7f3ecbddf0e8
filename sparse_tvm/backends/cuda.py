"""The CUDA backend: NVIDIA's GPUs by compute capability."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparse_tvm.backends.base import Backend, BackendTarget
from sparse_tvm.errors import DeviceError
from sparse_tvm.schedules.cuda.cost import other_seconds
from sparse_tvm.schedules.cuda.families.attention import TensorAttentionFamily
from sparse_tvm.schedules.cuda.families.dense import CoreDenseFamily, TensorDenseFamily
from sparse_tvm.schedules.cuda.families.row_norm import RowNormFamily
from sparse_tvm.schedules.cuda.families.sparse import SparseDenseFamily
from sparse_tvm.schedules.cuda.families.warpgroup import WarpgroupDenseFamily
from sparse_tvm.targets.cuda import CUDA_TARGETS, CudaTarget

if TYPE_CHECKING:
    from sparse_tvm.passes.infrastructure import Phase
    from sparse_tvm.passes.program import Program


class CudaBackend(Backend):
    """GPUs by TVM's CUDA code generator and NVIDIA's compiler, activations in rows of float16."""

    name: ClassVar[str] = "cuda"
    device: ClassVar[str] = "cuda"
    precision: ClassVar[str] = "fp16"

    def __init__(self) -> None:
        super().__init__(
            [
                WarpgroupDenseFamily(),
                TensorDenseFamily(),
                SparseDenseFamily(),
                CoreDenseFamily(),
                TensorAttentionFamily(),
                RowNormFamily(),
            ]
        )

    @property
    def targets(self) -> Sequence[CudaTarget]:
        return CUDA_TARGETS

    def find_target(self, name: str) -> CudaTarget | None:
        return next((t for t in CUDA_TARGETS if name == t.name or name in t.aliases), None)

    def runs_here(self, target: BackendTarget) -> bool:
        from sparse_tvm.cuda_device import capability_of

        assert isinstance(target, CudaTarget)
        try:
            return capability_of(0) >= target.least.capability
        except DeviceError:
            return False

    def other_seconds(
        self, values: float, multiplications: float, target: BackendTarget
    ) -> float | None:
        assert isinstance(target, CudaTarget)
        return other_seconds(values, multiplications, target.gpu)

    def phases(self) -> Sequence[Phase]:
        from sparse_tvm.passes.cuda.half_storage import half_storage
        from sparse_tvm.passes.cuda.legalize import legalize
        from sparse_tvm.passes.cuda.merge_projections import merge_projections
        from sparse_tvm.passes.cuda.norm_rows import norm_rows
        from sparse_tvm.passes.cuda.overlap_launches import overlap_launches
        from sparse_tvm.passes.cuda.schedule_rest import schedule_rest
        from sparse_tvm.passes.cuda.slice_heads import slice_heads
        from sparse_tvm.passes.infrastructure import Phase
        from sparse_tvm.passes.lower_kernels import lower_kernels

        return (
            Phase("rows", (norm_rows, merge_projections, slice_heads)),
            Phase("legalise", (legalize,)),
            Phase("half storage", (half_storage,)),
            Phase("schedule", (lower_kernels, overlap_launches, schedule_rest)),
        )

    def generate(self, program: Program, target: BackendTarget) -> Any:
        from sparse_tvm.backends.cuda_codegen import generate

        assert isinstance(target, CudaTarget)
        return generate(program, target)

    def write_library(self, code: Any, target: BackendTarget, path: Path) -> None:
        from sparse_tvm.backends.cuda_codegen import write_library

        assert isinstance(target, CudaTarget)
        write_library(code, target, path)
