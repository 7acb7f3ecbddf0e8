"""Scheduling what has no kernel: vectors inside, threads where it pays, everything else kept."""

from __future__ import annotations

import pytest
import tvm
from helpers import apply, build, context
from tvm import relax, s_tir, tirx

from sparse_tvm.passes.cpu.legalize import legalize
from sparse_tvm.passes.cpu.schedule_rest import schedule_rest

OP = relax.op
V4 = context(target="x86-64-v4")


def legalized(body, shape):
    return apply(legalize, build(body, {"x": shape}), V4)


def functions(subject):
    return {
        var.name_hint: function
        for var, function in subject.module.functions.items()
        if isinstance(function, tirx.PrimFunc)
    }


@pytest.mark.parametrize(("rows", "parallel"), [(8, False), (4096, True)])
def test_vectors_inside_and_threads_where_it_pays(rows, parallel):
    after = schedule_rest(legalized(lambda emit, x: OP.tanh(x), (rows, 32)), V4)
    (function,) = functions(after).values()
    text = function.script()
    assert "T.vectorized(T.int64(16))" in text
    assert ("T.parallel" in text) == parallel
    assert not after.notes


def test_attributes_are_kept():
    before = legalized(lambda emit, x: OP.tanh(x), (8, 32))
    (old,) = functions(before).values()
    attributes = dict(old.attrs.items())
    (new,) = functions(schedule_rest(before, V4)).values()
    assert dict(new.attrs.items()).keys() == attributes.keys()


def test_kernels_and_main_are_left_alone():
    before = legalized(lambda emit, x: OP.topk(x, 3, 1, "values"), (4, 9))
    old = tvm.IRModule(dict(before.module.functions.items()))
    tvm.ir.assert_structural_equal(schedule_rest(before, V4).module, old)


def test_function_that_cannot_be_scheduled_keeps_its_loops_with_a_note(monkeypatch):
    def refuse(function, simd):
        raise s_tir.ScheduleError("no such loop\ndetails")

    monkeypatch.setattr("sparse_tvm.schedules.cpu.searched.schedule_generic", refuse)
    before = legalized(lambda emit, x: OP.tanh(x), (8, 32))
    ((name, old),) = functions(before).items()
    after = schedule_rest(before, V4)
    tvm.ir.assert_structural_equal(functions(after)[name], old)
    (note,) = after.notes
    assert note.startswith(f"{name} runs in plain loops on one thread")
    assert "ScheduleError" not in note
