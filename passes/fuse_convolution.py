"""Convolutions, with what follows them, become operators of ours.

Matches ``relax.nn.conv1d``, ``conv2d`` and ``conv3d`` with a constant weight, together with the
bias, activations, bounds and residual behind it, and turns them into one
``sparse_tvm.convolution``. A signal is an image one row high. Over images of one pixel, as in
squeeze-and-excite blocks, it is a ``sparse_tvm.dense``, whose kernels have other lanes to fill than
pixels. Leaves alone: what no kernel family accepts; a note says why.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.operators import Bias, Clamp, Convolution, Dense, Residual, Step
from sparse_tvm.passes import dialect
from sparse_tvm.passes.fuse_epilogue import Chain, FuseEpilogue
from sparse_tvm.passes.graph import (
    dtype_of,
    is_tensor,
    op_name,
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


@graph_pass()
def fuse_convolution(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _FuseConvolution(program, context).run()


class _FuseConvolution(FuseEpilogue):
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
        return Chain(_geometry(layer, shape_of(x), w.shape, attrs), x, weight)

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

    def _matrix(self, chain: Chain) -> np.ndarray:
        weight = self.array(chain.w)
        assert weight is not None
        return weight.reshape(chain.op.matrix)

    def operand(self, chain: Chain, step: Step, extra: Any) -> Any:
        """A bias as a vector, whatever shape it was broadcast from."""
        if not isinstance(step, Bias):
            return self.new(extra)
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
