"""Whether a model computes each image of a batch for itself, so that a run may take turns.

A layer's output for one image may stay in the caches until the next layer reads it; for eight, it
does not. Where no operator looks at more than one image of the batch, a run may take some at a
time through all layers. What is known of Relax's operators decides; anything else is no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import relax, tirx

from sparse_tvm.passes.graph import Graph, dtype_of, is_tensor, op_name, shape_of
from sparse_tvm.passes.typical_sizes import TypicalSizes

_IMAGE_RANK = 4
_POOLING = {f"nn.{how}_pool{rank}d" for how in ("max", "avg") for rank in (1, 2, 3)}
_ACTIVATIONS = {"nn.relu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "nn.leakyrelu", "nn.softplus"}
_UNARY = {
    *("sigmoid", "tanh", "exp", "log", "erf", "sqrt", "rsqrt", "square", "abs", "negative", "clip"),
    *("nn.adaptive_avg_pool2d", "image.resize2d"),
    *_POOLING,
    *_ACTIVATIONS,
}
_BINARY = {"add", "subtract", "multiply", "divide", "maximum", "minimum", "power"}
_CONVOLUTIONS = {f"nn.conv{rank}d" for rank in (1, 2, 3)} | {
    f"nn.conv{rank}d_transpose" for rank in (1, 2)
}
_WITH_WEIGHT = {"nn.layer_norm", "nn.batch_norm", "nn.prelu", *_CONVOLUTIONS}
_REDUCTIONS = {"mean", "sum", "max", "min"}
_ALONG_AXIS = {"nn.softmax", "nn.log_softmax", "concat"}


@dataclass(frozen=True)
class ImageTurns:
    """A batch whose images a run may take one after the other.

    Attributes
    ----------
    dimension : str
        The batch, in front of inputs and outputs.
    widest, moved : float
        Elements of the largest tensor, and of all, times those of the inputs, for an image of
        typical size.
    """

    dimension: str
    widest: float
    moved: float


def image_turns(function: relax.Function, inputs: int) -> ImageTurns | None:
    """What there is to know of a model's ``main`` to take turns; None if it may not."""
    batch = next(
        (shape_of(x)[0] for x in function.params[:inputs] if _is_image(x)),
        None,
    )
    if not isinstance(batch, tirx.Var):
        return None
    found = _Images(function, inputs, batch)
    if not found.all_apart():
        return None
    sizes = TypicalSizes(function.params[:inputs])
    elements = [_elements(tensor, sizes) for tensor in found.tensors]
    read = sum(_elements(x, sizes) for x in function.params[:inputs] if x in found.apart)
    return ImageTurns(batch.name, max(elements) / read, sum(elements) / read)


def _is_image(x: Any) -> bool:
    return is_tensor(x) and dtype_of(x) == "float32" and len(shape_of(x)) == _IMAGE_RANK


def _elements(tensor: Any, sizes: TypicalSizes) -> int:
    """Elements of a tensor for one image, as far as they are known."""
    return prod(extent or 1 for extent in sizes.of(shape_of(tensor)[1:]))


class _Images:
    """Which tensors ``[batch, ...]`` have in each place what comes of that image alone."""

    def __init__(self, function: relax.Function, inputs: int, batch: tirx.Var) -> None:
        self._graph, self._batch = Graph(function), batch
        self.apart = {x for x in function.params[:inputs] if self._has_batch(x)}
        self._inputs = function.params[:inputs]
        self.tensors: list[Any] = []

    def all_apart(self) -> bool:
        """Whether all results are of that kind."""
        if not all(is_tensor(x) and (x in self.apart or self._knows_none(x)) for x in self._inputs):
            return False
        for binding in self._graph.bindings:
            operands = _tensors(binding.value)
            if not any(operand in self.apart for operand in operands):
                if not self._knows_none(binding.var):
                    return False
                continue
            if not self._keeps_apart(binding.value):
                return False
            self.apart.add(binding.var)
            if is_tensor(binding.var):
                if not self._has_batch(binding.var):
                    return False
                self.tensors.append(binding.var)
        result = self._graph.value(self._graph.result)
        fields = result.fields if isinstance(result, relax.Tuple) else [self._graph.result]
        return bool(self.tensors) and all(field in self.apart for field in fields)

    def _has_batch(self, tensor: Any) -> bool:
        """Whether a tensor's first extent is the batch, and no other depends on it."""
        if not is_tensor(tensor) or not shape_of(tensor):
            return False
        first, *others = shape_of(tensor)
        return self._is_batch(first) and not any(map(self._depends, others))

    def _is_batch(self, extent: Any) -> bool:
        return isinstance(extent, tirx.Var) and extent.same_as(self._batch)

    def _depends(self, extent: Any) -> bool:
        symbols = [] if isinstance(extent, int) else tirx.analysis.undefined_vars(extent)
        return any(map(self._is_batch, symbols))

    def _knows_none(self, tensor: Any) -> bool:
        """Whether a tensor has nothing to do with the batch."""
        return is_tensor(tensor) and not any(map(self._depends, shape_of(tensor)))

    def _keeps_apart(self, value: Any) -> bool:
        """Whether an operator on such tensors, and others, makes another one."""
        if isinstance(value, relax.Var | relax.Tuple):
            return all(field in self.apart for field in _tensors(value))
        if isinstance(value, relax.TupleGetItem):
            normalised = self._graph.op(value.tuple_value, "nn.batch_norm")
            return value.index == 0 and normalised is not None
        name = (op_name(value) or "").removeprefix("relax.")
        operands = _tensors(value)
        apart = [operand in self.apart for operand in operands]
        shapes = [shape_of(operand) for operand in operands if is_tensor(operand)]
        if name in _ALONG_AXIS:
            axis = value.attrs.axis
            return all(apart) and axis is not None and _not_first([axis], len(shapes[0]))
        if name in _BINARY:
            rank = max(map(len, shapes))
            return all(
                len(shape) == rank if mine else len(shape) < rank or shape[0] == 1
                for shape, mine in zip(shapes, apart, strict=True)
            )
        if name == "matmul":
            x, w = map(len, shapes)
            return (apart == [True, False] and x > 1 and w == 2) or (all(apart) and x == w > 2)
        if not apart[0] or any(apart[1:]):
            return False
        return self._of_one(name, value.attrs, len(shapes[0]), alone=len(apart) == 1)

    @staticmethod
    def _of_one(name: str, attrs: Any, rank: int, alone: bool) -> bool:
        """The same for operators on one such tensor, and weights if it is not ``alone``."""
        if name in _WITH_WEIGHT:
            axes = [*getattr(attrs, "axes", []), getattr(attrs, "axis", 1)]
            return _not_first(axes, rank) and not getattr(attrs, "training", False)
        if name == "permute_dims":
            return attrs.axes is not None and int(attrs.axes[0]) == 0
        if name in _REDUCTIONS:
            return attrs.axis is not None and _not_first(attrs.axis, rank)
        # Of a reshape, images lie one after the other, and the batch is in front of both.
        return alone and (name in _UNARY or name == "reshape")


def _not_first(axes: Sequence[Any], rank: int) -> bool:
    return all(int(axis) % rank for axis in axes)


def _tensors(value: Any) -> list[Any]:
    """The tensors, and tuples of them, that an expression reads, in order."""
    if isinstance(value, relax.Call):
        return [tensor for arg in value.args for tensor in _tensors(arg)]
    if isinstance(value, relax.Tuple):
        return [tensor for field in value.fields for tensor in _tensors(field)]
    if isinstance(value, relax.TupleGetItem):
        return [value.tuple_value]
    return [value] if isinstance(value, relax.Var) or is_tensor(value) else []
