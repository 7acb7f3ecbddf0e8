"""Append rows: whole rows go behind a cache, other concatenations stay Relax's."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, assert_unchanged, build, compile_and_run, operators
from tvm import relax

from sparse_tvm.passes.cpu.append_rows import append_rows

OP = relax.op


def joined(axis):
    def body(emit, cache, new):
        return OP.concat([cache, emit(OP.tanh(new))], axis)

    return body


@pytest.mark.parametrize(
    ("cache", "new", "axis"),
    [
        ((2, 3, 300, 32), (2, 3, 1, 32), 2),
        ((2, 3, "past", 32), (2, 3, "new", 32), -2),
        ((2, "past", 4, 8), (2, "new", 4, 8), 1),
        ((5, 16), (7, 16), 0),
    ],
)
@pytest.mark.parametrize("past", [0, 1, 700])
def test_appended(cache, new, axis, past):
    before = build(joined(axis), {"cache": cache, "new": new})
    assert "append_rows" in operators(apply(append_rows, before))
    sizes = {"past": past, "new": 3}
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal([sizes.get(n, n) for n in shape]).astype("float32")
        for shape in (cache, new)
    ]
    expected = np.concatenate([arrays[0], np.tanh(arrays[1])], axis=axis)
    np.testing.assert_allclose(compile_and_run(before, *arrays), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "shape", "dtypes"),
    [
        (joined(2), (2, 3, 32), {}),
        (joined(1), (2, 3, 20), {}),
        (joined(1), (2, 3, "size"), {}),
        (lambda emit, a, b: OP.concat([emit(OP.tanh(a)), emit(OP.exp(b))], 1), (2, 3, 32), {}),
        (
            lambda emit, a, b: OP.concat([a, b], 1),
            (2, 3, 32),
            {"cache": "int64", "new": "int64"},
        ),
    ],
    ids=["the last axis", "rows of 20", "rows of any size", "no input", "integers"],
)
def test_left_alone(body, shape, dtypes):
    assert_unchanged(append_rows, build(body, {"cache": shape, "new": shape}, dtypes=dtypes))
