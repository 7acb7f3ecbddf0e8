"""Tensors whose sizes only run time knows take turns in few storages."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm.relax.backend.cpu_generic.pipeline import finalize_passes
from tvm.script.ir_builder import tirx as T

from sparse_tvm.backends.share_storage import share_storage
from sparse_tvm.schedules.cpu.lane_tiles import argument, prim_func, symbol

TARGET = tvm.target.Target("llvm")
ALLOC = "relax.memory.alloc_storage"


def widened(inputs: int, outputs: int) -> tirx.PrimFunc:
    """``y[i, j] = x[i, j % inputs] + 1`` of rows of so many features."""
    with prim_func() as result:
        rows = symbol("rows")
        x, y = argument("x", (rows, inputs)), argument("y", (rows, outputs))
        with T.serial(0, rows) as i, T.serial(0, outputs) as j:
            T.buffer_store(y, x[i, j % inputs] + T.float32(1), [i, j])
    return result["func"]


def added(features: int) -> tirx.PrimFunc:
    with prim_func() as result:
        rows = symbol("rows")
        a, b, y = (argument(name, (rows, features)) for name in "aby")
        with T.serial(0, rows) as i, T.serial(0, features) as j:
            T.buffer_store(y, a[i, j] + b[i, j], [i, j])
    return result["func"]


def network(widths: list[int], residual: int | None = None, view: bool = False) -> tvm.IRModule:
    """Layers of these widths, one after the other, for any number of rows.

    The layer ``residual`` is added to the last one. With ``view``, each is looked at as one row
    of all, and back, before the next one reads it.
    """
    builder, n = relax.BlockBuilder(), tirx.Var("n", "int64")

    def of(width: int) -> Any:
        return relax.TensorType((n, width), "float32")

    x = relax.Var("x", of(widths[0]))
    with builder.function("main", [x]):
        values = [x]
        for before, after in pairwise(widths):
            value = values[-1]
            if view and len(values) > 1:
                value = builder.emit(relax.op.reshape(value, relax.ShapeExpr([n * before])))
                value = builder.emit(relax.op.reshape(value, relax.ShapeExpr([n, before])))
            kernel = builder.add_func(widened(before, after), f"from_{before}_to_{after}")
            values.append(builder.emit(relax.call_tir(kernel, value, of(after))))
        if residual is not None:
            kernel = builder.add_func(added(widths[-1]), "add")
            operands = [values[-1], values[residual]]
            values.append(builder.emit(relax.call_tir(kernel, operands, of(widths[-1]))))
        builder.emit_func_output(values[-1])
    return builder.get()


def expected(x: np.ndarray, widths: list[int], residual: int | None) -> np.ndarray:
    values = [x]
    for before, after in pairwise(widths):
        values.append(values[-1][:, np.arange(after) % before] + np.float32(1))
    return values[-1] if residual is None else values[-1] + values[residual]


def planned(module: tvm.IRModule, *, shares: bool) -> tuple[tvm.IRModule, tvm.IRModule]:
    """After planning, and to the end."""
    plan, *rest = finalize_passes(TARGET)
    steps = [relax.transform.RewriteDataflowReshape(), relax.transform.ToNonDataflow()]
    steps += [relax.transform.RemovePurityChecking(), relax.transform.CallTIRRewrite(), plan]
    with TARGET:
        module = tvm.transform.Sequential([*steps, *([share_storage] if shares else [])])(module)
        return module, tvm.transform.Sequential(rest)(module)


def sizes(module: tvm.IRModule) -> list[str]:
    """Of all storages, in bytes."""
    return [
        str(binding.value.args[0].values[0])
        for block in module["main"].body.blocks
        for binding in block.bindings
        if isinstance(binding.value, relax.Call) and getattr(binding.value.op, "name", "") == ALLOC
    ]


@pytest.mark.parametrize(
    ("widths", "residual", "before", "after"),
    [
        ([8, 32, 4, 16, 8], None, 3, 2),
        ([8, 4, 16, 32, 64, 8], None, 4, 2),
        ([8, 32, 8, 16, 8], 2, 4, 3),
        ([8, 16, 8, 16, 8], None, 2, 2),
    ],
    ids=["shrinking", "growing", "a residual waits", "equal sizes share already"],
)
@pytest.mark.parametrize("view", [False, True])
def test_storages_take_turns(widths, residual, before, after, view):
    module = network(widths, residual, view)
    assert len(sizes(planned(module, shares=False)[0])) == before
    shared, program = planned(module, shares=True)
    assert len(sizes(shared)) == after
    executable = relax.build(program, TARGET, relax_pipeline=None)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    for rows in (1, 100, 3):
        x = np.random.default_rng(rows).standard_normal((rows, widths[0]), np.float32)
        found = machine["main"](tvm.runtime.tensor(x)).numpy()
        np.testing.assert_array_equal(found, expected(x, widths, residual))


def test_a_storage_is_as_large_as_any_that_it_stands_for():
    shared, _ = planned(network([8, 4, 16, 32, 64, 8]), shares=True)
    bytes_per_row = [(16, 128), (64, 256)]
    largest = [f"T.max(T.int64({a}) * n, T.int64({b}) * n)" for a, b in bytes_per_row]
    assert sizes(shared) == largest


def test_what_is_small_does_not_wait_in_what_is_large():
    shared, _ = planned(network([4, 64, 32, 4, 60, 28, 4], residual=3), shares=True)
    largest = ["T.max(T.int64(256) * n, T.int64(240) * n)"]
    largest.append("T.max(T.int64(128) * n, T.int64(112) * n)")
    assert sizes(shared) == [*largest, "T.int64(16) * n", "T.int64(16) * n"]


def test_known_sizes_are_left_to_tvm():
    module = relax.transform.BindSymbolicVars({"n": 7})(network([8, 32, 4, 16, 8]))
    before, _ = planned(module, shares=False)
    tvm.ir.assert_structural_equal(share_storage(before), before)
