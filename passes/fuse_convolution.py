"""Convolutions, with what follows them, become operators of ours.

Matches ``relax.nn.conv1d``, ``conv2d`` and ``conv3d`` with a constant weight, together with the
bias, activations, bounds and residual behind it, and turns them into one
``sparse_tvm.convolution``. A signal is an image one row high, and a volume one image after the
other, zeros around them where it is padded. Over images of one pixel, as in squeeze-and-excite
blocks, it is a ``sparse_tvm.dense``, whose kernels have other lanes to fill than pixels. Leaves
alone: what no kernel family accepts; a note says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.operators import (
    STILL,
    Bias,
    Clamp,
    Convolution,
    Dense,
    Frames,
    PadFrames,
    Residual,
    Step,
)
from sparse_tvm.passes import dialect
from sparse_tvm.passes.fuse_epilogue import Chain, FuseEpilogue
from sparse_tvm.passes.graph import (
    dtype_of,
    is_tensor,
    op_name,
    product,
    same,
    same_shape,
    scalar_value,
    shape_of,
)
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program

_CONVOLUTIONS = ("relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d")
_CHANNELS_FIRST = (
    ("NCW", "OIW", "NCW"),
    ("NCHW", "OIHW", "NCHW"),
    ("NCDHW", "OIDHW", "NCDHW"),
)


@dataclass(frozen=True)
class _Video(Chain):
    """A convolution of volumes; ``pads`` are images of zeros before and behind each."""

    pads: tuple[int, int] = (0, 0)


@graph_pass()
def fuse_convolution(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FuseConvolution(program, context).run()


class _FuseConvolution(FuseEpilogue):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program, context)
        self._frames: dict[Any, Any] = {}
        self._padded: dict[Any, Any] = {}

    def start(self, var: relax.Var, value: Any) -> Chain | None:
        if op_name(value) not in _CONVOLUTIONS:
            return None
        x, weight = value.args
        w, attrs = self.array(weight), value.attrs
        layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout)
        if w is None or dtype_of(var) != "float32" or layouts not in _CHANNELS_FIRST:
            return None
        source = self.graph.value(weight)
        name = source.name if isinstance(source, relax.Var) else var.name
        layer = self.program.layers.get(name, name)
        if len(w.shape) == 5 and isinstance(shape_of(x)[2], int):
            op, pads = _video(layer, shape_of(x), w.shape, attrs)
            return _Video(op, x, weight, pads=pads)
        op = _geometry(layer, shape_of(x), w.shape, attrs)
        inside = tuple(_taps_inside(op, axis) for axis in range(len(op.size)))
        if any(len(taps) < count for taps, count in zip(inside, op.kernel, strict=True)):
            whole = w.reshape(*w.shape[:2], *op.kernel)
            part = whole[:, :, *(slice(taps.start, taps.stop) for taps in inside)]
            which = "_".join(f"{taps.start}to{taps.stop}" for taps in inside)
            weight = self.weight(f"{name}_{which}", np.ascontiguousarray(part))
            self.program.layers[weight.name] = layer
            self._new[weight] = weight
            op = _with_taps(op, inside)
        return Chain(op, x, weight)

    def extended(self, value: Any) -> Chain | None:
        name = op_name(value)
        if name == "relax.clip":
            chain = self.ending(value.args[0])
            low, high = (float(bound.value) for bound in value.args[1:])
            return _clamped(chain, Clamp(low, high)) if chain else None
        if name not in ("relax.add", "relax.maximum", "relax.minimum"):
            return self.activated(value)
        for end, other in (tuple(value.args), tuple(value.args)[::-1]):
            chain = self.ending(end)
            if chain is None or not is_tensor(other):
                continue
            if name != "relax.add":
                bound = scalar_value(other)
                if bound is None:
                    return None
                clamp = Clamp(low=bound) if name == "relax.maximum" else Clamp(high=bound)
                return _clamped(chain, clamp)
            out, *spatial = shape_of(end)[1:]
            if _is_channel_vector(shape_of(other), out, len(spatial)):
                return chain.then(Bias(), extra=other)
            if same_shape(shape_of(other), shape_of(end)) and not same(other, end):
                return chain.then(Residual(), extra=other)
        return None

    def call(self, chain: Chain, var: relax.Var) -> Any:
        """The convolution, or the dense layer that it is over one pixel."""
        op = chain.op
        assert isinstance(op, Convolution)
        if isinstance(chain, _Video):
            return self._over_frames(chain, var)
        dense = Dense(layer=op.layer, matrix=op.matrix, epilogue=op.epilogue)
        if not _over_one_pixel(op) or self._context.backend.refuses(dense, self._context.target):
            return super().call(chain, var)
        (n, k), rows = op.matrix, shape_of(chain.x)[0]
        matrix = self.weight(f"{op.layer}_matrix", self._matrix(chain))
        self.program.layers[matrix.name] = op.layer
        x = self.emit(relax.op.reshape(self.new(chain.x), (rows, k)))
        operands = [
            operand
            if len(shape_of(operand)) == 1
            else self.emit(relax.op.reshape(operand, (rows, n)))
            for operand in self.operands(chain)
        ]
        result = self.emit(dialect.call(dense, [x, matrix, *operands], (rows, n)))
        return relax.op.reshape(result, shape_of(var))

    def _over_frames(self, chain: _Video, var: Any) -> Any:
        """A convolution of volumes, its output as one."""
        batch, channels, depth, *size = shape_of(var)
        args = [self._padded_frames(chain), self.new(chain.w), *self.operands(chain)]
        shape = (product([batch, depth]), channels, *size)
        self._frames[var] = self.emit(dialect.call(chain.op, args, shape))
        volume = relax.op.reshape(self._frames[var], (batch, depth, channels, *size))
        return relax.op.permute_dims(self.emit(volume), [0, 2, 1, 3, 4])

    def _as_frames(self, volume: Any) -> Any:
        """A volume ``[batch, channels, depth, ...]`` as images, of each volume in order."""
        if volume not in self._frames:
            batch, channels, depth, *size = shape_of(volume)
            moved = self.emit(relax.op.permute_dims(self.new(volume), [0, 2, 1, 3, 4]))
            images = relax.op.reshape(moved, (product([batch, depth]), channels, *size))
            self._frames[volume] = self.emit(images)
        return self._frames[volume]

    def _padded_frames(self, chain: _Video) -> Any:
        """What a convolution of volumes reads, zeros around each video."""
        frames, key = self._as_frames(chain.x), (chain.x, chain.pads)
        if not any(chain.pads):
            return frames
        if key not in self._padded:
            batch, channels, depth, *size = shape_of(chain.x)
            shape = (product([batch, depth + sum(chain.pads)]), channels, *size)
            op = PadFrames(count=depth, pads=chain.pads)
            self._padded[key] = self.emit(dialect.call(op, [frames], shape))
        return self._padded[key]

    def _matrix(self, chain: Chain) -> np.ndarray:
        weight = self.array(chain.w)
        assert weight is not None
        return weight.reshape(chain.op.matrix)

    def operand(self, chain: Chain, step: Step, extra: Any) -> Any:
        """A bias as a vector, whatever shape it was broadcast from; a volume as images."""
        if not isinstance(step, Bias):
            return self._as_frames(extra) if isinstance(chain, _Video) else self.new(extra)
        channels = (chain.op.matrix[0],)
        reshape = self.graph.op(extra, "reshape")
        for vector in (extra, *(reshape.args[:1] if reshape is not None else ())):
            if shape_of(vector) == channels:
                return self.new(vector)
        return self.emit(relax.op.reshape(self.new(extra), channels))


def _over_one_pixel(op: Convolution) -> bool:
    """Whether a convolution multiplies one pixel by a matrix."""
    return (
        op.groups == 1
        and op.frames == STILL
        and all(extent == 1 for extent in (*op.size, *op.kernel))
        and not any(op.pads)
    )


def _clamped(chain: Chain, clamp: Clamp) -> Chain:
    """The chain with bounds behind it: an upper one joins the lower one in front of it."""
    *steps, last = chain.op.epilogue or (None,)
    if isinstance(last, Clamp) and last.high is None and clamp.low is None:
        joined = (*steps, Clamp(last.low, clamp.high))
        return replace(chain, op=replace(chain.op, epilogue=joined))
    return chain.then(clamp)


def _is_channel_vector(shape: tuple[Any, ...], channels: int, spatial: int) -> bool:
    """Whether a tensor of this shape adds one number to each channel of an image."""
    lead, rest = shape[: -spatial - 1], shape[-spatial - 1 :]
    return all(dim == 1 for dim in lead) and tuple(rest) == (channels, *([1] * spatial))


def _geometry(layer: str, x: tuple[Any, ...], w: tuple[int, ...], attrs: Any) -> Convolution:
    """The operator, a signal taken as an image one row high."""
    channels, *size = x[1:]
    kernel, stride, dilation, pads = (
        [int(v) for v in values] for values in (w[2:], attrs.strides, attrs.dilation, attrs.padding)
    )
    if len(size) == 1:
        size, kernel, stride, dilation = ([1, *v] for v in (size, kernel, stride, dilation))
        pads = [0, pads[0], 0, pads[1]]
    columns = 1
    for extent in w[1:]:
        columns *= int(extent)
    return Convolution(
        layer=layer,
        matrix=(int(w[0]), columns),
        channels=channels,
        out_channels=int(w[0]),
        size=tuple(dim if isinstance(dim, int) else None for dim in size),
        kernel=tuple(kernel),
        stride=tuple(stride),
        dilation=tuple(dilation),
        pads=tuple(pads),
        groups=int(attrs.groups),
    )


def _video(
    layer: str, x: tuple[Any, ...], w: tuple[int, ...], attrs: Any
) -> tuple[Convolution, tuple[int, int]]:
    """The operator on a volume's images, and how many of zeros it wants before and behind them."""
    op = _geometry(layer, x, w, attrs)
    pads = (op.pads[0], op.pads[3])
    frames = Frames(x[2] + sum(pads), op.kernel[0], op.stride[0], op.dilation[0])
    if frames.kernel == frames.stride == 1:
        frames = STILL
    image = replace(
        op,
        size=op.size[1:],
        kernel=op.kernel[1:],
        stride=op.stride[1:],
        dilation=op.dilation[1:],
        pads=(*op.pads[1:3], *op.pads[4:]),
        frames=frames,
    )
    return image, pads


def _taps_inside(op: Convolution, axis: int) -> range:
    """The taps along an axis without those at either end that see nothing but padding."""
    size, kernel = op.size[axis], op.kernel[axis]
    if size is None:
        return range(kernel)
    stride, dilation = op.stride[axis], op.dilation[axis]
    before, behind = op.pads[axis], op.pads[axis + len(op.size)]
    out = (size + before + behind - (kernel - 1) * dilation - 1) // stride + 1

    def sees_pixels(tap: int) -> bool:
        first = tap * dilation - before
        return any(0 <= first + stride * i < size for i in range(out))

    start, stop = 0, kernel
    while stop - start > 1 and not sees_pixels(start) and (start + 1) * dilation <= before:
        start += 1
    while stop - start > 1 and not sees_pixels(stop - 1):
        if (kernel - stop + 1) * dilation > behind:
            break
        stop -= 1
    return range(start, stop)


def _with_taps(op: Convolution, taps: Sequence[range]) -> Convolution:
    """The same convolution with some of its taps only."""
    pairs = list(zip(taps, op.kernel, op.dilation, strict=True))
    dropped = [part.start * dilation for part, _, dilation in pairs]
    dropped += [(kernel - part.stop) * dilation for part, kernel, dilation in pairs]
    columns = op.matrix[1] // prod(op.kernel) * prod(len(part) for part in taps)
    return replace(
        op,
        matrix=(op.matrix[0], columns),
        kernel=tuple(len(part) for part in taps),
        pads=tuple(pad - fewer for pad, fewer in zip(op.pads, dropped, strict=True)),
    )
