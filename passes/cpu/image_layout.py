"""Image layout: images stay in planes from the first convolution to the last.

Matches ``sparse_tvm.convolution``, pooling, means over images, and the elementwise operators and
concatenations between them, and turns them into the same operations on planes (see
:mod:`sparse_tvm.schedules.cpu.planes`). Every image has a logical form, planes, and phases for
each strided convolution that reads it, or blocks for one whose taps are far apart (see
:mod:`sparse_tvm.schedules.cpu.blocks`); each is made from another only when somebody asks for it,
which in an image classifier is once, at the input. :mod:`sparse_tvm.passes.cpu.image_plan` decides
what lies around the rows.

Everything else keeps its logical form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax

from sparse_tvm.operators import (
    AddImages,
    Convolution,
    Operator,
    PadFrames,
    PixelShuffle,
    QuantisedConvolution,
    QuantiseImage,
    Residual,
    Types,
)
from sparse_tvm.passes import dialect
from sparse_tvm.passes.cpu.image_plan import (
    BINARY,
    UNARY,
    ImagePlan,
    has_own_form,
    per_channel,
    reduction,
    residuals,
    size_of,
    word_operator,
)
from sparse_tvm.passes.dense_to_sparse import WEIGHTS_STORED
from sparse_tvm.passes.graph import (
    Rewrite,
    dtype_of,
    op_name,
    same_shape,
    scalar_value,
    shape_of,
)
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.schedules.cpu.blocks import Blocks
from sparse_tvm.schedules.cpu.families.convolution import ImageFamily
from sparse_tvm.schedules.cpu.image_operators import (
    ImageBlocks,
    ImageConvolution,
    ImageMask,
    ImagePack,
    ImagePooling,
    ImageReduction,
    ImageShuffle,
    WordConvolution,
    WordRows,
    blocks_of,
    window_of,
)
from sparse_tvm.schedules.cpu.planes import Border, Planes, Rows, Window
from sparse_tvm.schedules.cpu.word_planes import fill_word, word_planes

_BYTES, _WORDS = "uint8", "int32"
"""Elements of a quantised image, and of its planes."""


@dataclass(frozen=True)
class _InPlanes:
    """A replacement that is in planes."""

    expr: Any


@graph_pass(requires=[WEIGHTS_STORED])
def image_layout(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _ImageLayout(program, context).run()


class _ImageLayout(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self._plan = ImagePlan(self.graph, self._found)
        self._planes: dict[tuple[Any, Window | Blocks | None], Any] = {}
        self._masks: dict[tuple[Any, ...], Any] = {}
        self._zeros: dict[Any, int] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        found = self._found(value)
        if found is not None:
            return self._convolution(var, found)
        words = word_operator(value)
        if words is not None:
            return self._on_words(var, words)
        function = reduction(value, self._plan.in_planes)
        if function is not None:
            return self._reduction(var, value.args[0], function)
        if not self._plan.in_planes(var):
            return None
        if var in self._plan.poolings:
            return self._pooling(var, value.args[0])
        padded = dialect.match(value, PadFrames)
        if padded is not None:
            images = self._in_planes(padded.args[0])
            return _InPlanes(dialect.call(padded.op, [images], self._shape(var)))
        shuffled = dialect.match(value, PixelShuffle)
        if shuffled is not None:
            return self._shuffle(var, shuffled)
        name = op_name(value)
        if name in UNARY:
            args = [self._in_planes(value.args[0]), *value.args[1:]]
        elif name in BINARY:
            args = [self._operand(arg, var) for arg in value.args]
        else:
            args = [relax.Tuple([self._in_planes(image) for image in value.args[0].fields])]
        return _InPlanes(relax.Call(value.op, args, value.attrs, value.ty_args))

    def _found(self, value: Any) -> dialect.OperatorCall[Convolution] | None:
        """A call of a convolution whose family works on planes, taken apart."""
        found = dialect.match(value, Convolution)
        if found is None:
            return None
        family = self._context.backend.weighted_family(found.op.stored)
        return found if isinstance(family, ImageFamily) else None

    def bind(self, var: relax.Var, value: Any) -> None:
        if isinstance(value, _InPlanes):
            self._planes[var, None] = self.emit(value.expr, var.name)
        else:
            super().bind(var, value)

    def new(self, expr: Any) -> Any:
        """The logical form of an expression, unpacked if planes are all there is."""
        if isinstance(expr, relax.Var) and expr not in self._new and (expr, None) in self._planes:
            shape, size = shape_of(expr), size_of(expr)
            op = ImagePack(size=_known(size), source=self._plan.border(expr))
            args = [self._planes[expr, None], relax.ShapeExpr(size)]
            rows = self.emit(dialect.call(op, args, (*shape[:2], Rows(*size).size)), "rows")
            self._new[expr] = self._reshaped(rows, shape)
        return super().new(expr)

    def _reshaped(self, x: Any, shape: Sequence[Any]) -> Any:
        """A tensor of another shape; a signal has that of its rows as it is."""
        return x if same_shape(shape_of(x), shape) else self.emit(relax.op.reshape(x, shape))

    def _in_planes(self, image: Any) -> Any:
        """An image in planes, packed if need be."""
        if (image, None) not in self._planes:
            self._planes[image, None] = self._packed(image, Window(), self._plan.border(image))
        return self._planes[image, None]

    def _in_form_for(self, image: Any, window: Window) -> Any:
        """An image as one window reads it: by phases, if it is strided."""
        if (image, window) not in self._planes:
            border = self._plan.border(image, window)
            self._planes[image, window] = self._packed(image, window, border)
        return self._planes[image, window]

    def _packed(self, image: Any, window: Window, target: Border) -> Any:
        (batch, channels, *_), size = shape_of(image), size_of(image)
        planes = self._planes.get((image, None))
        extras = []
        if dtype_of(image) == _BYTES:
            channels = word_planes(channels)
            extras = [self.weight(f"fill_{self._zeros[image]}", fill_word(self._zeros[image]))]
        if planes is None:
            shape = (batch, channels, Rows(*size).size)
            planes = self._reshaped(self.new(image), shape)
            source = None
        else:
            source = self._plan.border(image)
        dtype = _WORDS if extras else "float32"
        types = Types(dtype, output=dtype)
        op = ImagePack(size=_known(size), source=source, target=target, window=window, types=types)
        wanted = Planes(*window.phase_size(size), target)
        call = dialect.call(
            op,
            [planes, relax.ShapeExpr(size), *extras],
            (batch, channels * len(window.phases), wanted.size),
        )
        return self.emit(call, "planes")

    def _convolution(self, var: Any, found: dialect.OperatorCall[Convolution]) -> _InPlanes:
        blocks = blocks_of(found.op)
        if blocks is not None:
            return self._block_convolution(var, found, blocks)
        op, (x, *rest), window = found.op, found.args, window_of(found.op)
        own = has_own_form(op)
        image = self._in_form_for(x, window) if own else self._in_planes(x)
        source = self._plan.border(x, window if own else None)
        target = self._plan.border(var)
        kind: type[ImageConvolution | WordConvolution] = ImageConvolution
        if isinstance(op, QuantisedConvolution):
            kind = WordConvolution
            if op.rounds:
                self._zeros[var] = self._zero(rest[-1], 2)
        planar = kind(
            **{**vars(op), "size": _known(size_of(x))},
            source=source,
            target=target,
            residuals=tuple(map(self._plan.border, residuals(found))),
        )
        count = len(rest) - op.extras
        steps = [step for step in op.epilogue if step.operand]
        behind = len(rest) - len(steps)
        of_rows = rest[count:behind]  # of a quantised convolution: factor, offset, limits
        extras = [
            self._in_planes(extra) if isinstance(step, Residual) else self.new(extra)
            for step, extra in zip(steps, rest[behind:], strict=True)
        ]
        args = [
            image,
            *(self.new(array) for array in rest[:count]),
            relax.ShapeExpr(size_of(x)),
            *(self.new(array) for array in of_rows[:2]),
            *self._mask_if_padded(var, target),
            *(self.new(array) for array in of_rows[2:]),
            *extras,
        ]
        return _InPlanes(dialect.call(planar, args, self._shape(var), self._element(var)))

    def _block_convolution(
        self, var: Any, found: dialect.OperatorCall[Convolution], blocks: Blocks
    ) -> _InPlanes:
        """A convolution in blocks, and from there to planes."""
        op, (x, *rest) = found.op, found.args
        planar = ImageConvolution(**vars(op), source=Border(), target=Border())
        args = [self._in_blocks(x, blocks), *(self.new(arg) for arg in rest)]
        args.insert(1 + len(rest) - op.extras, relax.ShapeExpr(size_of(x)))
        shape = (*shape_of(var)[:2], blocks.planes.size)
        made = self.emit(dialect.call(planar, args, shape), "blocks")
        back = ImageBlocks(
            size=(blocks.height, blocks.width),
            window=blocks.window,
            image=self._plan.border(var),
            back=True,
        )
        return _InPlanes(dialect.call(back, [made], self._shape(var)))

    def _in_blocks(self, image: Any, blocks: Blocks) -> Any:
        """An image in blocks, from its planes if it has them."""
        if (image, blocks) not in self._planes:
            (batch, channels, *_), size = shape_of(image), size_of(image)
            planes = self._planes.get((image, None))
            border = None if planes is None else self._plan.border(image)
            if planes is None:
                planes = self._reshaped(self.new(image), (batch, channels, Rows(*size).size))
            op = ImageBlocks(size=size, window=blocks.window, image=border)
            call = dialect.call(op, [planes], (batch, channels, blocks.planes.size))
            self._planes[image, blocks] = self.emit(call, "blocks")
        return self._planes[image, blocks]

    def _on_words(self, var: Any, found: dialect.OperatorCall[Operator]) -> _InPlanes:
        *images, steps = found.args
        function = {QuantiseImage: "quantise", AddImages: "add"}.get(type(found.op), "dequantise")
        if dtype_of(var) == _BYTES:
            self._zeros[var] = self._zero(steps, 1 if function == "quantise" else 5)
        op = WordRows(
            function=function,
            channels=shape_of(var)[1],
            size=_known(size_of(var)),
            sources=tuple(map(self._plan.border, images)),
            target=self._plan.border(var),
            types=found.op.types,
        )
        args = [
            *map(self._in_planes, images),
            relax.ShapeExpr(size_of(var)),
            self.new(steps),
        ]
        return _InPlanes(dialect.call(op, args, self._shape(var), self._element(var)))

    def _zero(self, steps: Any, place: int) -> int:
        """The zero point that is one of an operator's steps."""
        values = self.array(steps)
        assert values is not None, "scales of images are constants"
        return int(values[place])

    def _element(self, var: Any) -> str:
        """Type of the elements of an image's planes."""
        return _WORDS if dtype_of(var) == _BYTES else "float32"

    def _pooling(self, var: Any, x: Any) -> _InPlanes:
        pooling, target = self._plan.poolings[var], self._plan.border(var)
        op = ImagePooling(
            function=pooling.function,
            size=_known(size_of(x)),
            window=pooling.window,
            source=self._plan.border(x),
            target=target,
        )
        args = [self._in_planes(x), relax.ShapeExpr(size_of(x)), *self._mask_if_padded(var, target)]
        return _InPlanes(dialect.call(op, args, self._shape(var)))

    def _shuffle(self, var: Any, found: dialect.OperatorCall[PixelShuffle]) -> _InPlanes:
        (x,), size = found.args, size_of(found.args[0])
        op = ImageShuffle(
            size=_known(size),
            blocks=_pair(found.op.blocks, 1),
            starts=_pair(found.op.starts, 0),
            ends=_pair(found.op.ends, 0),
            source=self._plan.border(x),
            target=self._plan.border(var),
        )
        args = [self._in_planes(x), relax.ShapeExpr(size)]
        return _InPlanes(dialect.call(op, args, self._shape(var)))

    def _reduction(self, var: Any, x: Any, function: str) -> Any:
        size, border = size_of(x), self._plan.border(x)
        op = ImageReduction(function=function, size=_known(size), source=border)
        args = [self._in_planes(x), relax.ShapeExpr(size), self._mask(x, border)]
        reduced = self.emit(dialect.call(op, args, shape_of(x)[:2]), function)
        return reduced if len(shape_of(var)) == 2 else relax.op.reshape(reduced, shape_of(var))

    def _operand(self, arg: Any, var: Any) -> Any:
        """An operand of an elementwise operator: an image, or a number for each channel."""
        if per_channel(arg, var) and not same_shape(shape_of(arg), shape_of(var)):
            shape, numbers = (*shape_of(arg)[:2], 1), self.array(arg)
            if numbers is not None and isinstance(arg, relax.Var):
                return self.weight(
                    f"{arg.name}_of_planes", numbers.reshape((*numbers.shape[:2], 1))
                )
            return self.emit(relax.op.reshape(self.new(arg), shape))
        return arg if scalar_value(arg) is not None else self._in_planes(arg)

    def _shape(self, var: Any) -> tuple[Any, ...]:
        planes, (batch, channels, *_) = Planes(*size_of(var), self._plan.border(var)), shape_of(var)
        return batch, word_planes(channels) if dtype_of(var) == _BYTES else channels, planes.size

    def _mask_if_padded(self, var: Any, border: Border) -> list[Any]:
        return [self._mask(var, border)] if border.padded else []

    def _mask(self, image: Any, border: Border) -> Any:
        """The mask of an image's planes; those with the same rows share it."""
        size, gap = size_of(image), Border(border.gap)
        key = (*map(str, size), border.gap)
        if key not in self._masks:
            op = ImageMask(size=_known(size), border=gap)
            call = dialect.call(op, [relax.ShapeExpr(size)], (Planes(*size, gap).room,))
            self._masks[key] = self.emit(call, "mask")
        return self._masks[key]


def _known(size: tuple[Any, Any]) -> tuple[int | None, int | None]:
    rows, columns = (extent if isinstance(extent, int) else None for extent in size)
    return rows, columns


def _pair(of_axes: tuple[int, ...], row: int) -> tuple[int, int]:
    """Numbers for rows and columns; a signal is one row."""
    return (row, of_axes[0]) if len(of_axes) == 1 else (of_axes[0], of_axes[1])
