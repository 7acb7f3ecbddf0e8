"""The steps of an LSTM, GRU or RNN: per step a product with the hidden state, then the gates.

The input's part of the gates, which is there for all steps, is one large product made before. The
sequences of a batch do not depend on each other: as many as there are lanes go through all steps
together, so that their states stay in the first cache. Each thread has some of the units: in each
step it multiplies the rows of all gates for them (:mod:`row_product`), and then computes those
gates, units in the lanes: little beside a dense weight, but not beside a sparse one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from sparse_tvm.operators import Recurrent
from sparse_tvm.schedules.cpu.block_arrays import stacked_rows
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
    stack = n // hidden
    stored_units = stacked_rows(hidden, op.stored, simd.rows_abreast(op.stored))
    shapes = {
        "bias": (hidden,),
        "peepholes": (3 * hidden,),
        "lengths": (batch,),
        "hidden": (batch, hidden),
        "cell": (batch, hidden),
    }
    with prim_func() as result:
        gates = argument("gates", (steps, batch, n))
        weight = StoredWeight.declare(op.stored, stack * stored_units, hidden, stack=stack)
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
    """A few sequences and their states.

    Of a vector of units, ``h`` has all sequences' vectors one after the other, where a step changes
    them: the product reads a copy. ``c`` is ``[m, hidden]``.
    """

    def __init__(self, network: _Network, first: Expr, m: int) -> None:
        self.network, self.op, self.first, self.m = network, network.op, first, m
        self.hidden, self.lanes = network.op.hidden, network.simd.lanes
        self.gates = network.op.matrix[0] // self.hidden
        self.product = row_product(network.weight, m, network.simd)
        self.h = T.alloc_buffer((m * self.hidden,), "float32")
        twice = self.op.cell == "gru" and not self.op.reset_after
        self.of_reset = T.alloc_buffer((m * self.hidden,), "float32") if twice else None
        self.c = T.alloc_buffer((m * self.hidden,), "float32") if self.op.states == 2 else None

    def run(self) -> None:
        """Begin, take all steps, and store the last states."""
        self._each(self._begin)
        with T.serial(0, self.network.steps) as step:
            self._put(self.h)
            first = 0
            if self.of_reset is not None:
                first = self.gates - 1
                self._on_all_threads(range(first), step, self._reset)
                self._put(self.of_reset)
            self._on_all_threads(range(first, self.gates), step, self._advance)
        self._each(self._end)

    def _put(self, state: Buffer) -> None:
        """Hand a state of all units to the product."""

        def put(unit: Expr, lanes: int) -> None:
            values = [state[self._at(i, unit, lanes)] for i in range(self.m)]
            if lanes > 1:
                self.product.put(unit, values)
                return
            for i, value in enumerate(values):
                T.buffer_store(self.product.xs, value, [self.product.place(unit, i, 1)])

        self._over_units(0, self.hidden, put)

    def _on_all_threads(
        self, gates: range, step: Expr, body: Callable[[_Place, Expr, int], None]
    ) -> None:
        """Some gates' product, and then ``body(place, unit, lanes)``: each thread for its units."""
        product, threads = self.product, self.network.threads
        block_rows = product.width // product.block // self.gates
        with T.parallel(0, threads) as thread:
            start, stop = product.share(thread, threads)
            for gate in gates:
                offset = gate * block_rows
                product.run(scalar(start + offset), scalar(stop + offset))
            # The last block may be more than there are, and the share of a thread nothing.
            first, last = (
                scalar(tirx.min(block * product.block, self.hidden)) for block in (start, stop)
            )

            def some_units(unit: Expr, lanes: int) -> None:
                for gate in gates if lanes > 1 else ():
                    product.by_row(self.output(gate, unit))
                with T.serial(0, self.m) as i:
                    self._at_step(i, step, unit, lanes, body)

            self._over_units(first, last, some_units)

    def _at_step(
        self,
        i: Expr,
        step: Expr,
        unit: Expr,
        lanes: int,
        body: Callable[[_Place, Expr, int], None],
    ) -> None:
        """``body`` for a sequence that lasts that long."""
        row = self._row(i)
        length = self._length(row)
        time = scalar(length - 1 - step) if self.op.backward else step
        with T.If(step < length):  # always, where all are as long
            with T.Then():
                body(_Place(self, i, row, time), unit, lanes)
            with T.Else():
                self._pad(step, row, unit, lanes)

    def _each(self, body: Callable[[Expr, Expr, Expr, int], None]) -> None:
        """``body(i, row, unit, lanes)`` for all units; sequence ``i`` is the batch's ``row``."""
        with T.serial(0, self.m) as i:
            row = self._row(i)
            self._over_units(0, self.hidden, lambda unit, lanes: body(i, row, unit, lanes))

    def _length(self, row: Expr) -> Expr:
        """Steps of a sequence, whatever is said of it: no more than there are."""
        steps, lengths = self.network.steps, self.network.given.get("lengths")
        return steps if lengths is None else scalar(tirx.min(lengths[row], steps))

    def _row(self, i: Expr) -> Expr:
        return scalar(tirx.min(self.first + i, self.network.batch - 1))

    def _over_units(self, first: Expr, last: Expr, body: Callable[[Expr, int], None]) -> None:
        """``body(unit, lanes)`` for a range of units, vectors of them as far as there are."""
        count, lanes = last - first, self.lanes
        with T.serial(0, count // lanes) as vector:
            body(first + vector * lanes, lanes)
        if not isinstance(count, int) or count % lanes:
            with T.serial(0, count % lanes) as unit:
                body(first + count // lanes * lanes + unit, 1)

    def _at(self, i: Expr, unit: Expr, lanes: int) -> Expr:
        """Where a sequence's part of a state is."""
        return span(unit * self.m + i * lanes, lanes)

    def output(self, gate: int, unit: Expr) -> Expr:
        """The product's output for a unit of a gate."""
        return gate * (self.product.width // self.gates) + unit

    def _begin(self, i: Expr, row: Expr, unit: Expr, lanes: int) -> None:
        def initial(name: str) -> Expr:
            state = self.network.given.get(name)
            if state is None:
                return constant(0.0, self.network.gates[0, row, span(unit, lanes)])
            return state[row, span(unit, lanes)]

        T.buffer_store(self.h, initial("hidden"), [self._at(i, unit, lanes)])
        if self.c is not None:
            T.buffer_store(self.c, initial("cell"), [span(i * self.hidden + unit, lanes)])

    def _end(self, i: Expr, row: Expr, unit: Expr, lanes: int) -> None:
        """Store the last states: 0 for a sequence without any step, as ONNX Runtime has it."""
        states, steps, at = self.network.states, self.network.steps, span(unit, lanes)
        last = [self.h[self._at(i, unit, lanes)]]
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
        at = self._at(place.i, unit, lanes)
        reset = self._gate(place.before(1, unit, lanes))
        T.buffer_store(self.of_reset, reset * self.h[at], [at])

    def _advance(self, place: _Place, unit: Expr, lanes: int) -> None:
        """One step of some units."""
        advance = {"lstm": self._lstm, "gru": self._gru, "rnn": self._rnn}[self.op.cell]
        value = _held(advance(place, unit, lanes))
        T.buffer_store(self.h, value, [self._at(place.i, unit, lanes)])
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
        before = self.h[self._at(place.i, unit, lanes)]
        keep = self._gate(place.before(0, unit, lanes))
        product = place.product(2, unit, lanes)
        if self.op.reset_after:
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
        output = self.sequences.output(gate, unit)
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
