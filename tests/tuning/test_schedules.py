"""Operators without a kernel: which schedules are measured, and what comes of that."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tvm
from onnx import parser
from pretended import NATIVE, schedule_job
from tvm import te, topi

import sparse_tvm
from sparse_tvm.cli import main
from sparse_tvm.schedules.cpu.searched import apply_schedule, candidates, fingerprint
from sparse_tvm.schedules.cpu.simd import Simd
from sparse_tvm.targets import get_target
from sparse_tvm.tuning.measuring import Measurer
from sparse_tvm.tuning.provenance import here
from sparse_tvm.tuning.records import append_record, read_records, tidy
from sparse_tvm.tuning.schedule_records import GENERIC, NAIVE, Chosen, ScheduleRecord, Schedules
from sparse_tvm.tuning.tuner import tune

TARGET = get_target()
SIMD = Simd.of(TARGET)
TRACE = json.dumps([[["EnterPostproc", [], [], []]], []])


def softmax(name="x", rows=64):
    x = te.placeholder((rows, 128), name=name)
    return te.create_prim_func([x, topi.nn.softmax(x)])


def offered(function, count=6):
    return candidates(function, TARGET.tvm_target(), 2, count, SIMD)


def record(schedule, seconds, threads=1, date="2026-01-01T00:00:00+00:00", **changes):
    failure = None if seconds is not None else "killed by SIGILL"
    known = ("0123", "softmax", schedule, NATIVE, threads, seconds, 0.01, failure, here(date))
    return replace(ScheduleRecord(*known), **changes)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """A model that is nothing but an operator without a kernel, of a size that is known."""
    path = tmp_path_factory.mktemp("pooled") / "model.onnx"
    graph = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[8, 64, 64] x) => (float[8, 64, 64] y)'
        " { a = Softmax<axis = 1>(x) y = CumSum(a, i) }"
    )
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(2), "i"))
    onnx.save(graph, path)
    return str(path)


def test_every_candidate_computes_the_same():
    function = softmax()
    schedules = offered(function)
    assert schedules[:2] == [GENERIC, NAIVE]
    assert len(schedules) == 8
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    expected = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    for schedule in schedules:
        scheduled = apply_schedule(function, schedule, SIMD).with_attr("global_symbol", "main")
        with tvm.target.Target(TARGET.tvm_target()):
            run = tvm.compile(tvm.IRModule({"main": scheduled})).jit()["main"]
        y = tvm.runtime.tensor(np.empty_like(x))
        run(tvm.runtime.tensor(x), y)
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_the_same_candidates_again_and_applied_the_same_code():
    function = softmax()
    first, again = offered(function), offered(softmax())
    assert first == again
    for schedule in first:
        found = [apply_schedule(function, schedule, SIMD) for _ in range(2)]
        tvm.ir.assert_structural_equal(*found)
    tvm.ir.assert_structural_equal(function, softmax())


def test_names_of_variables_do_not_matter_and_sizes_do():
    named = softmax("z").with_attr("global_symbol", "fused_softmax")
    assert fingerprint(named) == fingerprint(softmax("x"))
    assert fingerprint(softmax(rows=32)) != fingerprint(softmax(rows=64))


@pytest.mark.parametrize("schedule", [NAIVE, GENERIC, TRACE])
def test_a_record_is_read_as_it_was_written(tmp_path, schedule):
    path, one = tmp_path / "r.jsonl", record(schedule, 1e-6)
    append_record(path, one)
    append_record(path, record(schedule, None, threads=2))
    tidy(path)
    found = read_records([path])
    assert not found.remarks
    assert one in list(found.schedules)
    assert found.schedules.failures("0123", NATIVE) == {schedule}
    assert not len(found)  # of layers


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("schedule", "fast", "its schedule is 'fast'"),
        ("seconds", -1.0, "its seconds are -1.0"),
        ("failure", "no", "it has to have either seconds or a failure"),
        ("threads", 0, "threads"),
        ("title", 7, "title"),
    ],
)
def test_a_damaged_record_is_passed_over(tmp_path, key, value, why):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({**record(GENERIC, 1e-6).as_json(), key: value}) + "\n")
    (remark,) = read_records([path]).remarks
    assert why in remark


def test_the_fastest_is_chosen_for_the_threads_and_only_where_it_is_surely_faster():
    known = Schedules()
    for schedule, one, two in ((GENERIC, 4.0, 2.0), (NAIVE, 3.96, 3.0), (TRACE, 2.0, 4.0)):
        known.add(record(schedule, one, 1))
        known.add(record(schedule, two, 2))
    assert known.choose("0123", NATIVE, 1) == Chosen(TRACE, 2.0)
    assert known.choose("0123", NATIVE, 2) == Chosen(GENERIC, 1.0)
    assert known.choose("0123", NATIVE, None) == Chosen(GENERIC, 1.0)
    assert known.choose("4567", NATIVE, 1) is None
    known.add(record(TRACE, 3.99, 1, date="2026-02-01T00:00:00+00:00"))
    assert known.choose("0123", NATIVE, 1) == Chosen(GENERIC, 1.0)


def test_tuned_compiled_and_run(tmp_path, pooled):
    path, some = tmp_path / "r.jsonl", {"threads": [1], "trials": 5}
    tuned = tune(pooled, path, **some)
    assert tuned.operators
    assert not tuned.kernels
    one = tuned.operators[0]
    assert one.usual == GENERIC
    assert one.gain() >= 1
    assert {NAIVE, GENERIC} < one.records.keys()
    before = path.read_text()
    assert tune(pooled, path, **some).operators[0].gain() == one.gain()
    assert path.read_text() == before  # nothing is measured again

    lines = [json.loads(line) for line in before.splitlines()]
    for line in lines:  # pretend that what MetaSchedule found were the fastest
        if isinstance(line["schedule"], list):
            line["seconds"] /= 1000
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "model.so"
    result = sparse_tvm.compile(pooled, output, records=[path], threads=1)
    (note,) = [note for note in result.manifest["notes"] if "as measured" in note]
    assert "auto-scheduled, " in note
    x = np.random.default_rng(0).standard_normal((8, 64, 64)).astype(np.float32)
    (y,) = sparse_tvm.load(output).run({"x": x}).values()
    e = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(y, np.cumsum(e / e.sum(1, keepdims=True), 2), rtol=1e-4)


def test_a_trace_that_does_not_fit_leaves_the_usual_schedule(tmp_path, pooled):
    path = tmp_path / "r.jsonl"
    key = tune(pooled, path, threads=[1], trials=1).operators[0].fingerprint
    path.unlink()
    wrong = json.dumps([[["GetSBlock", [], ["nowhere", "main"], ["b0"]]], []])
    for schedule, seconds in ((GENERIC, 2.0), (wrong, 1.0)):
        append_record(path, record(schedule, seconds, function=key))
    result = sparse_tvm.compile(pooled, tmp_path / "model.so", records=[path])
    assert not any("as measured" in note for note in result.manifest["notes"])


class Crashing(Measurer):
    """Its worker dies of whatever MetaSchedule finds."""

    def schedule(self, job):
        if job["schedule"] not in (None, GENERIC, NAIVE):
            return {"failure": "killed by SIGSEGV"}
        return super().schedule(job)


def test_a_crash_costs_its_candidate_only(tmp_path, pooled):
    path = tmp_path / "r.jsonl"
    tuned = tune(pooled, path, threads=[1], trials=4, measurer=Crashing())
    one = tuned.operators[0]
    assert one.best in (GENERIC, NAIVE)
    assert len(read_records([path]).schedules.failures(one.fingerprint, NATIVE)) >= 1


def test_wrong_results_are_a_failure():
    trace = json.dumps([[["GetSBlock", [], ["nowhere", "main"], ["b0"]]], []])
    job = schedule_job(tvm.ir.save_json(softmax()), NAIVE, trace)
    with Measurer() as measurer:
        assert "nowhere" in measurer.schedule(job)["failure"]
        (fine,) = measurer.schedule({**job, "schedule": NAIVE})["results"]
        (paired,) = measurer.schedule({**job, "schedule": GENERIC, "beside": NAIVE})["results"]
    assert 0 < fine["seconds"] < 1
    assert paired["relative"] > 0


def test_the_command_says_what_it_found_and_what_it_left_out(tmp_path, pooled, capsys):
    path = str(tmp_path / "r.jsonl")
    command = ["tune", pooled, "-o", path, "--threads", "1", "--trials", "3"]
    assert main(command) == 0
    output = capsys.readouterr()
    assert "usual schedule" in output.err
    assert "operator" in output.out
    assert main([*command, "--no-operators"]) == 2
    assert "there is nothing to tune" in capsys.readouterr().err
