"""Kernels in several forms: attention's blocks are measured, recorded, and applied."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from pretended import NATIVE, schedule_job

import sparse_tvm
from sparse_tvm.backends import get_backend
from sparse_tvm.families import Extents
from sparse_tvm.operators import Attention
from sparse_tvm.targets import get_target
from sparse_tvm.tuning.forms import KernelCall
from sparse_tvm.tuning.measuring import Measurer
from sparse_tvm.tuning.provenance import here
from sparse_tvm.tuning.records import append_record, read_records, tidy
from sparse_tvm.tuning.runner import CAUSAL, random_array
from sparse_tvm.tuning.schedule_records import GENERIC, Chosen, ScheduleRecord, Schedules, kind
from sparse_tvm.tuning.tuner import tune

HEADS, SIZE, ROWS = 2, 16, 48
TILES = Extents((1, 3, HEADS * SIZE, 16))
CALL = KernelCall(
    Attention(heads=HEADS, scale=0.25, mask=(False, False, True, True)),
    [TILES, TILES, TILES, Extents((1, 3, ROWS, 16)), Extents((ROWS,), "int64", numbers=True)],
    TILES,
)
MASK = np.where(np.tri(ROWS, dtype=bool), 0, -1e9).astype(np.float32)[None, None]


def record(form, seconds, function="0123", threads=1, tokens=None, **changes):
    failure = None if seconds is not None else "killed by SIGILL"
    date = "2026-01-01T00:00:00+00:00"
    known = (function, "attention", form, NATIVE, threads, seconds, 0.01, failure, here(date))
    return replace(ScheduleRecord(*known, tokens), **changes)


def families():
    backend = get_backend("cpu")
    return [backend.family_for(CALL.op, get_target())]


@pytest.fixture(scope="module")
def attentive(tmp_path_factory):
    """Paths of a model of one attention, by whether run time decides how many tokens it sees."""
    paths = {}
    for symbolic in (False, True):
        b, s = ("batch", "tokens") if symbolic else (1, ROWS)
        m = "" if symbolic else f", float[1, 1, {ROWS}, {ROWS}] mask"
        added = "t = Identity(s1)" if symbolic else "t = Add(s1, mask)"
        heads = " ".join(
            f"{x}0 = MatMul(x, w{x}) {x}1 = Reshape({x}0, split) "
            f"{x}2 = Transpose<perm = [0, 2, {'3, 1' if x == 'k' else '1, 3'}]>({x}1)"
            for x in "qkv"
        )
        graph = parser.parse_model(
            f'<ir_version: 8, opset_import: ["" : 17]> g (float[{b}, {s}, 32] x{m}) =>'
            f" (float[{b}, {s}, 32] y) {{ {heads} s0 = MatMul(q2, k2) s1 = Mul(s0, scale) {added}"
            " p = Softmax<axis = -1>(t) o = MatMul(p, v2)"
            " o1 = Transpose<perm = [0, 2, 1, 3]>(o) y = Reshape(o1, join) }"
        )
        rng = np.random.default_rng(0)
        arrays = {f"w{x}": rng.standard_normal((32, 32)).astype(np.float32) / 4 for x in "qkv"}
        arrays |= {"scale": np.float32(0.25), "split": np.array([0, 0, HEADS, SIZE])}
        arrays["join"] = np.array([0, 0, HEADS * SIZE])
        for name, array in arrays.items():
            graph.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        path = tmp_path_factory.mktemp("attentive") / "model.onnx"
        onnx.save(graph, path)
        paths[symbolic] = str(path)
    return paths


def test_a_call_is_read_as_it_was_written():
    again = KernelCall.read(CALL.text)
    assert again == CALL
    assert again.fingerprint == CALL.fingerprint
    other = replace(CALL, operands=[*CALL.operands[:4], Extents((40,), "int64", numbers=True)])
    assert other.fingerprint != CALL.fingerprint


def test_the_usual_form_comes_first_and_every_form_is_a_name():
    (family,) = families()
    forms = CALL.forms(family, get_target())
    assert next(iter(forms)) == GENERIC
    assert len(forms) > 2
    assert all(kind(name) == f"blocks of {name}" for name in forms if name != GENERIC)
    assert len({op.blocks for op in forms.values()}) == len(forms)


@pytest.mark.parametrize("tokens", [None, 128])
@pytest.mark.parametrize("form", [GENERIC, "16x1"])
def test_a_record_is_read_as_it_was_written(tmp_path, form, tokens):
    path, one = tmp_path / "r.jsonl", record(form, 1e-6, tokens=tokens)
    append_record(path, one)
    append_record(path, record(form, None, threads=2, tokens=tokens))
    tidy(path)
    assert ("tokens" in json.loads(path.read_text().splitlines()[0])) == (tokens is not None)
    found = read_records([path])
    assert not found.remarks
    assert one in list(found.schedules)
    assert found.schedules.failures("0123", NATIVE) == {form}


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("schedule", "0x2", "its schedule is '0x2'"),
        ("schedule", "8x", "its schedule is '8x'"),
        ("schedule", 8, "its schedule is 8"),
        ("tokens", 0, "tokens"),
        ("tokens", "many", "tokens"),
    ],
)
def test_a_damaged_record_is_passed_over(tmp_path, key, value, why):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({**record("8x2", 1e-6, tokens=8).as_json(), key: value}) + "\n")
    (remark,) = read_records([path]).remarks
    assert why in remark


def test_the_mean_over_all_numbers_of_tokens_decides():
    known = Schedules()
    for form, few, many in ((GENERIC, 1.0, 1.0), ("8x2", 0.5, 1.0), ("8x1", 2.0, 0.25)):
        known.add(record(form, few, tokens=16))
        known.add(record(form, many, tokens=128))
    assert known.choose("0123", NATIVE, 1) == Chosen("8x2", pytest.approx(2**0.5))
    known.add(record("6x4", 0.1, tokens=16))  # not measured for 128
    assert known.choose("0123", NATIVE, 1).schedule == "8x2"


def test_a_mask_of_the_measurement_is_causal():
    shown = random_array([1, 3, ROWS, 16], "float32", CAUSAL) == 0
    of_query = shown[0].transpose(0, 2, 1).reshape(ROWS, ROWS)
    np.testing.assert_array_equal(of_query, np.tri(ROWS, dtype=bool))
    after_a_cache = random_array([1, 1, 20, 16], "float32", CAUSAL) == 0
    assert after_a_cache[0, 0].sum(0).tolist() == list(range(5, 21))


def job(form, **changes):
    shapes = [[list(one.shape), one.dtype, 3] for one in (*CALL.operands[:4], CALL.output)]
    return schedule_job(CALL.text, GENERIC, form, arguments=shapes, **changes)


def test_a_worker_lists_times_and_refuses_forms():
    with Measurer() as measurer:
        listed = measurer.schedule(job(None))["schedules"]
        (paired,) = measurer.schedule(job(listed[1], beside=GENERIC))["results"]
        failure = measurer.schedule(job("90x7"))["failure"]
    assert listed == list(CALL.forms(families()[0], get_target()))
    assert paired["relative"] > 0
    assert f"{NATIVE} has no blocks of 90x7 of attention" in failure


@pytest.mark.parametrize("symbolic", [False, True], ids=["known", "symbolic"])
def test_tuned_compiled_and_run(tmp_path, attentive, symbolic):
    path, model = tmp_path / "r.jsonl", attentive[symbolic]
    some = {"threads": [1], "trials": 3, "layers": "attention"}
    if symbolic:
        some["tokens"] = [40, 64]
    tuned = tune(model, path, **some)
    assert not tuned.kernels
    assert [one.tokens for one in tuned.operators] == ([40, 64] if symbolic else [None])
    for one in tuned.operators:
        assert one.usual == GENERIC
        assert len(one.records) == 3
        assert one.gain() >= 1
    before = path.read_text()
    tune(model, path, **some)
    assert path.read_text() == before  # nothing is measured again

    lines = [json.loads(line) for line in before.splitlines()]
    (form, *_) = {line["schedule"] for line in lines} - {GENERIC}
    for line in lines:
        line["seconds"] = 1.0 if line["schedule"] == form else 2.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = sparse_tvm.compile(model, tmp_path / "tuned.so", records=[path], threads=1)
    (note,) = [note for note in result.manifest["notes"] if "measured" in note]
    assert f"(measured: blocks of {form}, 2.00x faster than usual)" in note
    untuned = sparse_tvm.compile(model, tmp_path / "untuned.so")
    assert not any("measured" in note for note in untuned.manifest["notes"])
    feeds = {"x": np.random.default_rng(1).standard_normal((1, ROWS, 32)).astype(np.float32)}
    if not symbolic:
        feeds["mask"] = MASK
    (y,), (expected,) = (
        sparse_tvm.load(tmp_path / name).run(feeds).values() for name in ("tuned.so", "untuned.so")
    )
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_what_is_measured_as_usual_stays_and_a_form_that_is_not_offered_too(tmp_path, attentive):
    path = tmp_path / "r.jsonl"
    tuned = tune(attentive[False], path, threads=[1], trials=1, layers="attention")
    key = tuned.operators[0].fingerprint
    for seconds in (3.0, 1.0):
        path.unlink()
        append_record(path, record(GENERIC, 2.0, key))
        append_record(path, record("900x7", seconds, key))
        result = sparse_tvm.compile(attentive[False], tmp_path / "model.so", records=[path])
        notes = [note for note in result.manifest["notes"] if "measured" in note]
        assert all("(measured: the usual form)" in note for note in notes)
        assert len(notes) == (seconds > 2.0)
