"""The distinct kernels of a model: its layers as the compiler sees them just before it stores them.

The compiler's own passes run up to the one that chooses layouts, so what is tuned is what will be
compiled, epilogues and element types included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sparse_tvm.operators import Convolution, Recurrent, WeightedOperator
from sparse_tvm.passes import dialect
from sparse_tvm.passes.dense_to_sparse import dense_to_sparse, typical_tokens, weights_of
from sparse_tvm.passes.graph import Rewrite, shape_of
from sparse_tvm.passes.infrastructure import Context, Pass
from sparse_tvm.passes.pipeline import phases
from sparse_tvm.passes.program import Program
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.tuning.layer_kernel import Call
from sparse_tvm.tuning.records import Problem


@dataclass
class TunedLayer:
    """A kernel that one or more layers of the model need.

    Attributes
    ----------
    call : Call
        The first of these layers, with its name.
    matrix : np.ndarray
        Its weight ``[N, K]``.
    weight : MeasuredWeight
        What there is to know of that.
    problem : Problem
        As records have it.
    tokens : Sequence[int]
        Numbers of tokens that the layers see, or may see; the usual one first.
    layers : list[str]
        All of them.
    """

    call: Call
    matrix: np.ndarray
    weight: MeasuredWeight
    problem: Problem
    tokens: Sequence[int]
    layers: list[str] = field(default_factory=list)

    def at(self, tokens: Sequence[int]) -> TunedLayer:
        """The same for other numbers of tokens, where it is not settled how many there are."""
        if not self.call.symbolic or isinstance(self.call.op, Convolution):
            return self
        return replace(self, tokens=self.call.possible(tokens))

    @property
    def title(self) -> str:
        """What the kernel computes, for people."""
        op = self.call.op
        n, k = op.matrix
        block = "x".join(map(str, self.weight.block)) if self.weight.block else "unstructured"
        zeros = f"{self.weight.sparsity:.0%} {block}" if self.weight.sparsity else "no zeros"
        return " ".join([op.name, f"{n}x{k}", *op.step_titles, f"({zeros})"])


def layers_of(program: Program, context: Context) -> tuple[list[TunedLayer], list[str]]:
    """The kernels that an imported model needs, those of most weight first.

    Returns
    -------
    tuple[list[TunedLayer], list[str]]
        The kernels, and why layers were left out.
    """
    program = until_layouts(program, context)
    found: dict[Any, TunedLayer] = {}
    left_out = []
    everything = weights_of(program)
    for op, array, output in layer_calls(program):
        if isinstance(op, Convolution) and None in op.size:
            left_out.append(f"{op.layer}: the size of its images is not known; give --input-shape")
            continue
        if isinstance(op, Recurrent):
            left_out.append(f"{op.layer}: the steps of a recurrent layer are not measured")
            continue
        matrix = array.reshape(op.matrix)
        weight = MeasuredWeight(matrix, everything / matrix.size)
        problem = Problem.of(op, weight, context.target.name)
        dims = output[:1] if isinstance(op, Convolution) else output[:-1]
        leading = tuple(dim if isinstance(dim, int) else None for dim in dims)
        tokens = typical_tokens(op, output)
        key = problem, leading, tuple(tokens)
        if key not in found:
            found[key] = TunedLayer(Call(op, leading), matrix, weight, problem, tokens).at(tokens)
        found[key].layers.append(op.layer)
    kernels = sorted(found.values(), key=lambda one: -len(one.layers) * one.matrix.size)
    return kernels, left_out


def until_layouts(program: Program, context: Context) -> Program:
    """The program just before the pass that stores weights."""
    return until(dense_to_sparse, program, context)


def until(last: Pass, program: Program, context: Context) -> Program:
    """The program just before a pass."""
    for phase in phases(context.backend):
        for one in phase.passes:
            if one is last:
                return program
            program = one(program, context)
    raise AssertionError(f"the pipeline has no {last.name}")


def layer_calls(program: Program) -> Iterator[tuple[WeightedOperator, np.ndarray, tuple[Any, ...]]]:
    """Operator, weight and output shape of each layer, in order."""
    walk = Rewrite(program)
    for binding in walk.graph.bindings:
        call = dialect.match(binding.value, WeightedOperator)
        if call is not None and call.op.layout is None:
            array = walk.array(call.args[1])
            assert array is not None, f"{call.op.layer}: its weight is no constant"
            yield call.op, array, shape_of(binding.var)
