"""Keep integers, for images: quantised convolutions multiply and pass on the model's own bytes.

Matches a convolution of float32 whose input the model rounds to 8 bits by one scale and zero point,
both constant, and whose weight's rows are multiples of a step, from -128 to 127 of them. It becomes
a :class:`~sparse_tvm.operators.QuantisedConvolution`; where nothing but such a rounding reads its
output, it writes bytes. The sum of two rounded images that is rounded again becomes
:class:`~sparse_tvm.operators.AddImages`. Every rounded image is bytes then, made by what computes
it or by :class:`~sparse_tvm.operators.QuantiseImage`, and float32 only for readers that want that.

Leaves float32, with a note: weights with larger steps (asymmetric ones), layers that the user gave
a precision, groups, and targets without kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.operators import (
    FLOAT32,
    QUANTISED,
    Activation,
    AddImages,
    Bias,
    Clamp,
    Convolution,
    DequantiseImage,
    QuantisedConvolution,
    QuantiseImage,
    Step,
)
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Graph, Rewrite, dtype_of, is_tensor, same_shape, shape_of
from sparse_tvm.passes.infrastructure import Context, graph_pass
from sparse_tvm.passes.program import Program
from sparse_tvm.passes.roundings import Rounding, Roundings
from sparse_tvm.sparsity.quantise import quantise_rows, reach

_LAST_BYTE = 255.0
_WORD_BYTES = 4
"""Kernels see channels in multiples of four."""

_KEPT = object()
"""Stands for a binding that others replace."""


@graph_pass()
def keep_integer_images(program: Program, context: Context) -> Program:
    """Apply the pass."""
    if not context.options.integers:
        return program
    rewrite = _KeepIntegerImages(program, context)
    return rewrite.run() if rewrite.pays else program


@dataclass(frozen=True)
class _Scale:
    """A constant scale, and the byte that stands for 0."""

    step: float
    zero: float

    @property
    def steps(self) -> np.ndarray:
        return np.array([self.step, self.zero], np.float32)


@dataclass(frozen=True)
class _Sum:
    """Two rounded images whose sum is rounded, perhaps after what is negative was cut."""

    images: tuple[Any, Any]
    cut: bool


class _Images:
    """Which images a model rounds, and what they are made of."""

    def __init__(self, graph: Graph) -> None:
        self._graph, roundings = graph, Roundings(graph)
        self.scales: dict[Any, _Scale] = {}
        self.sources: dict[Any, Any] = {}
        self.replaced: set[Any] = set()
        """Variables that nothing reads but the roundings that are matched."""
        self.sums: dict[Any, _Sum] = {}
        self.first: dict[Any, Any] = {}
        """Of images that a model makes of the same steps for each reader, the first."""
        found: dict[Any, list[tuple[Any, Rounding]]] = {}
        for binding in graph.bindings:
            if not isinstance(binding.value, relax.Call) or not _is_image(binding.var):
                continue
            rounding = roundings.at(binding.var)
            if rounding is not None and _is_constant(rounding):
                found.setdefault(binding.value.args[0], []).append((binding.var, rounding))
        for alike in found.values():
            self._add(alike)
        for image in self.sources:
            self._find_sum(image)

    def _add(self, alike: list[tuple[Any, Rounding]]) -> None:
        """Add an image, and others that are made of the same steps."""
        image, rounding = alike[0]
        if rounding.source.same_as(image):  # integers that the model was given
            for one, of_one in alike:
                self._scale(one, of_one)
                self.sources[one] = one
            return
        steps, *chain = self._chain(image, rounding.source)
        equal = all(one.scale == rounding.scale for _, one in alike)
        if not equal or self._graph.uses(steps) != len(alike):
            return
        if not all(map(self._graph.used_once, chain)):
            return
        self.replaced.update([steps, *chain])
        self.sources[image] = rounding.source
        for one, of_one in alike:
            self._scale(one, of_one)
            self.first[one] = image

    def _scale(self, image: Any, rounding: Rounding) -> None:
        self.scales[image] = _Scale(rounding.scale, rounding.zero)

    def _chain(self, image: Any, source: Any) -> list[Any]:
        """The variables between an image and what is rounded to it."""
        chain, at = [], self._graph.value(image).args[0]
        while not at.same_as(source):
            chain.append(at)
            at = self._graph.value(at).args[0]
        return chain

    def _find_sum(self, image: Any) -> None:
        source = self.sources[image]
        relu = self._graph.op(source, "nn.relu")
        total = source if relu is None else relu.args[0]
        add = self._graph.op(total, "add")
        ours = [source] if relu is None else [source, total]
        if add is None or not all(map(self._graph.used_once, ours)):
            return
        a, b = add.args
        if a in self.scales and b in self.scales and same_shape(shape_of(a), shape_of(b)):
            self.sums[image] = _Sum((a, b), relu is not None)
            self.replaced.update(ours)

    def only_rounding_of(self, var: Any) -> Any:
        """The image that a variable is rounded to, if nothing else is made of it."""
        rounded = [image for image, source in self.sources.items() if source.same_as(var)]
        return rounded[0] if len(rounded) == 1 and self._graph.used_once(var) else None


def _is_image(expr: Any) -> bool:
    """Whether it is a float32 image of more than a pixel."""
    if not is_tensor(expr) or dtype_of(expr) != "float32" or len(shape_of(expr)) != 4:
        return False
    return any(extent != 1 for extent in shape_of(expr)[2:])


def _is_constant(rounding: Rounding) -> bool:
    return isinstance(rounding.scale, float) and isinstance(rounding.zero, float)


class _KeepIntegerImages(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context, self._images = context, _Images(self.graph)
        self._bytes: dict[Any, Any] = {}
        self._quantised = {
            binding.var: found
            for binding in self.graph.bindings
            if (found := self._found(binding.value)) is not None
        }

    @property
    def pays(self) -> bool:
        """Whether any convolution multiplies integers."""
        return bool(self._quantised)

    def _found(self, value: Any) -> dialect.OperatorCall[Convolution] | None:
        """A convolution that multiplies integers, taken apart."""
        found = dialect.match(value, Convolution)
        if found is None or found.op.layout is not None or found.op.types != FLOAT32:
            return None
        if found.args[0] not in self._images.scales:
            return None
        if self._context.options.ruled_precision(found.op.layer) is not None:
            return None
        refusal = self._refusal(found)
        if refusal is not None:
            layer = found.op.layer
            self.program.notes.append(f"{layer} is quantised but stays float32: {refusal}")
        return found if refusal is None else None

    def _refusal(self, found: dialect.OperatorCall[Convolution]) -> str | None:
        steps = reach(self._matrix(found))
        changes = {"types": QUANTISED, "epilogue": (), "steps": steps or 0}
        op = QuantisedConvolution(**{**vars(found.op), **changes})
        refusal = self._context.backend.refuses(op, self._context.target)
        if refusal is None and steps is None:
            return "its weights are more than 127 steps from 0"
        return refusal

    def _matrix(self, found: dialect.OperatorCall[Convolution]) -> np.ndarray:
        w = self.array(found.args[1])
        assert w is not None
        return w.reshape(found.op.matrix)

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if var in self._quantised:
            return self._convolution(var, self._quantised[var])
        if var in self._images.scales:
            return self._image(var)
        return _KEPT if var in self._images.replaced else None

    def bind(self, var: relax.Var, value: Any) -> None:
        if value is not _KEPT:
            super().bind(var, value)

    def new(self, expr: Any) -> Any:
        """The new form of an expression: of bytes, what they stand for."""
        if isinstance(expr, relax.Var) and expr not in self._new and expr in self._bytes:
            scale = self._images.scales[expr]
            op = DequantiseImage(positive=scale.zero == 0)
            steps = self.weight(f"{expr.name}.steps", scale.steps)
            call = dialect.call(op, [self._bytes[expr], steps], shape_of(expr))
            self._new[expr] = self.emit(call, expr.name)
        return super().new(expr)

    def _image(self, var: relax.Var) -> Any:
        """A rounded image: bytes, if they are not there already."""
        first = self._images.first.get(var, var)
        if first in self._bytes:
            self._bytes[var] = self._bytes[first]
            return _KEPT
        scale, source = self._images.scales[var], self._images.sources[var]
        if var in self._images.sums:
            self._bytes[var] = self._sum(var, self._images.sums[var], scale)
            return _KEPT
        given = source.same_as(var)
        if given:
            super().bind(var, super().new(self.graph.value(var)))
        steps = self.weight(f"{var.name}.steps", scale.steps)
        call = dialect.call(QuantiseImage(), [self.new(source), steps], shape_of(var))
        self._bytes[var] = self.emit(call, "bytes")
        return _KEPT

    def _sum(self, var: relax.Var, found: _Sum, scale: _Scale) -> Any:
        a, b = (self._images.scales[image] for image in found.images)
        factors = [one.step / scale.step for one in (a, b)]
        offset = scale.zero - factors[0] * a.zero - factors[1] * b.zero
        low = scale.zero if found.cut else 0.0
        steps = np.array([*factors, offset, low, _LAST_BYTE, scale.zero], np.float32)
        images = [self._bytes[image] for image in found.images]
        weight = self.weight(f"{var.name}.sum", steps)
        return self.emit(dialect.call(AddImages(), [*images, weight], shape_of(var)), "sum")

    def _convolution(self, var: relax.Var, found: dialect.OperatorCall[Convolution]) -> Any:
        op, (x, weight, *extras) = found.op, found.args
        scale = self._images.scales[x]
        values, factor = quantise_rows(self._matrix(found))
        factor = factor.astype(np.float64) * scale.step
        offset = -scale.zero * factor * values.sum(axis=1, dtype=np.float64)
        steps = op.epilogue
        bias = self.array(extras[0]) if steps[:1] == (Bias(),) else None
        if bias is not None:
            offset, steps, extras = offset + bias, steps[1:], extras[1:]
        rounded = self._images.only_rounding_of(var)
        bounds = _bounds(steps) if rounded is not None else None
        if bounds is None:
            types = replace(QUANTISED, output="float32")
            of_rows = self._of_rows(var, factor, offset, 0.0)
            extras = [self.new(extra) for extra in extras]
        else:
            types, steps, aim = QUANTISED, (), self._images.scales[rounded]
            of_rows = self._of_rows(var, factor / aim.step, offset / aim.step + aim.zero, aim.zero)
            low, high = (np.rint(aim.zero + bound / aim.step) for bound in bounds)
            limits = np.array([max(low, 0), min(high, _LAST_BYTE), aim.zero], np.float32)
            extras = [self.weight(f"{var.name}.limits", limits)]
        quantised = QuantisedConvolution(**{**vars(op), "types": types, "epilogue": steps})
        args = [self._bytes[x], self.new(weight), *of_rows, *extras]
        call = dialect.call(quantised, args, shape_of(var))
        if bounds is None:
            return call
        self._bytes[rounded] = self.emit(call, var.name)
        return _KEPT

    def _of_rows(
        self, var: relax.Var, factor: np.ndarray, offset: np.ndarray, nothing: float
    ) -> list[Any]:
        """A convolution's numbers for each output channel, and for those that fill a word."""
        pad = (0, -len(factor) % _WORD_BYTES)
        padded = np.pad(factor, pad), np.pad(offset, pad, constant_values=nothing)
        names = f"{var.name}.factor", f"{var.name}.offset"
        return [
            self.weight(name, values.astype(np.float32))
            for name, values in zip(names, padded, strict=True)
        ]


def _bounds(steps: tuple[Step, ...]) -> tuple[float, float] | None:
    """Between which bounds steps keep what they are given, if that is all they do."""
    low, high = -np.inf, np.inf
    for step in steps:
        if step == Activation("relu"):
            step = Clamp(low=0.0)
        if not isinstance(step, Clamp):
            return None
        below, above = step.low, step.high
        if below is not None:
            low, high = max(low, below), max(high, below)
        if above is not None:
            low, high = min(low, above), min(high, above)
    return low, high
