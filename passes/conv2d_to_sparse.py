"""Conv2dToSparse: convolutions become our kernels, sparse where their weight pays in that form.

Matches ``relax.nn.conv2d`` and ``conv1d`` with a constant weight and fixed image size, together
with the bias, activations, bounds and residual behind it, and turns them into one
``sparse_tvm.conv2d`` (or ``depthwise_conv2d``) with the weight in the form that
``convert_weights`` chooses for the matrix ``[out, in * taps]``. A grouped convolution is a sparse
one: all that is stored are the blocks of its groups. Leaves alone: images of symbolic size, and
three dimensions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.passes import dialect
from sparse_tvm.passes.convert_weights import (
    Choice,
    FormatOptions,
    balanced_partition,
    choose,
    stored_arrays,
)
from sparse_tvm.passes.fuse_epilogue import ACTIVATIONS
from sparse_tvm.passes.graph import (
    Rewrite,
    dtype_of,
    is_tensor,
    op_name,
    same,
    same_shape,
    scalar_value,
    shape_of,
)
from sparse_tvm.passes.program import LayerReport, Program
from sparse_tvm.schedules.cpu.conv2d import Conv2d, tiling_of
from sparse_tvm.schedules.cpu.matmul import WeightLayout
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.sparsity.analysis import analyse
from sparse_tvm.targets import Target

_CONVOLUTIONS = ("relax.nn.conv1d", "relax.nn.conv2d")
_BOUNDS = {"relax.maximum": "maximum", "relax.minimum": "minimum"}


@dataclass
class _Chain:
    """A convolution and the steps behind it so far; its operands are those of the new graph."""

    name: str
    args: list[Any]
    attributes: dict[str, Any]
    report: LayerReport
    epilogue: list[str] = field(default_factory=list)
    extras: list[Any] = field(default_factory=list)

    def then(self, *steps: str, extra: Any = None) -> _Chain:
        extras = self.extras if extra is None else [*self.extras, extra]
        return replace(self, epilogue=[*self.epilogue, *steps], extras=extras)


def conv2d_to_sparse(program: Program, options: FormatOptions, target: Target) -> Program:
    """Apply the pass."""
    return _Conv2dToSparse(program, options, target).run()


class _Conv2dToSparse(Rewrite):
    def __init__(self, program: Program, options: FormatOptions, target: Target) -> None:
        super().__init__(program)
        self._options = options
        self._target = target
        self._simd = Simd.of(target)
        self._chains: dict[Any, _Chain] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        chain = self._start(var, value) or self._extend(value)
        if chain is None:
            return None
        self._chains[var] = chain
        chain.report.epilogue = tuple(chain.epilogue)
        return dialect.call(
            chain.name,
            [*chain.args, *chain.extras],
            shape_of(var),
            **chain.attributes,
            layer=chain.report.name,
            epilogue=chain.epilogue,
        )

    def _start(self, var: relax.Var, value: Any) -> _Chain | None:
        if op_name(value) not in _CONVOLUTIONS:
            return None
        x, weight = value.args
        w = self.array(weight)
        attrs = value.attrs
        layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout)
        if (
            w is None
            or dtype_of(var) != "float32"
            or layouts
            not in (
                ("NCHW", "OIHW", "NCHW"),
                ("NCW", "OIW", "NCW"),
            )
        ):
            return None
        if not all(isinstance(dim, int) for dim in shape_of(x)[1:]):
            self.program.notes.append(f"{var.name}: a convolution of images of unknown size")
            return None
        conv, groups = _geometry(shape_of(x), w.shape, attrs), int(attrs.groups)
        source = self.graph.value(weight)
        name = source.name if isinstance(source, relax.Var) else var.name
        if groups == conv.channels > 1:
            return self._depthwise(conv, name, x, w)
        return self._dense_or_sparse(conv, groups, name, x, w)

    def _depthwise(self, conv: Conv2d, name: str, x: Any, w: np.ndarray) -> _Chain:
        matrix = np.ascontiguousarray(w.reshape(conv.out_channels, -1))
        choice = Choice(WeightLayout("dense", (1, 1)), "depthwise: there is no sum to shorten")
        report = self._report(name, matrix, choice, {"data": matrix})
        args = [self.new(x), self.weight(f"{name}.data", matrix)]
        return _Chain("depthwise_conv2d", args, {"conv": asdict(conv)}, report)

    def _dense_or_sparse(
        self, conv: Conv2d, groups: int, name: str, x: Any, w: np.ndarray
    ) -> _Chain:
        matrix = w.reshape(conv.out_channels, -1)
        choice = self._choice(name, matrix, groups)
        full = _block_diagonal(matrix, groups)
        arrays = stored_arrays(full, choice.layout)
        tiling = tiling_of(conv, choice.layout.block[0], self._simd)
        offsets = tiling.offsets()
        if choice.layout.sparse:
            arrays["indices"] = offsets[arrays["indices"]]
            arrays["partition"] = balanced_partition(arrays["indptr"], tiling.jobs)
        else:
            arrays["offsets"] = offsets
        report = self._report(name, matrix, choice, arrays)
        stored = [self.weight(f"{report.name}.{key}", value) for key, value in arrays.items()]
        attributes = {
            "conv": asdict(conv),
            "format": choice.layout.format,
            "block": list(choice.layout.block),
        }
        return _Chain("conv2d", [self.new(x), *stored], attributes, report)

    def _choice(self, name: str, matrix: np.ndarray, groups: int) -> Choice:
        layer = self.program.layers.get(name, name)
        structure = analyse(matrix)
        choice = choose(layer, matrix, structure, self._options, self._target, in_parts=False)
        rows, columns = choice.layout.block
        if groups > 1 and not choice.layout.sparse:
            per_group = len(matrix) // groups
            rows = next(r for r in (8, 6, 4, 3, 2, 1) if per_group % r == 0)
            reason = f"{choice.reason}; {groups} groups stored as blocks"
            return Choice(WeightLayout("bsr", (rows, 1)), reason)
        if columns > 1:
            # Neighbouring inputs of a convolution are not neighbours in the image.
            return Choice(WeightLayout("bsr", (rows, 1)), choice.reason, choice.asked_block)
        return choice

    def _extend(self, value: Any) -> _Chain | None:
        """The chain one step longer, when ``value`` applies a step to its end."""
        name = op_name(value)
        if name in ACTIVATIONS:
            chain = self._ending(value.args[0])
            return chain.then(ACTIVATIONS[name]) if chain else None
        if name == "relax.clip":
            chain = self._ending(value.args[0])
            low, high = (float(bound.value) for bound in value.args[1:])
            return chain.then(f"maximum:{low}", f"minimum:{high}") if chain else None
        if name not in _BOUNDS and name != "relax.add":
            return None
        for end, other in (tuple(value.args), tuple(value.args)[::-1]):
            chain = self._ending(end)
            if chain is None or not is_tensor(other):
                continue
            if name in _BOUNDS:
                bound = scalar_value(other)
                return chain.then(f"{_BOUNDS[name]}:{bound}") if bound is not None else None
            out, *spatial = shape_of(end)[1:]
            if _is_channel_vector(shape_of(other), out, len(spatial)):
                bias = self.emit(relax.op.reshape(self.new(other), (out,)))
                return chain.then("bias", extra=bias)
            if same_shape(shape_of(other), shape_of(end)) and not same(other, end):
                return chain.then("residual", extra=self.new(other))
        return None

    def _ending(self, expr: Any) -> _Chain | None:
        """The chain that ends in ``expr``, if nothing else reads it."""
        return self._chains.get(expr) if self.graph.used_once(expr) else None

    def _report(
        self, name: str, matrix: np.ndarray, choice: Choice, arrays: dict[str, np.ndarray]
    ) -> LayerReport:
        layer = self.program.layers.get(name, name)
        if layer in self.program.reports:
            layer = f"{layer} ({len(self.program.reports)})"
        structure, (rows, columns) = analyse(matrix), choice.layout.block
        reason = choice.reason
        if choice.asked_block not in (None, choice.layout.block) and choice.layout.sparse:
            asked_rows, asked_columns = choice.asked_block or (rows, columns)
            reason += f"; {asked_rows}x{asked_columns} stored as {rows}x{columns}"
        report = LayerReport(
            name=layer,
            op="conv2d",
            shape=(matrix.shape[0], matrix.shape[1]),
            sparsity=structure.sparsity,
            nnz=structure.nnz,
            structure=structure.label,
            format=choice.layout.format,
            block=choice.layout.block if choice.layout.format == "bsr" else None,
            kernel="",
            epilogue=(),
            reason=reason,
            bytes=sum(a.nbytes for a in arrays.values()),
        )
        self.program.reports[layer] = report
        return report


def _is_channel_vector(shape: tuple[Any, ...], channels: int, spatial: int) -> bool:
    """Whether a tensor of this shape adds one number to each channel of an image."""
    lead, rest = shape[: -spatial - 1], shape[-spatial - 1 :]
    return all(dim == 1 for dim in lead) and tuple(rest) == (channels, *([1] * spatial))


def _geometry(x: tuple[Any, ...], w: tuple[int, ...], attrs: Any) -> Conv2d:
    """The extents of a convolution; a signal is an image one row high."""
    channels, *size = x[1:]
    kernel, stride, dilation, pads = (
        [int(v) for v in values] for values in (w[2:], attrs.strides, attrs.dilation, attrs.padding)
    )
    if len(size) == 2 and kernel == stride == [1, 1] and not any(pads):
        size = [1, size[0] * size[1]]  # pixels need no neighbours: the image is one row
    if len(size) == 1:
        size, kernel, stride, dilation = ([1, *v] for v in (size, kernel, stride, dilation))
        pads = [0, pads[0], 0, pads[1]]
    extents: list[Any] = [tuple(v) for v in (kernel, stride, dilation, pads)]
    return Conv2d(channels, (size[0], size[1]), int(w[0]), *extents)


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
