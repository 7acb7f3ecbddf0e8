"""Records: read, written, merged, passed over, and found again."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from pretended import CSR, DENSE, NATIVE, layer_of, record, sparse_weight

from sparse_tvm.errors import OptionError
from sparse_tvm.sparsity.statistics import MeasuredWeight
from sparse_tvm.tuning.evidence import Evidence
from sparse_tvm.tuning.provenance import here
from sparse_tvm.tuning.records import (
    Record,
    Records,
    append_record,
    nearest,
    read_records,
    tidy,
)

W = sparse_weight()


def collected(*records):
    found = Records()
    for one in records:
        found.add(one)
    return found


def file_of(path, *records):
    for one in records:
        append_record(path, one)
    return path


def test_a_record_survives_its_line():
    for one in (record(W, DENSE, 1e-4), record(W, CSR.having(parts=3), None, threads=2)):
        assert Record.from_json(json.loads(json.dumps(one.as_json()))) == one


def test_a_record_says_how_fast_the_clock_was_where_that_is_known():
    one = record(W, DENSE, 1e-4)
    paced = replace(one, provenance=replace(one.provenance, pace=0.9))
    assert "pace" not in one.as_json()
    assert paced.as_json()["pace"] == 0.9
    assert Record.from_json(paced.as_json()) == paced


def test_the_newest_of_a_kind_stays_in_any_order(tmp_path):
    old = record(W, CSR, 1e-5, date="2026-01-01T00:00:00+00:00")
    new = record(W, CSR, 3e-5, date="2026-02-01T00:00:00+00:00")
    faster = record(W, CSR, 2e-5, date="2026-02-01T00:00:00+00:00")
    other = record(W, DENSE, 1e-4)
    texts = set()
    for number, order in enumerate(itertools.permutations([old, new, faster, other])):
        path = file_of(tmp_path / f"{number}.jsonl", *order)
        tidy(path)
        texts.add(path.read_text())
        assert [r for r in read_records([path]) if r.layout == CSR] == [faster]
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "it is not JSON"),
        ("[1]", "it is [1], not an object"),
        ({"version": 7}, "it is of version 7, not 2"),
        ({"seconds": "fast"}, "it.seconds is 'fast', not a number"),
        ({"seconds": None}, "either seconds or a failure"),
        ({"seconds": -1.0}, "its seconds are -1.0"),
        ({"pace": "fast"}, "it.pace is 'fast', not a number"),
        ({"seconds": float("nan")}, "its seconds are nan"),
        ({"tokens": 0}, "tokens and threads have to be 1 or more"),
        ({"operator": "transmogrify"}, "its operator 'transmogrify' cannot be read"),
        ({"operator": "layer_norm", "call": {"epsilon": 1.0}}, "has no weight with a layout"),
        ({"call": {"matrix": 3}}, "its operator 'dense' cannot be read"),
        ({"weight": {"density": 7.0, "block": None}}, "its density is 7.0"),
        ({"weight": {"density": 0.5, "block": [4]}}, "its block is [4]"),
        ({"weight": {"density": 0.5}}, "it.weight has no 'block'"),
    ],
)
def test_a_damaged_line_is_passed_over_and_named(tmp_path, line, message):
    path = tmp_path / "records.jsonl"
    good = record(W, DENSE, 1e-4)
    text = line if isinstance(line, str) else json.dumps({**good.as_json(), **line})
    path.write_text(f"{json.dumps(good.as_json())}\n{text}\n")
    found = read_records([path])
    assert list(found) == [good]
    (remark,) = found.remarks
    assert remark.startswith(f"{path}:2: passed over: ")
    assert message in remark
    before = path.read_bytes()
    tidy(path)
    assert path.read_bytes() == before  # it may be somebody's to mend


def test_a_line_cut_off_damages_no_other(tmp_path):
    path = file_of(tmp_path / "records.jsonl", record(W, DENSE, 1e-4))
    path.write_bytes(path.read_bytes() + b'{"version": 1, "oper')
    append_record(path, record(W, CSR, 1e-5))
    found = read_records([path])
    assert len(found) == 2
    assert len(found.remarks) == 1


def test_many_damaged_lines_are_counted(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("x\n" * 100)
    assert len(read_records([path]).remarks) == 6
    assert read_records([path]).remarks[-1].endswith("95 more damaged lines")


def test_records_of_other_versions_and_cpus_are_passed_over(tmp_path):
    others = [
        record(W, DENSE, 1e-4, cpu="Z80"),
        record(W, CSR, 1e-4, cpu="Z80"),
        record(W, CSR, 1e-5, sparse_tvm="9.9"),
    ]
    path = file_of(tmp_path / "records.jsonl", record(W, DENSE, 1e-4), *others)
    found = read_records([path], here().cpu)
    assert len(found) == 1
    assert [remark.partition(": passed over: ")[2] for remark in found.remarks] == [
        "2 records of another CPU, Z80",
        f"1 record of sparse-tvm 9.9 with TVM {here().tvm}",
    ]
    assert len(read_records([path])) == 3
    tidy(path)
    assert len(path.read_text().splitlines()) == 4  # what is of no use here stays for others


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OptionError, match=r"nothing\.jsonl: cannot be read: No such file"):
        read_records([tmp_path / "nothing.jsonl"])


def seconds(records, w, target=NATIVE):
    found = records.seconds(layer_of(w), MeasuredWeight(w), target)
    return {layout: list(column.values()) for layout, column in found.items()}


def test_a_weight_is_found_by_what_decides_its_time():
    records = collected(record(W, CSR, 1e-5), record(W, DENSE, 1e-4))
    assert seconds(records, W) == {CSR: [1e-5], DENSE: [1e-4]}
    assert seconds(records, sparse_weight(sparsity=0.895)) == {CSR: [1e-5], DENSE: [1e-4]}
    assert seconds(records, sparse_weight(sparsity=0.8)) == {}
    assert seconds(records, sparse_weight(96, 72)) == {}
    assert seconds(records, W, "cortex-a72") == {}
    op = replace(layer_of(W), epilogue=())
    assert records.seconds(op, MeasuredWeight(W), NATIVE) == {}


def test_zeros_elsewhere_are_another_weight():
    clustered = np.zeros_like(W)
    clustered[:10] = 1
    layout = replace(CSR, format="bsr", block=(4, 1))
    records = collected(record(W, layout, 1e-5), record(W, DENSE, 1e-4))
    assert layout not in seconds(records, clustered)


def test_failures_are_no_times():
    records = collected(record(W, CSR, None), record(W, DENSE, 1e-4))
    assert seconds(records, W) == {DENSE: [1e-4]}
    assert records.failures(layer_of(W), MeasuredWeight(W), NATIVE) == {CSR}


def test_nearest_number_of_tokens():
    assert nearest(128, [1, 16, 128]) == 128
    assert nearest(100, [1, 16, 128]) == 128
    assert nearest(40, [1, 16, 128]) is None


def evidence(records, tokens, threads=None):
    return Evidence(records, threads).of(layer_of(W), MeasuredWeight(W), NATIVE, tokens)


def test_layouts_are_compared_where_all_were_measured():
    records = collected(
        *(record(W, DENSE, 1e-4, tokens) for tokens in (1, 128)),
        record(W, CSR, 1e-5, 128),
        record(W, CSR.having(parts=2), 1e-5, 128),
        record(W, CSR.having(parts=2), 1e-6, 1),
    )
    found = evidence(records, [128, 1, 16])
    assert {tokens: len(column) for tokens, column in found.conditions.items()} == {128: 1, 1: 1}
    assert found.seconds.keys() == {DENSE, CSR.having(parts=2)}


def test_threads_that_the_model_will_use_decide_alone():
    both = [record(W, layout, 1e-4, 128, n) for layout in (DENSE, CSR) for n in (1, 2)]
    records = collected(*both)
    assert len(evidence(records, [128]).conditions[128]) == 2
    assert len(evidence(records, [128], threads=2).conditions[128]) == 1
    assert len(evidence(records, [128], threads=64).conditions[128]) == 2


def test_no_dense_time_is_no_evidence():
    assert evidence(collected(record(W, CSR, 1e-5)), [128]) is None
    assert evidence(Records(), [128]) is None
