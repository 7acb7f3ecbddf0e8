"""Which images go to planes, and what lies around their rows there: decided before anything moves.

Every image that a convolution makes is in planes, and so is what pooling, elementwise operators
and concatenation make of such images, unless they would fill padding that a reader wants to be
zero. A convolution finds its operands at fixed distances only if input and output have rows
equally far apart; that ties images into groups with one pitch, wide enough for the padding of each
reader. Images that are combined element by element share all of their layout. An image has a
second form for each convolution that reads it by phases, and for each whose padding is so wide that
all images of its group would be the slower for it. Convolutions whose taps are far apart read and
write images in blocks, so that these are tied to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import relax

from sparse_tvm.operators import (
    Activation,
    AddImages,
    Clamp,
    Convolution,
    DequantiseImage,
    Operator,
    PadFrames,
    PixelShuffle,
    QuantisedConvolution,
    QuantiseImage,
    Residual,
    Step,
)
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import (
    Graph,
    dtype_of,
    is_tensor,
    op_name,
    same_shape,
    scalar_value,
    shape_of,
)
from sparse_tvm.schedules.cpu.image_operators import (
    NARROW,
    TYPICAL_WIDTH,
    blocks_of,
    reads_pixels,
    window_of,
)
from sparse_tvm.schedules.cpu.image_pack import READ_BEYOND
from sparse_tvm.schedules.cpu.planes import Border, Window
from sparse_tvm.schedules.cpu.windows import reads_in_place

_KEEP_ZEROS = {
    f"relax.{name}"
    for name in ("nn.relu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "tanh", "negative", "abs")
}
UNARY = {
    *_KEEP_ZEROS,
    *(f"relax.{name}" for name in ("sigmoid", "exp", "erf", "sqrt", "rsqrt", "square", "clip")),
}
BINARY = {
    f"relax.{name}" for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")
}
_POOLING = {"relax.nn.max_pool2d": "max", "relax.nn.avg_pool2d": "mean"}
_REDUCTIONS = {"relax.mean": "mean", "relax.max": "max"}

_Found = dialect.OperatorCall[Convolution]
Form = tuple[Any, Window | None]
"""An image and, if stored for one reader only, the window that reads it."""


@dataclass(frozen=True)
class Pooling:
    """A pooling operator that a kernel of ours computes."""

    function: str
    window: Window


def _cuts_negatives(step: Step) -> bool:
    """Whether nothing below zero is left after a step."""
    if isinstance(step, Clamp):
        return step.low is not None and step.low >= 0
    return step == Activation("relu")


def size_of(expr: Any) -> tuple[Any, Any]:
    """Rows and columns of an image; a signal is one row."""
    *rows, columns = shape_of(expr)[2:]
    return (rows[0] if rows else 1), columns


def is_image(expr: Any) -> bool:
    """Whether an expression is a float32 tensor ``[batch, channels, *size]``."""
    return is_tensor(expr) and dtype_of(expr) == "float32" and len(shape_of(expr)) in (3, 4)


class _Groups:
    """Disjoint sets of forms, with how much wider each is than its set's first."""

    def __init__(self) -> None:
        self._parent: dict[Form, tuple[Form, int]] = {}

    def find(self, form: Form) -> tuple[Form, int]:
        """A set's first form, and how much wider this one is."""
        parent, wider = self._parent.setdefault(form, (form, 0))
        if parent == form:
            return form, 0
        first, more = self.find(parent)
        self._parent[form] = first, wider + more
        return self._parent[form]

    def unite(self, a: Form, b: Form, wider: int = 0) -> None:
        """Put both into one set; ``a`` is so much wider than ``b``."""
        (first_a, more_a), (first_b, more_b) = self.find(a), self.find(b)
        if first_a != first_b:
            self._parent[first_a] = first_b, wider + more_b - more_a


class ImagePlan:
    """What is decided for a module: :meth:`in_planes`, and the :meth:`border` of each form."""

    def __init__(self, graph: Graph, convolution: Callable[[Any], _Found | None]) -> None:
        """Look at a graph; ``convolution`` takes a call apart that is one in planes."""
        self._found, self._bindings = convolution, graph.bindings
        self._refused: set[Any] = set()
        self._decide()
        while spoilt := {var for var in self._spoiling if self.border(var).padded}:
            self._refused |= spoilt
            self._decide()

    def _decide(self) -> None:
        self._planar: set[Any] = set()
        self._spoiling: set[Any] = set()
        self._not_negative: set[Any] = set()
        self._pitches, self._layouts = _Groups(), _Groups()
        self._reads: dict[Form, Border] = {}
        self.poolings: dict[Any, Pooling] = {}
        for binding in self._bindings:
            self._visit(binding.var, binding.value)
        self._borders = self._all_borders()

    def in_planes(self, var: Any) -> bool:
        """Whether the image that a variable stands for is made in planes."""
        return var in self._planar

    def border(self, image: Any, window: Window | None = None) -> Border:
        """The border of an image in planes, by phases if there is a window."""
        return self._borders[image, window]

    def _visit(self, var: Any, value: Any) -> None:
        convolution, words = self._found(value), word_operator(value)
        if convolution is not None:
            self._convolution(var, convolution)
        elif words is not None:
            self._make(var)
            for image in words.args[:-1]:
                self._read((image, None), READ_BEYOND)
            if isinstance(words.op, DequantiseImage) and words.op.positive:
                self._not_negative.add(var)
        elif (padded := dialect.match(value, PadFrames)) is not None:
            if self.in_planes(padded.args[0]):
                self._elementwise(var, padded.args)
        elif (shuffled := dialect.match(value, PixelShuffle)) is not None:
            self._make(var)
            self._read((shuffled.args[0], None), Border())
            if shuffled.args[0] in self._not_negative:
                self._not_negative.add(var)
        elif is_tensor(var) and dtype_of(var) == "float32":
            name = op_name(value)
            if name in _POOLING:
                self._pooling(var, value, _POOLING[name])
            elif name in UNARY and self.in_planes(value.args[0]):
                self._elementwise(var, [value.args[0]], name in _KEEP_ZEROS or _spans_zero(value))
                if name == "relax.nn.relu":
                    self._not_negative.add(var)
            elif name in BINARY:
                self._binary(var, value)
            elif name == "relax.concat" and is_image(var):
                self._concat(var, value)

    def _convolution(self, var: Any, found: _Found) -> None:
        op, x, window = found.op, found.args[0], window_of(found.op)
        self._make(var)
        if reads_each_channel(op):
            self._read((x, None), reads_in_place(window))
            if not window.strided:
                self._pitches.unite((x, None), (var, None), window.wider)
        elif reads_pixels(op):
            self._read((x, None), window.pixel_reads)
        elif blocks_of(op) is not None:
            self._read((x, None), Border())
        elif has_own_form(op):
            self._read((x, None), READ_BEYOND)
            self._read((x, window), window.reads)
            self._pitches.unite((x, window), (var, None), window.wider)
        else:
            self._read((x, None), window.reads)
            self._pitches.unite((x, None), (var, None), window.wider)
        for extra in residuals(found):
            self._read((extra, None), Border())
            self._pitches.unite((extra, None), (var, None))
        bounds = [step for step in op.epilogue if isinstance(step, Clamp) and step.low is None]
        others = [step for step in op.epilogue if step not in bounds]
        if others and _cuts_negatives(others[-1]) and all((b.high or 0) >= 0 for b in bounds):
            self._not_negative.add(var)

    def _make(self, var: Any) -> None:
        self._planar.add(var)
        self._read((var, None), Border())

    def _read(self, form: Form, border: Border) -> None:
        known = self._reads.get(form)
        self._reads[form] = border if known is None else known.merged(border)

    def _pooling(self, var: Any, value: Any, function: str) -> None:
        x = value.args[0]
        window = _pooling_window(value)
        if not self.in_planes(x) or window is None or value.attrs.layout != "NCHW":
            return
        padded = any(window.pads)
        if padded and function == "max" and x not in self._not_negative:
            return  # its padding would have to be less than any pixel
        if padded and function == "mean" and not value.attrs.count_include_pad:
            return
        self.poolings[var] = Pooling(function, window)
        self._make(var)
        if x in self._not_negative:
            self._not_negative.add(var)
        self._read((x, None), reads_in_place(window))
        if not window.strided:
            self._pitches.unite((x, None), (var, None), window.wider)

    def _elementwise(self, var: Any, images: list[Any], keeps_zeros: bool = True) -> None:
        if var in self._refused:
            return
        self._make(var)
        if not keeps_zeros:
            self._spoiling.add(var)
        for image in images:
            self._layouts.unite((image, None), (var, None))
            self._pitches.unite((image, None), (var, None))

    def _binary(self, var: Any, value: Any) -> None:
        """Images of one shape, or one and a number, perhaps for each channel."""
        if not is_image(var) or not all(is_tensor(arg) for arg in value.args):
            return
        images: list[Any] = []
        others: list[Any] = []
        for arg in value.args:
            whole = same_shape(shape_of(arg), shape_of(var))
            (images if whole else others).append(arg)
        numbers = all(scalar_value(o) is not None or per_channel(o, var) for o in others)
        if images and all(map(self.in_planes, images)) and numbers:
            name = str(op_name(value))
            keeps = name != "relax.divide" or len(images) == 1
            self._elementwise(var, images, keeps and all(_keeps_zeros(name, o) for o in others))

    def _concat(self, var: Any, value: Any) -> None:
        images = list(value.args[0].fields) if isinstance(value.args[0], relax.Tuple) else []
        axis = value.attrs.axis
        if axis is None or int(axis) % len(shape_of(var)) != 1 or not images:
            return
        if all(self.in_planes(image) for image in images):
            self._elementwise(var, images)

    def _all_borders(self) -> dict[Form, Border]:
        """Borders by form: what all readers of its layout need, at the pitch of its group."""
        layouts: dict[Form, Border] = {}
        pitches: dict[Form, int] = {}
        for form, border in self._reads.items():
            layout, _ = self._layouts.find(form)
            layouts[layout] = layouts.get(layout, Border()).merged(border)
            group, wider = self._pitches.find(form)
            pitches[group] = max(pitches.get(group, 0), border.gap + wider)
        borders = {}
        for form in self._reads:
            layout, _ = self._layouts.find(form)
            group, wider = self._pitches.find(form)
            borders[form] = layouts[layout].with_gap(pitches[group] - wider)
        return borders


def has_own_form(op: Convolution) -> bool:
    """Whether a convolution reads its input in a form that is made for it."""
    window, width = window_of(op), op.size[1]
    if reads_each_channel(op) or reads_pixels(op):
        return False
    return window.by_phases or window.reads.gap * NARROW > (width or TYPICAL_WIDTH)


def reads_each_channel(op: Convolution) -> bool:
    """Whether its kernel is the one of windows that see each channel alone."""
    return op.depthwise and not isinstance(op, QuantisedConvolution)


def word_operator(value: Any) -> dialect.OperatorCall[Operator] | None:
    """A call of an operator on each pixel of bytes, taken apart; its last operand is no image."""
    for kind in (QuantiseImage, DequantiseImage, AddImages):
        found = dialect.match(value, kind)
        if found is not None:
            return dialect.OperatorCall[Operator](found.op, found.args)
    return None


def residuals(found: _Found) -> list[Any]:
    """The tensors that a convolution's epilogue adds, in order."""
    steps = [step for step in found.op.epilogue if step.operand]
    extras = found.args[len(found.args) - len(steps) :]
    pairs = zip(steps, extras, strict=True)
    return [extra for step, extra in pairs if isinstance(step, Residual)]


def _keeps_zeros(name: str, operand: Any) -> bool:
    """Whether a zero of an image is zero still after an operator with such an operand."""
    number = scalar_value(operand)
    if name == "relax.multiply":
        return True
    if number is None:
        return False
    return {"relax.maximum": number <= 0, "relax.minimum": number >= 0}.get(name, False)


def _spans_zero(value: Any) -> bool:
    """Whether an operator keeps values between bounds with zero between them."""
    if op_name(value) != "relax.clip":
        return False
    low, high = (float(bound.value) for bound in value.args[1:])
    return low <= 0 <= high


def per_channel(expr: Any, image: Any) -> bool:
    """Whether a tensor has one number for each channel of an image, or of each image."""
    shape, (batch, channels, *size) = shape_of(expr), shape_of(image)
    alike = [(lead, channels, *[1] * len(size)) for lead in (1, batch)]
    return any(same_shape(shape, one) for one in alike)


def reduction(value: Any, in_planes: Callable[[Any], bool]) -> str | None:
    """Which number per channel an operator computes of an image in planes, if it does."""
    name = op_name(value)
    if name not in _REDUCTIONS or not in_planes(value.args[0]) or value.attrs.axis is None:
        return None
    rank = len(shape_of(value.args[0]))
    axes = sorted(int(axis) % rank for axis in value.attrs.axis)
    return _REDUCTIONS[name] if axes == list(range(2, rank)) else None


def _pooling_window(value: Any) -> Window | None:
    """The window of a pooling operator, padded further if it rounds the output's size up."""
    attrs, x = value.attrs, value.args[0]
    kernel, stride, dilation, pads = (
        [int(v) for v in values]
        for values in (attrs.pool_size, attrs.strides, attrs.dilation, attrs.padding)
    )
    size, out = size_of(x), size_of(value)
    for axis in (0, 1):
        if not attrs.ceil_mode:
            break
        if not (isinstance(size[axis], int) and isinstance(out[axis], int)):
            return None
        reach = (kernel[axis] - 1) * dilation[axis]
        needed = (out[axis] - 1) * stride[axis] + reach + 1 - size[axis] - pads[axis]
        if needed > pads[axis + 2] and op_name(value) != "relax.nn.max_pool2d":
            return None  # fewer pixels count there
        pads[axis + 2] = max(pads[axis + 2], needed)
    return Window(
        (kernel[0], kernel[1]),
        (stride[0], stride[1]),
        (dilation[0], dilation[1]),
        (pads[0], pads[1], pads[2], pads[3]),
    )
