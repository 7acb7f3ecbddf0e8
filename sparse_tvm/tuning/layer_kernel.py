"""The kernel of one layer alone, as the compiler would build it in the midst of a model.

A program of that one layer goes through the backend's own passes; of what they make of it, only the
layer's kernel is kept, with the extents of its operands. So whatever a family's operands look like
(lane tiles, lines of bytes, planes), it is timed on what it would get.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from tvm import relax, tirx
from tvm.sym import Analyzer

from sparse_tvm.operators import STILL, Bias, Convolution, Dense, Layout, WeightedOperator
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import is_number
from sparse_tvm.passes.infrastructure import Context
from sparse_tvm.passes.program import Program
from sparse_tvm.tuning.runner import Argument

_LAYER = "layer"
_SMALL = 3
"""What random whole numbers are below."""


@dataclass(frozen=True)
class Call:
    """A layer as a model calls it.

    Attributes
    ----------
    op : WeightedOperator
        The layer, its layout not chosen yet.
    leading : tuple[int | None, ...]
        Extents of the activations but for their features: of a dense layer all in front of them,
        of a convolution the batch. None where run time decides.
    """

    op: WeightedOperator
    leading: tuple[int | None, ...]

    @property
    def symbolic(self) -> bool:
        """Whether run time decides how many tokens, or images, there are."""
        return None in self.leading

    def possible(self, tokens: Sequence[int]) -> list[int]:
        """The numbers of tokens nearest to these that the known extents allow."""
        return list(dict.fromkeys(prod(self.sizes(count)) for count in tokens))

    def sizes(self, tokens: int) -> tuple[int, ...]:
        """Leading extents for a number of tokens: what is free is 1, but for the last."""
        if isinstance(self.op, Convolution) or not self.symbolic:
            videos = self.op.frames.count if isinstance(self.op, Convolution) else 1
            return tuple(videos if size is None else size for size in self.leading)
        last = max(i for i, size in enumerate(self.leading) if size is None)
        known = prod(size for size in self.leading if size is not None)
        return tuple(
            (max(1, tokens // known) if i == last else 1) if size is None else size
            for i, size in enumerate(self.leading)
        )


@dataclass(frozen=True)
class LayerKernel:
    """A layer's kernel.

    Attributes
    ----------
    title : str
        Its name.
    function : tvm.tirx.PrimFunc
        The kernel.
    weight : dict[int, np.ndarray]
        The arrays that the weight became, by their place among the arguments.
    """

    title: str
    function: Any
    weight: dict[int, np.ndarray]
    _operands: Sequence[Any]
    _symbols: Sequence[Any]

    def arguments(self, leading: Sequence[int]) -> list[Argument]:
        """What it is called with for such extents, activations and output being random.

        Returns
        -------
        list[Argument]
            In the order of the function's parameters.
        """
        sizes = dict(zip(self._symbols, leading, strict=True))
        known = sizes_known({s: size for s, size in sizes.items() if s is not None})

        def number(dim: Any) -> int:
            return int(known.simplify(dim))

        made: list[Argument] = []
        for place, operand in enumerate(self._operands):
            if place in self.weight:
                made.append(None)
            elif isinstance(operand, relax.TensorType):
                shape = [number(dim) for dim in operand.shape.values]
                made.append([shape, str(operand.dtype), _SMALL])
            else:
                made.append(number(operand))
        return made


def build_kernel(call: Call, w: np.ndarray, layout: Layout, context: Context) -> LayerKernel:
    """Build the kernel of a layer whose weight ``[N, K]`` is stored in this layout."""
    program, symbols = layer_program(call, w, layout, context)
    for phase in context.backend.phases():
        program = phase.run(program, context)
    return _extract(program, symbols)


def layer_program(
    call: Call, w: np.ndarray, layout: Layout, context: Context
) -> tuple[Program, list[Any]]:
    """A model of one layer whose weight is stored, before the backend's passes.

    Its inputs are the activation and what the epilogue reads.

    Returns
    -------
    tuple[Program, list[Any]]
        The model, and the symbols of the leading extents: None where they are known.
    """
    op = replace(call.op, layer=_LAYER, layout=layout)
    family = context.backend.weighted_family(layout)
    arrays = family.pack(op, w, layout, context.target)
    symbols = [
        tirx.Var(f"d{i}", "int64") if size is None else None for i, size in enumerate(call.leading)
    ]
    leading = [
        symbol if size is None else size for size, symbol in zip(call.leading, symbols, strict=True)
    ]
    return _program(op, leading, arrays), symbols


def _program(op: WeightedOperator, leading: list[Any], arrays: Mapping[str, np.ndarray]) -> Program:
    """A model of one layer."""
    if isinstance(op, Convolution):
        window = [
            (size + op.pads[i] + op.pads[i + len(op.size)] - op.dilation[i] * (kernel - 1) - 1)
            // op.stride[i]
            + 1
            for i, (size, kernel) in enumerate(zip(op.size, op.kernel, strict=True))
            if size is not None
        ]
        (images,) = sources = leading
        if op.frames != STILL and isinstance(images, int):
            sources = [images // op.frames.out * op.frames.count]
        elif op.frames != STILL:  # the symbol is of what is read
            leading = [images // op.frames.count * op.frames.out]
        x_shape = [*sources, op.channels, *op.size]
        y_shape = [*leading, op.out_channels, *window]
    else:
        inputs = op.inputs if isinstance(op, Dense) else op.matrix[1]
        x_shape, y_shape = [*leading, inputs], [*leading, op.matrix[0]]
    x = _variable("x", x_shape)
    extras = [
        _variable(f"e{i}", [op.matrix[0]] if isinstance(step, Bias) else y_shape)
        for i, step in enumerate(step for step in op.epilogue if step.operand)
    ]
    weights = {f"w.{name}": array for name, array in arrays.items()}
    params = [_variable(name, array.shape, str(array.dtype)) for name, array in weights.items()]
    builder = relax.BlockBuilder()
    attrs = {"num_input": 1 + len(extras)}
    with builder.function("main", [x, *extras, *params], attrs=attrs):
        with builder.dataflow():
            found = dialect.call(op, [x, *params, *extras], y_shape)
            result = builder.emit_output(builder.emit(found, "y"))
        builder.emit_func_output(result)
    return Program(builder.get(), weights, {})


def _variable(name: str, shape: Sequence[Any], dtype: str = "float32") -> Any:
    return relax.Var(name, relax.TensorType(tuple(shape), dtype))


def _extract(program: Program, symbols: Sequence[Any]) -> LayerKernel:
    """The layer's kernel out of a program that the backend's passes are done with."""
    title = next(name for name, known in program.kernels.items() if _LAYER in known["layers"])
    for block in program.module["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if not isinstance(value, relax.Call) or not value.args:
                continue
            called = value.args[0]
            if getattr(called, "name_hint", None) != title:
                continue
            operands = list(value.args[1].fields)
            weight = {
                place: program.weights[operand.name]
                for place, operand in enumerate(operands)
                if isinstance(operand, relax.Var) and operand.name in program.weights
            }
            kinds = [operand if is_number(operand) else operand.ty for operand in operands]
            function = program.module[title]
            return LayerKernel(title, function, weight, [*kinds, binding.var.ty], symbols)
    raise AssertionError(f"{title}: no call of it was found")


def sizes_known(sizes: Mapping[Any, int]) -> Analyzer:
    """What simplifies extents to numbers, for these sizes of symbols."""
    analyzer = Analyzer()
    for symbol, size in sizes.items():
        analyzer.bind(symbol, tirx.IntImm("int64", size))
    return analyzer
