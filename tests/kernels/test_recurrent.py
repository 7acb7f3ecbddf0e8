"""The steps of recurrent networks against NumPy, in every layout of the weight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from harness import PER_FORM, ROUNDED, every_form, run, simd, thread_counts
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_tvm.operators import Layout, Recurrent
from sparse_tvm.schedules.cpu.block_arrays import split_arrays
from sparse_tvm.schedules.cpu.lane_tiles import symbol
from sparse_tvm.schedules.cpu.recurrent import recurrent

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
FUNCTIONS = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
}
LAYOUTS = [
    Layout("recurrent", "dense", (16, 1)),
    Layout("recurrent", "dense", (1, 1)),
    Layout("recurrent", "csr"),
    Layout("recurrent", "bsr", (4, 1)),
    Layout("recurrent", "bsr", (8, 1)),
    Layout("recurrent", "bsr", (16, 1)),
    Layout("recurrent", "bsr", (3, 2)),
    Layout("recurrent", "sell"),  # of as many lanes as the target has
]


def expected(op: Recurrent, gates: np.ndarray, w: np.ndarray, given: dict) -> np.ndarray:
    """What ONNX defines, a sequence and a step at a time."""
    steps, batch, _ = gates.shape
    size = op.hidden
    states = np.zeros((steps + op.states, batch, size))

    def function(which, value):
        bound = np.inf if op.clip is None else op.clip
        return FUNCTIONS[op.functions[which]](np.clip(value, -bound, bound))

    for row in range(batch):
        h = given.get("hidden", np.zeros((batch, size)))[row].astype("float64")
        c = given.get("cell", np.zeros((batch, size)))[row].astype("float64")
        bias, peepholes = given.get("bias", 0), given.get("peepholes", np.zeros(3 * size))
        length = given.get("lengths", np.full(batch, steps))[row]
        for time in reversed(range(length)) if op.backward else range(length):
            x, product = (each.reshape(-1, size) for each in (gates[time, row], w @ h))
            if op.cell == "lstm":
                p = peepholes.reshape(3, size)
                i, o, f, new = x + product
                i, f = function(0, i + p[0] * c), function(0, f + p[2] * c)
                c = f * c + i * function(1, new)
                h = function(0, o + p[1] * c) * FUNCTIONS[op.functions[2]](c)
            elif op.cell == "gru":
                z, r = function(0, x[:2] + product[:2])
                candidate = r * (product[2] + bias)
                if not op.reset_after:
                    candidate = w[2 * size :] @ (r * h)
                h = (1 - z) * function(1, x[2] + candidate) + z * h
            else:
                h = function(0, x[0] + product[0])
            states[time, row] = h
        last = [h, c][: op.states] if length else [0.0] * op.states
        for which, state in enumerate(last):
            states[steps + which, row] = state
    return states


@st.composite
def networks(draw):
    cell = draw(st.sampled_from(list(GATES)))
    functions = st.sampled_from(list(FUNCTIONS))
    gate = () if cell == "rnn" else (draw(st.sampled_from(["sigmoid", "tanh"])),)
    rest = [draw(functions) for _ in range({"lstm": 2, "gru": 1, "rnn": 1}[cell])]
    layout = draw(st.sampled_from(LAYOUTS))
    hidden = draw(st.integers(16 if layout.format == "sell" else 2, 40))
    reset_after = cell == "gru" and draw(st.booleans())
    possible = ["lengths", "hidden"]
    possible += ["peepholes", "cell"] if cell == "lstm" else []
    possible += ["bias"] if reset_after else []
    chosen = draw(st.sets(st.sampled_from(possible)))
    return Recurrent(
        layer="net",
        matrix=(GATES[cell] * hidden, hidden),
        layout=layout,
        cell=cell,
        functions=(*gate, *rest),
        given=tuple(
            name for name in ("bias", "peepholes", "lengths", "hidden", "cell") if name in chosen
        ),
        backward=draw(st.booleans()),
        reset_after=reset_after,
        clip=draw(st.sampled_from([None, 0.5])),
    )


def stored(w, op, target):
    """The weight's arrays, as the family packs them."""
    together, abreast = simd(target).weights_together, simd(target).rows_abreast
    stack = GATES[op.cell]
    return split_arrays(w, op.stored, together(op.stored), abreast(op.stored), stack)


@given(
    op=networks(),
    steps=st.integers(1, 5),
    batch=st.one_of(st.integers(1, 5), st.integers(15, 35)),
    values_of=st.sampled_from(list(ROUNDED)),
    symbolic=st.booleans(),
    threads=thread_counts,
    seed=st.integers(0, 9),
)
@settings(PER_FORM, max_examples=6)
@every_form
def test_recurrent(target, op, steps, batch, values_of, symbolic, threads, seed):
    rng = np.random.default_rng(seed)
    if op.stored.format == "sell":
        op = replace(op, layout=op.stored.having(sell=simd(target).lanes))
    n, hidden = op.matrix

    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    w = normal(n, hidden) * (rng.random((n, hidden)) < 0.3)
    if op.stored.block == (1, 1) and not op.stored.sparse:
        arrays = {"data": w[:, :, None]}
    else:
        if values_of != "float32":
            op = replace(op, layout=op.stored.having(**{values_of: 1}))
        w = ROUNDED[values_of](w)
        arrays = stored(w, op, target)
    values = {
        "bias": normal(hidden),
        "peepholes": normal(3 * hidden),
        "lengths": rng.integers(0, steps + 1, batch).astype("int32"),
        "hidden": normal(batch, hidden),
        "cell": normal(batch, hidden),
    }
    optional = {name: values[name] for name in op.given}
    gates = normal(steps, batch, n)
    extents = (symbol("steps"), symbol("batch")) if symbolic else (steps, batch)
    kernel = recurrent(op, *extents, simd(target))
    arguments = [gates, *arrays.values(), *optional.values()]
    found = run(kernel, target, threads, arguments, (steps + op.states, batch, hidden))
    wanted = expected(op, gates, w.astype("float64"), optional)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * max(1, abs(wanted).max()))


def test_a_thread_without_units_computes_none():
    hidden = 9  # all in one block of sixteen
    op = Recurrent(
        layer="net",
        matrix=(3 * hidden, hidden),
        layout=Layout("recurrent", "bsr", (16, 1)),
        cell="gru",
        functions=("sigmoid", "tanh"),
    )
    rng, target = np.random.default_rng(0), every_form.args[1][0]
    w, gates = (rng.standard_normal(shape, "float32") for shape in (op.matrix, (5, 3, 3 * hidden)))
    arguments = [gates, *stored(w, op, target).values()]
    found = run(recurrent(op, 5, 3, simd(target)), target, 2, arguments, (6, 3, hidden))
    np.testing.assert_allclose(found, expected(op, gates, w, {}), rtol=1e-4, atol=1e-4)


def test_a_length_beyond_the_steps_reads_nothing_behind_them():
    op = Recurrent(
        layer="net",
        matrix=(4, 4),
        layout=Layout("recurrent", "dense", (16, 1)),
        cell="rnn",
        functions=("relu",),
        given=("lengths",),
    )
    target = every_form.args[1][0]
    kernel = recurrent(op, 2, 2, simd(target))
    gates, lengths = np.ones((2, 2, 4), "float32"), np.array([1000, -1], "int32")
    arrays = stored(np.zeros((4, 4), "float32"), op, target)
    found = run(kernel, target, 1, [gates, *arrays.values(), lengths], (3, 2, 4))
    np.testing.assert_array_equal(found[:, 0], 1)
    np.testing.assert_array_equal(found[:, 1], 0)
