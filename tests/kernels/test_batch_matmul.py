"""The kernel of products of two activations against NumPy: any shapes, orders of axes and CPU."""

from __future__ import annotations

import numpy as np
from harness import PER_FORM, every_form, run, simd, thread_counts
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_tvm.schedules.cpu.batch_matmul import Operand, batch_matmul
from sparse_tvm.schedules.cpu.lane_tiles import symbol

extents = st.one_of(st.sampled_from([1, 2, 4, 15, 16, 17, 48]), st.integers(1, 70))
problems = st.fixed_dictionaries(
    {
        "batch": st.lists(st.integers(1, 3), max_size=2),
        "m": extents,
        "k": extents,
        "n": extents,
        "orders": st.tuples(*[st.sampled_from(["as it is", "transposed", "rows first"])] * 2),
        "broadcast": st.booleans(),
        "symbolic": st.sets(st.sampled_from("mkn")),
        "threads": thread_counts,
        "seed": st.integers(0, 2**16),
    }
)
SMALL = {
    "batch": [2, 3],
    "m": 17,
    "k": 5,
    "n": 21,
    "orders": ("as it is", "as it is"),
    "broadcast": False,
    "symbolic": set(),
    "threads": 2,
    "seed": 0,
}


@given(problem=problems)
@example(problem=SMALL)
@example(problem={**SMALL, "orders": ("transposed", "transposed")})
@example(problem={**SMALL, "m": 1, "n": 48, "broadcast": True})
@PER_FORM
@every_form
def test_batch_matmul(target, problem):
    check(target=target, **problem)


def check(target, batch, m, k, n, orders, broadcast, symbolic, threads, seed):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*batch, m, k)).astype("float32")
    b = rng.standard_normal((*([1] * len(batch) if broadcast else batch), k, n)).astype("float32")
    names = {"m": m, "k": k, "n": n}
    extent = {name: symbol(name) if name in symbolic else size for name, size in names.items()}
    operands, stored = [], []
    for value, order, ends in ((a, orders[0], "mk"), (b, orders[1], "kn")):
        axes = stored_axes(value.ndim, order)
        logical = [*value.shape[:-2], *(extent[name] for name in ends)]
        operands.append(Operand([logical[axes.index(i)] for i in range(value.ndim)], axes))
        stored.append(np.ascontiguousarray(value.transpose(np.argsort(axes))))
    kernel = batch_matmul(*operands, [*batch, extent["m"], extent["n"]], simd(target))
    result = run(kernel, target, threads, stored, (*batch, m, n))
    expected = a.astype("float64") @ b.astype("float64")
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * max(1, k))


def stored_axes(rank, order):
    """Which stored axis each logical one is."""
    axes = list(range(rank))
    if order == "transposed":
        axes[-1], axes[-2] = axes[-2], axes[-1]
    elif order == "rows first":
        axes = [*range(1, rank - 1), 0, rank - 1]
    return axes
