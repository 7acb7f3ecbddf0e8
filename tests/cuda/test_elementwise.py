"""Elementwise functions by rows: which ones, and that they compute the same on the emulated GPU."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from gpu_harness import SM90, run
from tvm import te, topi
from tvm.s_tir import dlight

from sparse_tvm.schedules.cuda.elementwise import Rows

pytestmark = pytest.mark.usefixtures("gpu")


def scheduled(*tensors) -> tvm.tirx.PrimFunc | None:
    """The function of TE tensors by the rule; None where it does not apply."""
    function = te.create_prim_func(list(tensors))
    target = tvm.target.Target(SM90.tvm_target())
    with target:
        schedule = Rows().apply(function, target, False)
    return None if schedule is None else schedule.mod["main"]


@pytest.mark.parametrize("width", [128, 200, 768, 1030, 3000])
def test_rows_of_a_table(width):
    rng = np.random.default_rng(width)
    table = rng.standard_normal((9, width)).astype(np.float32)
    bias = rng.standard_normal((3, width)).astype(np.float32)
    ids = rng.integers(0, 9, (2, 3)).astype(np.int64)
    a, b = te.placeholder(table.shape, name="a"), te.placeholder(bias.shape, name="b")
    i = te.placeholder(ids.shape, "int64", name="i")
    function = scheduled(a, b, i, topi.add(topi.take(a, i, 0), b))
    assert function is not None
    found = run(function, [table, bias, ids], np.empty((2, 3, width), np.float32), SM90)
    np.testing.assert_array_equal(found, table[ids] + bias)


def test_open_sizes():
    rows = te.var("rows", "int64")
    x = te.placeholder((rows, 256), name="x")
    function = scheduled(x, topi.multiply(x, 2.0))
    assert function is not None
    array = np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32)
    found = run(function, [array], np.empty_like(array), SM90)
    np.testing.assert_array_equal(found, array * 2)


@pytest.mark.parametrize(
    "made",
    [
        lambda x: topi.sum(x, 1),
        lambda x: topi.nn.softmax(x),
        lambda x: topi.reshape(x, (4, 4, 64, 1)),
        lambda x: topi.reshape(x, (1024,)),
    ],
    ids=["a sum", "several blocks", "short rows", "no rows"],
)
def test_what_is_left_to_tvm(made):
    x = te.placeholder((4, 256), name="x")
    assert scheduled(x, made(x)) is None


def test_tvm_applies_it():
    x = te.placeholder((4, 256), name="x")
    module = tvm.IRModule({"main": te.create_prim_func([x, topi.multiply(x, 2.0)])})
    with tvm.target.Target(SM90.tvm_target()):
        module = dlight.ApplyDefaultSchedule(Rows())(module)
    assert "threadIdx.x" in str(module["main"])
