"""Split transposed: a transposed convolution becomes a convolution whose channels become pixels.

Matches ``relax.nn.conv1d_transpose`` and ``conv2d_transpose`` with a constant weight. With a stride
of s, pixels of the output that are s apart are a convolution of the input, with every s-th tap of
the kernel; all s by s of them are one convolution with as many times the channels, and its
channels, put side by side, are the output: ``sparse_tvm.pixel_shuffle``. Where the kernel is as
large as the stride, as in U-Nets, it is a convolution of single pixels. What happens to each
channel or element behind it happens to the convolution's output, where it can be fused. So it is
with the reshapes and the transpose that networks for super-resolution have behind a convolution.

Leaves alone: dilated kernels, and what the backend has no pixel shuffle for.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.operators import PixelShuffle
from sparse_tvm.passes import dialect
from sparse_tvm.passes.fuse_epilogue import ACTIVATIONS
from sparse_tvm.passes.graph import Rewrite, dtype_of, op_name, same_shape, scalar_value, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program

_TRANSPOSED = {
    "relax.nn.conv1d_transpose": (relax.op.nn.conv1d, ("NCW", "IOW")),
    "relax.nn.conv2d_transpose": (relax.op.nn.conv2d, ("NCHW", "IOHW")),
}
_CONVOLUTIONS = {"relax.nn.conv2d", "relax.nn.conv2d_transpose"}
_UNARY = {*ACTIVATIONS, "relax.clip"}
_BINARY = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")


@graph_pass()
def split_transposed(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _SplitTransposed(program, context).run()


@dataclass(frozen=True)
class _Shuffled:
    """An image by the one whose channels are its pixels."""

    expr: Any
    op: PixelShuffle


class _SplitTransposed(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self._shuffled: dict[Any, _Shuffled] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        name = op_name(value)
        if name in _TRANSPOSED:
            return self._split(var, value)
        if name == "relax.reshape":
            return self._shuffle(var, value)
        if name in _UNARY and value.args[0] in self._shuffled:
            x = self._shuffled[value.args[0]]
            return _Shuffled(relax.Call(value.op, [x.expr, *value.args[1:]], value.attrs), x.op)
        if name in _BINARY and len(value.args) == 2 and value.args[0] in self._shuffled:
            return self._with_numbers(var, value)
        return None

    def bind(self, var: relax.Var, value: Any) -> None:
        if isinstance(value, _Shuffled):
            known = isinstance(value.expr, relax.Var)
            expr = value.expr if known else self.emit(value.expr, var.name)
            self._shuffled[var] = _Shuffled(expr, value.op)
        else:
            super().bind(var, value)

    def new(self, expr: Any) -> Any:
        """The image itself, its pixels put in place, where something else reads it."""
        if isinstance(expr, relax.Var) and expr not in self._new and expr in self._shuffled:
            shuffled = self._shuffled[expr]
            call = dialect.call(shuffled.op, [shuffled.expr], shape_of(expr))
            self._new[expr] = self.emit(call, expr.name)
        return super().new(expr)

    def _shuffle(self, var: relax.Var, value: Any) -> _Shuffled | None:
        """A convolution's channels that a transpose between two reshapes makes pixels."""
        moved = self.graph.op(value.args[0], "permute_dims")
        if moved is None or list(map(int, moved.attrs.axes or ())) != [0, 1, 4, 2, 5, 3]:
            return None
        split = self.graph.op(moved.args[0], "reshape")
        if split is None or not self._from_convolution(split.args[0]):
            return None
        batch, channels, *blocks = shape_of(split)[:4]
        x = shape_of(split.args[0])
        if not all(isinstance(block, int) for block in blocks) or len(x) != 4:
            return None
        op = PixelShuffle(blocks=tuple(blocks), starts=(0, 0), ends=(0, 0))
        size = [extent * block for extent, block in zip(x[2:], blocks, strict=True)]
        if not same_shape(shape_of(split), (batch, channels, *blocks, *x[2:])) or not same_shape(
            shape_of(var), (batch, channels, *size)
        ):
            return None
        if self._context.backend.refuses(op, self._context.target) is not None:
            return None
        return _Shuffled(self.new(split.args[0]), op)

    def _from_convolution(self, x: Any) -> bool:
        """Whether an image is a convolution's output, or made of its elements alone."""
        if dtype_of(x) != "float32":
            return False
        value = self.graph.value(x)
        while op_name(value) in (*_UNARY, *_BINARY):
            value = self.graph.value(value.args[0])
        return op_name(value) in _CONVOLUTIONS

    def _with_numbers(self, var: relax.Var, value: Any) -> Any:
        """An operator whose other operand is a number, or one for each channel."""
        x, other = self._shuffled[value.args[0]], value.args[1]
        channels, *size = shape_of(var)[1:]
        if scalar_value(other) is None:
            numbers = self.array(other)
            if numbers is None and (reshape := self.graph.op(other, "reshape")) is not None:
                numbers = self.array(reshape.args[0])
            shape = tuple(shape_of(other))
            alike = [(channels, *[1] * len(size)), (1, channels, *[1] * len(size))]
            if numbers is None or shape not in alike:
                return None
            each = np.repeat(numbers.reshape(channels), prod(x.op.blocks))
            other = self.weight(f"{var.name}_each", each.reshape(1, -1, *[1] * len(size)))
        return _Shuffled(relax.Call(value.op, [x.expr, other], value.attrs), x.op)

    def _split(self, var: relax.Var, value: Any) -> Any:
        x, weight = value.args
        convolution, layouts = _TRANSPOSED[str(op_name(value))]
        attrs, w = value.attrs, self.array(weight)
        if w is None or dtype_of(var) != "float32":
            return None
        if (attrs.data_layout, attrs.kernel_layout) != layouts or any(
            int(d) != 1 for d in attrs.dilation
        ):
            return None
        rank = w.ndim - 2
        stride, pads, extra = (
            [int(v) for v in values]
            for values in (attrs.strides, attrs.padding, attrs.output_padding)
        )
        axes = [
            _Axis(w.shape[2 + i], stride[i], pads[i], pads[i + rank], extra[i]) for i in range(rank)
        ]
        op = PixelShuffle(
            blocks=tuple(axis.stride for axis in axes),
            starts=tuple(axis.before for axis in axes),
            ends=tuple(axis.behind for axis in axes),
        )
        if self._context.backend.refuses(op, self._context.target) is not None:
            return None
        name = weight.name if isinstance(weight, relax.Var) else var.name
        by = "x".join(map(str, (*stride, int(attrs.groups))))
        parameter = self.weight(f"{name}_by_{by}", _by_pixels(w, axes, int(attrs.groups)))
        self.program.layers[parameter.name] = self.program.layers.get(name, name)
        padding = [axis.taps - 1 for axis in axes] + [axis.pad for axis in axes]
        call = convolution(self.new(x), parameter, padding=padding, groups=int(attrs.groups))
        return _Shuffled(call, op)


@dataclass(frozen=True)
class _Axis:
    """A transposed convolution along one axis."""

    kernel: int
    stride: int
    front: int
    back: int
    extra: int

    @property
    def taps(self) -> int:
        """Taps of the convolution: those of the kernel that one pixel of the output sees."""
        return -(-self.kernel // self.stride)

    @property
    def _longer(self) -> int:
        """Pixels of the output beyond ``stride`` for each of the input but the last."""
        return self.kernel - self.front - self.back + self.extra

    @property
    def pad(self) -> int:
        """Zeros behind the convolution's input."""
        return max(0, (self._longer - 1 + self.front) // self.stride)

    @property
    def before(self) -> int:
        """Pixels that the convolution computes in front of the output."""
        return self.front

    @property
    def behind(self) -> int:
        """Pixels that the convolution computes behind the output."""
        return self.stride * (1 + self.pad) - self._longer - self.front


def _by_pixels(w: np.ndarray, axes: list[_Axis], groups: int) -> np.ndarray:
    """The weight ``[in, out / groups, *kernel]`` of a transposed convolution as a convolution's.

    It is ``[out * blocks, in / groups, *taps]``, the last tap of a pixel first.
    """
    inputs, per_group, *_ = w.shape
    whole = [axis.taps * axis.stride for axis in axes]
    fill = [(0, 0), (0, 0), *((0, n - axis.kernel) for n, axis in zip(whole, axes, strict=True))]
    split = [n for axis in axes for n in (axis.taps, axis.stride)]
    parts = np.pad(w, fill).reshape(groups, inputs // groups, per_group, *split)
    rank = len(axes)
    taps, pixels = [3 + 2 * i for i in range(rank)], [4 + 2 * i for i in range(rank)]
    moved = np.flip(parts, tuple(taps)).transpose(0, 2, *pixels, 1, *taps)
    shape = (-1, inputs // groups, *(axis.taps for axis in axes))
    return np.ascontiguousarray(moved.reshape(shape))
