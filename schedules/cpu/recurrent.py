"""The steps of an LSTM, GRU or RNN: per step a product with the hidden state, then the gates.

The input's part of the gates, which is there for all steps, is one large product made before. The
sequences of a batch do not depend on each other: as many as there are lanes go through all steps
together, so that their states stay in the first cache. Each step multiplies the weight on all
threads (:mod:`row_product`); the gates, a hundredth of the work, are computed by one, sequence by
sequence, units in the lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Recurrent
from sparse_tvm.schedules.cpu.lane_tiles import (
    Buffer,
    Expr,
    argument,
    local,
    prim_func,
    scalar,
    span,
)
from sparse_tvm.schedules.cpu.row_cost import sequences_together
from sparse_tvm.schedules.cpu.row_product import row_product
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.schedules.cpu.stored_weight import StoredWeight
from sparse_tvm.schedules.cpu.vector_math import ACTIVATIONS, constant, lanes_of


def recurrent(op: Recurrent, steps: Expr, batch: Expr, simd: Simd) -> tirx.PrimFunc:
    """Build the kernel; ``steps`` and ``batch`` are numbers, or symbols that run time binds.

    Arguments of the PrimFunc, in order: gates ``[steps, batch, N]``; the weight's arrays; of the
    operator's optional operands those that are given: bias ``[hidden]``, peepholes ``[3 * hidden]``
    (input, output, forget), lengths int32 ``[batch]``, hidden and cell state ``[batch, hidden]``;
    last the states ``[steps + op.states, batch, hidden]``.
    """
    n, hidden = op.matrix
    shapes = {
        "bias": (hidden,),
        "peepholes": (3 * hidden,),
        "lengths": (batch,),
        "hidden": (batch, hidden),
        "cell": (batch, hidden),
    }
    with prim_func() as result:
        gates = argument("gates", (steps, batch, n))
        weight = StoredWeight.declare(op.stored, n, hidden)
        given = {
            name: argument(name, shapes[name], "int32" if name == "lengths" else "float32")
            for name in op.given
        }
        states = argument("states", (steps + op.states, batch, hidden))
        threads = scalar(tirx.call_packed("runtime.NumThreads"))
        network = _Network(op, steps, batch, weight, gates, given, states, simd, threads)
        _by_sequences(batch, simd, network.run)
    return result["func"]


def _by_sequences(batch: Expr, simd: Simd, run: Callable[[Expr, int], None]) -> None:
    """``run(first, m)`` for all sequences, as many together as there are kernels for."""
    *few, most = sequences_together(simd.lanes)
    if not isinstance(batch, int) or batch >= most:
        with T.serial(0, batch // most) as group:
            run(group * most, most)
    first, rest = scalar(batch // most * most), scalar(batch % most)
    below = 0
    for count in (*few, most):
        if not isinstance(rest, int):
            with T.If(tirx.all(rest > below, rest <= count)), T.Then():
                run(first, count)
        elif below < rest <= count:
            run(first, count)
        below = count


@dataclass(frozen=True)
class _Network:
    """One layer and direction, with the arguments of the open PrimFunc."""

    op: Recurrent
    steps: Expr
    batch: Expr
    weight: StoredWeight
    gates: Buffer
    given: dict[str, Buffer]
    states: Buffer
    simd: Simd
    threads: Expr

    def run(self, first: Expr, m: int) -> None:
        """Take ``m`` sequences through all steps; the last one repeats where there are fewer."""
        _Sequences(self, first, m).run()


class _Sequences:
    """A few sequences, their states ``h`` ``[hidden, m]`` and ``c`` ``[m, hidden]``."""

    def __init__(self, network: _Network, first: Expr, m: int) -> None:
        self.network, self.op, self.first, self.m = network, network.op, first, m
        self.hidden = network.op.hidden
        self.product = row_product(network.weight, m, network.simd)
        self.h = self.product.xs
        twice = self.op.cell == "gru" and not self.op.reset_after
        self.of_reset = row_product(network.weight, m, network.simd) if twice else None
        self.c = T.alloc_buffer((m * self.hidden,), "float32") if self.op.states == 2 else None

    def run(self) -> None:
        """Begin, take all steps, and store the last states."""
        self._each(self._begin)
        with T.serial(0, self.network.steps) as step:
            self.product.run_parallel(self.network.threads)
            if self.of_reset is not None:
                self._each_at(step, self._reset)
                self.of_reset.run_parallel(self.network.threads)
            self._each_at(step, self._advance)
        self._each(self._end)

    def _each(self, body: Callable[[Expr, Expr, Expr, int], None]) -> None:
        """``body(i, row, unit, lanes)`` for all units; sequence ``i`` is the batch's ``row``."""
        with T.serial(0, self.m) as i:
            row = self._row(i)
            self._over_units(lambda unit, lanes: body(i, row, unit, lanes))

    def _each_at(self, step: Expr, body: Callable[[_Place, Expr, int], None]) -> None:
        """``body(place, unit, lanes)`` for all units of the sequences that last that long."""
        with T.serial(0, self.m) as i:
            row = self._row(i)
            length = self._length(row)
            time = scalar(length - 1 - step) if self.op.backward else step
            place = _Place(self, i, row, time)
            with T.If(step < length):  # always, where all are as long
                with T.Then():
                    self._over_units(lambda unit, lanes: body(place, unit, lanes))
                with T.Else():
                    self._over_units(lambda unit, lanes: self._pad(step, row, unit, lanes))

    def _length(self, row: Expr) -> Expr:
        """Steps of a sequence, whatever is said of it: no more than there are."""
        steps, lengths = self.network.steps, self.network.given.get("lengths")
        return steps if lengths is None else scalar(tirx.min(lengths[row], steps))

    def _row(self, i: Expr) -> Expr:
        return scalar(tirx.min(self.first + i, self.network.batch - 1))

    def _over_units(self, body: Callable[[Expr, int], None]) -> None:
        lanes = self.network.simd.lanes
        with T.serial(0, self.hidden // lanes) as vector:
            body(vector * lanes, lanes)
        if self.hidden % lanes:
            with T.serial(0, self.hidden % lanes) as unit:
                body(self.hidden // lanes * lanes + unit, 1)

    def _h(self, i: Expr, unit: Expr, lanes: int) -> Expr:
        """Where the hidden state of some units is."""
        return self.product.place(unit, i, lanes)

    def _begin(self, i: Expr, row: Expr, unit: Expr, lanes: int) -> None:
        def initial(name: str) -> Expr:
            state = self.network.given.get(name)
            if state is None:
                return constant(0.0, self.network.gates[0, row, span(unit, lanes)])
            return state[row, span(unit, lanes)]

        T.buffer_store(self.h, initial("hidden"), [self._h(i, unit, lanes)])
        if self.c is not None:
            T.buffer_store(self.c, initial("cell"), [span(i * self.hidden + unit, lanes)])

    def _end(self, i: Expr, row: Expr, unit: Expr, lanes: int) -> None:
        """Store the last states: 0 for a sequence without any step, as ONNX Runtime has it."""
        states, steps, at = self.network.states, self.network.steps, span(unit, lanes)
        last = [self.h[self._h(i, unit, lanes)]]
        if self.c is not None:
            last += [self.c[span(i * self.hidden + unit, lanes)]]
        for which, value in enumerate(last):
            if "lengths" in self.network.given:
                nothing = constant(0.0, value)
                value = T.if_then_else(self._length(row) > 0, value, nothing)
            T.buffer_store(states, value, [steps + which, row, at])

    def _pad(self, step: Expr, row: Expr, unit: Expr, lanes: int) -> None:
        """Behind the end of a sequence its output is 0."""
        nothing = constant(0.0, self.network.gates[0, row, span(unit, lanes)])
        T.buffer_store(self.network.states, nothing, [step, row, span(unit, lanes)])

    def _reset(self, place: _Place, unit: Expr, lanes: int) -> None:
        """The part of a GRU's hidden state that the candidate sees."""
        assert self.of_reset is not None
        at = self._h(place.i, unit, lanes)
        reset = self._gate(place.before(1, unit, lanes))
        T.buffer_store(self.of_reset.xs, reset * self.h[at], [at])

    def _advance(self, place: _Place, unit: Expr, lanes: int) -> None:
        """One step of some units."""
        advance = {"lstm": self._lstm, "gru": self._gru, "rnn": self._rnn}[self.op.cell]
        value = _held(advance(place, unit, lanes))
        T.buffer_store(self.h, value, [self._h(place.i, unit, lanes)])
        T.buffer_store(self.network.states, value, [place.time, place.row, span(unit, lanes)])

    def _lstm(self, place: _Place, unit: Expr, lanes: int) -> Expr:
        at = span(place.i * self.hidden + unit, lanes)
        assert self.c is not None
        before = _held(self.c[at])
        enter, leave, keep, new = (place.before(gate, unit, lanes) for gate in range(4))
        enter = self._gate(enter + self._peephole(0, unit, before))
        keep = self._gate(keep + self._peephole(2, unit, before))
        cell = _held(keep * before + enter * self._function(1, new))
        T.buffer_store(self.c, cell, [at])
        return self._gate(leave + self._peephole(1, unit, cell)) * _apply(
            self.op.functions[2], cell
        )

    def _peephole(self, gate: int, unit: Expr, cell: Expr) -> Expr:
        peepholes = self.network.given.get("peepholes")
        if peepholes is None:
            return constant(0.0, cell)
        return peepholes[span(gate * self.hidden + unit, lanes_of(cell))] * cell

    def _gru(self, place: _Place, unit: Expr, lanes: int) -> Expr:
        before = self.h[self._h(place.i, unit, lanes)]
        keep = self._gate(place.before(0, unit, lanes))
        if self.of_reset is not None:
            product = self.of_reset.sums(2 * self.hidden + unit, place.i, lanes)
        else:
            product = place.product(2, unit, lanes)
            bias = self.network.given.get("bias")
            if bias is not None:
                product = product + bias[span(unit, lanes)]
            product = self._gate(place.before(1, unit, lanes)) * product
        new = self._function(1, place.input(2, unit, lanes) + product)
        return new + keep * (before - new)

    def _rnn(self, place: _Place, unit: Expr, lanes: int) -> Expr:
        return self._function(0, place.before(0, unit, lanes))

    def _gate(self, value: Expr) -> Expr:
        return self._function(0, value)

    def _function(self, which: int, value: Expr) -> Expr:
        if self.op.clip is not None:
            low, high = (constant(sign * self.op.clip, value) for sign in (-1, 1))
            value = tirx.max(tirx.min(value, high), low)
        return _apply(self.op.functions[which], value)


@dataclass(frozen=True)
class _Place:
    """Sequence ``i`` of those together, ``row`` of the batch, at a time."""

    sequences: _Sequences
    i: Expr
    row: Expr
    time: Expr

    def input(self, gate: int, unit: Expr, lanes: int) -> Expr:
        """What the input adds to some units of a gate."""
        at = span(gate * self.sequences.hidden + unit, lanes)
        return self.sequences.network.gates[self.time, self.row, at]

    def product(self, gate: int, unit: Expr, lanes: int) -> Expr:
        """What the hidden state adds to them."""
        output = gate * self.sequences.hidden + unit
        return self.sequences.product.sums(output, self.i, lanes)

    def before(self, gate: int, unit: Expr, lanes: int) -> Expr:
        """Some units of a gate, before its activation."""
        return self.input(gate, unit, lanes) + self.product(gate, unit, lanes)


def _held(value: Expr) -> Expr:
    """The value in a register: computed once, read often."""
    lanes = lanes_of(value)
    kept, at = local(lanes), span(0, lanes)
    T.buffer_store(kept, value, [at])
    return kept[at]


def _apply(function: str, value: Expr) -> Expr:
    """An activation, computed here."""
    return _held(ACTIVATIONS[function](_held(value)))
