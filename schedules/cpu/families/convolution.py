"""Convolutions in float32: the weight dense, CSR or BSR, and depthwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sparse_tvm.families import Extents, Kernel, WeightedFamily, Wish, Work
from sparse_tvm.operators import FLOAT32, Convolution, Layout
from sparse_tvm.schedules.cpu.block_arrays import balanced_partition, stored_arrays
from sparse_tvm.schedules.cpu.cost import dense_rows, matmul_seconds
from sparse_tvm.schedules.cpu.families.matmul import layer_work, wished_blocks
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.sparsity.statistics import WeightStatistics
from sparse_tvm.targets import Target

_GROUPED_ROWS = (8, 6, 4, 3, 2, 1)


class _ImageFamily(WeightedFamily[Convolution]):
    """What both families of convolutions take."""

    depthwise: ClassVar[bool]

    def refuses(self, op: Convolution, target: Target) -> str | None:
        if op.depthwise != self.depthwise:
            kind = "depthwise convolutions only" if self.depthwise else "no depthwise convolution"
            return f"{self.name} computes {kind}"
        if op.types != FLOAT32:
            return f"{self.name} computes float32 only"
        if len(op.size) != 2:
            return f"{self.name} has no kernel for {len(op.size)} spatial dimensions"
        if None in op.size:
            return "a convolution of images of unknown size"
        return None

    def work(
        self,
        op: Convolution,
        operands: Sequence[Extents],
        output: Extents,
        nonzeros: int | None = None,
    ) -> Work:
        return layer_work(op.matrix, op.stored, operands, output, nonzeros)


@dataclass(frozen=True)
class ConvolutionFamily(_ImageFamily):
    """The kernel ``conv2d`` of :mod:`sparse_tvm.schedules.cpu.conv2d`.

    A grouped convolution is one over all input channels, of whose weight the blocks of the groups
    are stored: its dense form too.
    """

    name: ClassVar[str] = "convolution"
    operator: ClassVar[type[Convolution]] = Convolution
    depthwise: ClassVar[bool] = False

    def candidates(
        self, op: Convolution, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        found = []
        if wish is None or wish.format == "dense":
            rows = dense_rows(weight.shape[0], Simd.of(target))
            if op.groups > 1:
                per_group = op.out_channels // op.groups
                rows = next(r for r in _GROUPED_ROWS if per_group % r == 0)
            found.append(Layout(self.name, "dense", (rows, 1)))
        # Neighbouring inputs of a convolution are not neighbours in the image: no block is wide.
        for format, (rows, _) in wished_blocks(weight, wish):
            found.append(Layout(self.name, format, (rows, 1)))
        return list(dict.fromkeys(found))

    def cost(
        self,
        op: Convolution,
        layout: Layout,
        weight: WeightStatistics,
        tokens: int,
        target: Target,
    ) -> float:
        if layout.sparse:
            stored = weight.stored_blocks(layout.block)
        else:
            stored = -(-weight.shape[0] // layout.block[0]) * weight.shape[1]
        return matmul_seconds(weight.shape, layout, stored, target, tokens)

    def pack(
        self, op: Convolution, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        from sparse_tvm.schedules.cpu.conv2d import tiling_of

        tiling = tiling_of(_geometry(op), layout.block[0], Simd.of(target))
        offsets = tiling.offsets()
        arrays = stored_arrays(_block_diagonal(w, op.groups), _kernel_layout(op, layout))
        if "indices" in arrays:
            arrays["indices"] = offsets[arrays["indices"]]
            arrays["partition"] = balanced_partition(arrays["indptr"], tiling.jobs)
        else:
            arrays["offsets"] = offsets
        return arrays

    def build(
        self, op: Convolution, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.conv2d import conv2d

        layout = _kernel_layout(op, op.stored)
        batch, shapes = _batched(operands[0], output)
        size = f"_{layout.block[0]}x1" if op.stored.format != "csr" else ""
        title = "_".join(["conv2d", op.stored.format + size, _size(op), *op.step_titles])
        simd = Simd.of(target)
        return Kernel(title, conv2d(_geometry(op), batch, shapes, layout, op.epilogue, simd))


@dataclass(frozen=True)
class DepthwiseFamily(_ImageFamily):
    """The kernel ``depthwise_conv2d`` of :mod:`sparse_tvm.schedules.cpu.conv2d`."""

    name: ClassVar[str] = "depthwise_convolution"
    operator: ClassVar[type[Convolution]] = Convolution
    depthwise: ClassVar[bool] = True

    def candidates(
        self, op: Convolution, weight: WeightStatistics, target: Target, wish: Wish | None = None
    ) -> Sequence[Layout]:
        return [Layout(self.name, "dense")]

    def remark(self, op: Convolution) -> str:
        return "depthwise: there is no sum to shorten"

    def cost(
        self,
        op: Convolution,
        layout: Layout,
        weight: WeightStatistics,
        tokens: int,
        target: Target,
    ) -> float:
        blocks = weight.shape[0] * weight.shape[1]
        return matmul_seconds(weight.shape, layout, blocks, target, tokens)

    def pack(
        self, op: Convolution, w: np.ndarray, layout: Layout, target: Target
    ) -> dict[str, np.ndarray]:
        return {"data": np.ascontiguousarray(w)}

    def build(
        self, op: Convolution, operands: Sequence[Extents], output: Extents, target: Target
    ) -> Kernel:
        from sparse_tvm.schedules.cpu.conv2d import depthwise_conv2d

        batch, shapes = _batched(operands[0], output)
        title = "_".join(["depthwise_conv2d", _size(op), *op.step_titles])
        simd = Simd.of(target)
        return Kernel(title, depthwise_conv2d(_geometry(op), batch, shapes, op.epilogue, simd))


def _geometry(op: Convolution) -> Any:
    """The extents that the kernel is built for."""
    from sparse_tvm.schedules.cpu.conv2d import Conv2d

    height, width = (dim or 0 for dim in op.size)
    if op.kernel == op.stride == (1, 1) and not any(op.pads):
        height, width = 1, height * width  # pixels need no neighbours: the image is one row
    extents: list[Any] = [op.kernel, op.stride, op.dilation, op.pads]
    return Conv2d(op.channels, (height, width), op.out_channels, *extents)


def _kernel_layout(op: Convolution, layout: Layout) -> Layout:
    """The layout over all input channels: groups are blocks of it."""
    if op.groups == 1 or layout.sparse:
        return layout
    return Layout(layout.family, "bsr", layout.block)


def _block_diagonal(matrix: np.ndarray, groups: int) -> np.ndarray:
    """The weight of a grouped convolution as one over all of its input channels."""
    if groups == 1:
        return matrix
    rows, columns = matrix.shape
    full = np.zeros((rows, groups * columns), matrix.dtype)
    for group in range(groups):
        part = slice(group * rows // groups, (group + 1) * rows // groups)
        full[part, group * columns : (group + 1) * columns] = matrix[part]
    return full


def _batched(x: Extents, y: Extents) -> tuple[Any, tuple[list[Any], list[Any]]]:
    """Batch size for a kernel, and the shapes of both images with it."""
    from sparse_tvm.schedules.cpu.lane_tiles import symbol

    batch = symbol("batch") if x.shape[0] is None else x.shape[0]
    return batch, ([batch, *x.shape[1:]], [batch, *y.shape[1:]])


def _size(op: Convolution) -> str:
    kernel, size = ("x".join(map(str, extents)) for extents in (op.kernel, op.size))
    return f"{op.out_channels}x{op.channels}x{kernel}_on_{size}"
