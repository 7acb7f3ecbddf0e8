"""Embeddings are stored in float16, where less than float32 is wished for."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import apply, build, compile_and_run, context
from tvm import relax

from sparse_tvm.passes.cpu.narrow_tables import narrow_tables

OP = relax.op
WEIGHTS = {"table": (1000, 32), "small": (3, 32)}
ROWS = np.array([[3, 999, 0], [7, 7, 500]])


def embedded(emit, x, table, small):
    rows = emit(OP.astype(x, "int64"))
    kinds = emit(OP.take(small, emit(OP.floor_divide(rows, relax.const(500, "int64"))), 0))
    return OP.add(emit(OP.take(table, rows, 0)), kinds)


def also_added(emit, x, table, small):
    rows = emit(OP.astype(x, "int64"))
    return OP.add(emit(OP.take(table, rows, 0)), emit(OP.sum(table, 0)))


def of_columns(emit, x, table, small):
    return OP.take(table, emit(OP.astype(emit(OP.clip(x, 0, 31)), "int64")), 1)


def subject_of(function):
    return build(function, {"x": (2, 3)}, WEIGHTS)


def stays(subject, *rules, **options):
    after = apply(narrow_tables, subject, context(*rules, **{"precision": "fp16", **options}))
    return "table" in after.weights


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_rows_are_widened(precision):
    subject, within = subject_of(embedded), context(precision=precision)
    after = apply(narrow_tables, subject, within)
    assert after.weights["table.float16"].dtype == np.float16
    assert "table" not in after.weights
    assert after.weights["small"].dtype == np.float32
    found = compile_and_run(subject, ROWS.astype("float32"), within=within)
    expected = subject.weights["table"][ROWS] + subject.weights["small"][ROWS // 500]
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("function", [also_added, of_columns])
def test_what_else_reads_a_table_wants_float32(function):
    assert stays(subject_of(function))


def test_numbers_beyond_the_range_stay_float32():
    subject = subject_of(embedded)
    subject.weights["table"][5, 5] = -1e5
    assert stays(subject)


def test_a_rule_keeps_a_table_in_float32():
    assert stays(subject_of(embedded), "table=@fp32")
    assert not stays(subject_of(embedded), "small=@fp32")


def test_tables_stay_where_nothing_is_gained():
    assert stays(subject_of(embedded), precision="fp32")
    assert stays(subject_of(embedded), precision="int8", target="x86-64-v2")
