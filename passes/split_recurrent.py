"""Split recurrent: what a recurrent network does to its input becomes one dense layer.

Matches ``onnx.LSTM``, ``onnx.GRU`` and ``onnx.RNN``, as the importer writes these operators. In
each direction, the input of all steps is multiplied at once, by a dense layer like any other; what
is left for the steps, a product with the hidden state and the gates, becomes one
``sparse_tvm.recurrent``, whose weight may be sparse too. So a network has two layers for each
direction. Weights that are no constants are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from sparse_tvm.errors import ModelError
from sparse_tvm.families import WeightedFamily
from sparse_tvm.operators import Recurrent
from sparse_tvm.passes import dialect
from sparse_tvm.passes.graph import Graph, Rewrite, product, shape_of
from sparse_tvm.passes.infrastructure import Context, Property, graph_pass
from sparse_tvm.passes.program import Program

_CELLS = {"onnx.LSTM": "lstm", "onnx.GRU": "gru", "onnx.RNN": "rnn"}
_FUNCTIONS = {"lstm": 3, "gru": 2, "rnn": 1}
_WAYS = {
    "forward": ("forward",),
    "reverse": ("backward",),
    "bidirectional": ("forward", "backward"),
}


def _unsplit(program: Program) -> Iterable[str]:
    for binding in Graph(program.module["main"]).bindings:
        if (found := _match(binding.value)) is not None:
            yield f"{binding.var.name} is an {found.cell}"


RECURRENT_SPLIT = Property("recurrent networks are dense layers and steps", _unsplit)


@graph_pass(ensures=[RECURRENT_SPLIT])
def split_recurrent(program: Program, context: Context) -> Program:
    """Apply the pass."""
    return _SplitRecurrent(program, context).run()


@dataclass(frozen=True)
class _Network:
    """A call of ONNX's operator, taken apart.

    Attributes
    ----------
    cell : str
        As the operator of ours has it.
    inputs : dict[str, Any]
        By the names of the standard; those left out are absent.
    attributes : dict[str, Any]
        All of them.
    """

    cell: str
    inputs: dict[str, Any]
    attributes: dict[str, Any]

    @property
    def reset_after(self) -> bool:
        """Whether a GRU resets the product of the hidden state."""
        return self.cell == "gru" and bool(self.attributes["linear_before_reset"])

    @property
    def batch_first(self) -> bool:
        """Whether the batch comes before the steps."""
        return bool(self.attributes["layout"])


def _match(expr: Any) -> _Network | None:
    if not (
        isinstance(expr, relax.Call)
        and getattr(expr.op, "name", None) == "relax.call_dps_packed"
        and getattr(expr.args[0], "global_symbol", None) in _CELLS
    ):
        return None
    *operands, text = expr.args[1].fields
    attributes = json.loads(text.value)
    inputs = dict(zip(attributes["inputs"], operands, strict=True))
    return _Network(_CELLS[expr.args[0].global_symbol], inputs, attributes)


@dataclass(frozen=True)
class _Outputs:
    """What stands for a call's outputs."""

    values: list[Any]


class _SplitRecurrent(Rewrite):
    def __init__(self, program: Program, context: Context) -> None:
        super().__init__(program)
        self._context = context
        self._outputs: dict[Any, _Outputs] = {}

    def rewrite(self, var: relax.Var, value: Any) -> Any:
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in self._outputs:
            return self._outputs[value.tuple_value].values[value.index]
        network = _match(value)
        return self._split(network, var.name) if network is not None else None

    def bind(self, var: relax.Var, value: Any) -> None:
        if isinstance(value, _Outputs):
            self._outputs[var] = value
        else:
            super().bind(var, value)

    def _split(self, network: _Network, name: str) -> _Outputs:
        x = self.new(network.inputs["X"])
        if network.batch_first:
            x = self.emit(relax.op.permute_dims(x, [1, 0, 2]))
        ways = _WAYS[network.attributes["direction"]]
        each = [_Direction(self, self._context, network, d, ways, name) for d in range(len(ways))]
        states = [direction.states(x) for direction in each]
        return _Outputs(self._outputs_of(network, states, shape_of(x)[0]))

    def _outputs_of(self, network: _Network, states: list[Any], steps: Any) -> list[Any]:
        """The operator's outputs: all hidden states, the last one, and an LSTM's last cell."""

        def part(first: Any, stop: Any) -> list[Any]:
            return [
                self.emit(relax.op.strided_slice(s, [0], [first], [stop], assume_inbound=True))
                for s in states
            ]

        every = []
        for one in part(0, steps):
            _, batch, hidden = shape_of(one)
            every.append(self.emit(relax.op.reshape(one, (steps, 1, batch, hidden))))
        outputs = [self._joined(every, 1)]
        outputs += [self._joined(part(steps, steps + 1), 0)]
        if network.cell == "lstm":
            outputs += [self._joined(part(steps + 1, steps + 2), 0)]
        if network.batch_first:
            orders = [[2, 0, 1, 3], [1, 0, 2], [1, 0, 2]]
            outputs = [
                self.emit(relax.op.permute_dims(output, order))
                for output, order in zip(outputs, orders, strict=False)
            ]
        return outputs

    def _joined(self, parts: list[Any], axis: int) -> Any:
        return parts[0] if len(parts) == 1 else self.emit(relax.op.concat(parts, axis))


class _Direction:
    """One direction of a network."""

    def __init__(
        self,
        rewrite: _SplitRecurrent,
        context: Context,
        network: _Network,
        index: int,
        ways: tuple[str, ...],
        name: str,
    ) -> None:
        self.rewrite, self.context, self.network = rewrite, context, network
        self.index, self.name = index, name
        self.backward = ways[index] == "backward"
        self.suffix = f".{ways[index]}" if len(ways) > 1 else ""

    def states(self, x: Any) -> Any:
        """The hidden states, and behind them the last states."""
        emit, network = self.rewrite.emit, self.network
        steps, batch, features = shape_of(x)
        w, _, _ = self._matrix("W")
        # As one sequence of tokens: a step has as few as there are sequences.
        tokens = emit(relax.op.reshape(x, (1, product((steps, batch)), features)))
        gates = emit(relax.op.matmul(tokens, emit(relax.op.permute_dims(w))))
        optional: dict[str, Any] = {}
        if "B" in network.inputs:
            bias, optional["bias"] = self._biases()
            gates = emit(relax.op.add(gates, bias))
        r, layer, constant = self._matrix("R")
        rows, hidden = shape_of(r)
        gates = emit(relax.op.reshape(gates, (steps, batch, rows)))
        if "P" in network.inputs:
            optional["peepholes"] = self._part("P")
        if "sequence_lens" in network.inputs:
            optional["lengths"] = self.rewrite.new(network.inputs["sequence_lens"])
        for given, name in (("initial_h", "hidden"), ("initial_c", "cell")):
            if given in network.inputs:
                optional[name] = self._state(given)
        present = {name: value for name, value in optional.items() if value is not None}
        op = self._operator(layer, (rows, hidden), tuple(present), constant)
        if not constant:
            r = emit(relax.op.reshape(r, (rows, hidden, 1)))
        shape = (steps + op.states, batch, hidden)
        return emit(dialect.call(op, [gates, r, *present.values()], shape), network.cell)

    def _operator(
        self, layer: str, matrix: tuple[int, int], given: tuple[str, ...], constant: bool
    ) -> Recurrent:
        attributes, cell = self.network.attributes, self.network.cell
        count = _FUNCTIONS[cell]
        functions = attributes["activations"][self.index * count :][:count]
        op = Recurrent(
            layer=layer,
            matrix=matrix,
            cell=cell,
            functions=tuple(name.lower() for name in functions),
            given=given,
            backward=self.backward,
            reset_after=self.network.reset_after,
            clip=attributes["clip"],
        )
        backend, target = self.context.backend, self.context.target
        refusal = backend.refuses(op, target)
        if refusal is not None:
            raise ModelError(
                f"{layer or self.name} cannot be compiled for {target.name}: {refusal}"
            )
        if constant:
            return op
        family = backend.accepting(op, target)[0]
        assert isinstance(family, WeightedFamily)
        return replace(op, layout=family.unpacked(op))

    def _matrix(self, name: str) -> tuple[Any, str, bool]:
        """A weight as a matrix, the layer that it is of, and whether it is constant."""
        operand, rewrite = self.network.inputs[name], self.rewrite
        array = rewrite.array(operand)
        if array is None:
            return self._part(name), f"{self.name}.{name}{self.suffix}", False
        source = self._source(name)
        weight = rewrite.weight(f"{source}{self.suffix}", array[self.index])
        layer = rewrite.program.layers.get(source, source) + self.suffix
        rewrite.program.layers[weight.name] = layer
        return weight, layer, True

    def _source(self, name: str) -> str:
        value = self.rewrite.graph.value(self.network.inputs[name])
        return str(value.name) if isinstance(value, relax.Var) else f"{self.name}.{name}"

    def _part(self, name: str) -> Any:
        """This direction's part of an operand, without the axis of directions."""
        operand, array = self.network.inputs[name], self.rewrite.array(self.network.inputs[name])
        if array is not None:
            return self.rewrite.weight(f"{self._source(name)}{self.suffix}", array[self.index])
        return self._of_direction(self.rewrite.new(operand), 0)

    def _of_direction(self, tensor: Any, axis: int) -> Any:
        emit, at = self.rewrite.emit, self.index
        if shape_of(tensor)[axis] > 1:
            tensor = emit(
                relax.op.strided_slice(tensor, [axis], [at], [at + 1], assume_inbound=True)
            )
        return emit(relax.op.squeeze(tensor, [axis]))

    def _state(self, name: str) -> Any:
        """An initial state ``[batch, hidden]``."""
        axis = 1 if self.network.batch_first else 0
        return self._of_direction(self.rewrite.new(self.network.inputs[name]), axis)

    def _biases(self) -> tuple[Any, Any]:
        """What is added to all gates, and what a GRU adds to its candidate's product alone."""
        array = self.rewrite.array(self.network.inputs["B"])
        if array is None:
            return self._computed_biases()
        of_input, of_state = np.split(array[self.index], 2)
        name = f"{self._source('B')}{self.suffix}"
        if not self.network.reset_after:
            return self.rewrite.weight(name, of_input + of_state), None
        gates, candidate = np.split(of_state, [2 * len(of_state) // 3])
        total = of_input + np.concatenate([gates, np.zeros_like(candidate)])
        return self.rewrite.weight(name, total), self.rewrite.weight(f"{name}.reset", candidate)

    def _computed_biases(self) -> tuple[Any, Any]:
        emit = self.rewrite.emit
        both = self._part("B")
        size = shape_of(both)[0] // 2

        def part(first: int, stop: int) -> Any:
            return emit(relax.op.strided_slice(both, [0], [first], [stop], assume_inbound=True))

        if not self.network.reset_after:
            return emit(relax.op.add(part(0, size), part(size, 2 * size))), None
        gates = size * 2 // 3
        total = emit(relax.op.add(part(0, gates), part(size, size + gates)))
        total = emit(relax.op.concat([total, part(gates, size)], 0))
        return total, part(size + gates, 2 * size)
